"""Every code block of the efficient fine-tuning document runs, in its order; only imports are adapted.

`SCENES` holds, by the heading of a block, what it needs (tiny models and data in place of the user's) and what must be
true after it.
"""

import re
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from check import close
from tiny_models import tiny_batch, tiny_model
from torch import Tensor, nn

import apt
import apt.efficient_finetuning as room
import apt_kernels

DOCUMENT = Path(__file__).parent.parent / "documents/efficient_finetuning.txt"
IMPORTS = {
    "from .efficient_finetuning import": "from apt.efficient_finetuning import",
    "from torch.cuda.amp import autocast, GradScaler\n": "",  # those of a CPU are in the scene
}
Names = dict[str, Any]


def blocks() -> dict[str, str]:
    """Code by heading, imports adapted."""
    found = {}
    for section in re.split(r"^##+ ", DOCUMENT.read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]:
        title, fences = section.partition("\n")[0], section.split("```python\n")[1:]
        assert len(fences) <= 1, f"{title} has several blocks, of which one would be lost"
        for fence in fences:
            code = fence.partition("\n```")[0] + "\n"
            for old, new in IMPORTS.items():
                code = code.replace(old, new)
            found[title] = code
    return found


def names(**more: Any) -> Names:
    """What every block may use: torch, and the classes and functions of the document."""
    ours = {name: getattr(room, name) for name in room.__all__}
    return {"torch": torch, "nn": nn, "F": F, **ours, **more}


class Attention(nn.Module):
    """A layer with the names of the document, which its own forward calls."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.in_proj, self.out_proj = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.out_proj(torch.tanh(self.in_proj(x)))  # type: ignore[no-any-return]


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.self_attn = Attention(width)
        self.linear1, self.linear2 = nn.Linear(width, 24), nn.Linear(24, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear2(F.relu(self.linear1(self.self_attn(x))))  # type: ignore[no-any-return]


class Classifier(nn.Module):
    """Embeds token ids, and has modules called attention and mlp, as in the training workflow."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 16)
        self.attention, self.mlp = Attention(16), nn.Sequential(nn.Linear(16, 16), nn.ReLU())
        self.output = nn.Linear(16, 3)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.output(self.mlp(self.attention(self.embedding(input_ids))).mean(1))  # type: ignore[no-any-return]


class PromptClassifier(nn.Module):
    """The parts that the P-tuning workflow calls one after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 16)
        self.transformer = nn.TransformerEncoderLayer(16, 2, 24, dropout=0.0, batch_first=True)
        self.output = nn.Linear(16, 3)


def training(model: nn.Module, **more: Any) -> Names:
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(20, (12, 5), generator=draw)
    loader = [{"input_ids": ids[i : i + 4], "labels": ids[i : i + 4, 0] % 3} for i in range(0, 12, 4)]
    return names(model=model, dataloader=loader, num_epochs=3, criterion=nn.CrossEntropyLoss(), **more)


def of_tokens(outputs: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(outputs.mean(1), labels)


def run(title: str, *scenes: Names) -> Names:
    """Run a block in these names; they are changed."""
    torch.manual_seed(0)
    space = scenes[0] if scenes else names()
    exec(compile(blocks()[title], title, "exec"), space)
    return space


def loses(manager: Any, frozen: dict[str, Tensor]) -> None:
    """Training changed what trains and nothing else."""
    for name, parameter in manager.model.named_parameters():
        if not parameter.requires_grad:
            assert torch.equal(parameter, frozen[name]), name
    assert all(parameter.grad is not None for parameter in manager.get_trainable_parameters())


def lora_features() -> None:
    apt_kernels.reset_calls()
    space = run("LoRA Features")
    assert apt_kernels.calls()["masked_lora_linear"] == {"torch": 1}
    linear, x = space["lora_linear"].eval(), space["input_tensor"]
    assert space["output"].shape == (2, 10, 768)
    close("start", linear(x), space["original_layer"](x))
    update = space["lora_layer"].eval()
    nn.init.normal_(update.lora_B)
    linear.lora_layer = update
    close("together and apart", linear(x) / 100, (space["original_layer"](x) + update(x)) / 100)


def lora_mathematics() -> None:
    torch.manual_seed(0)
    linear = room.LoRALinear(nn.Linear(6, 5).double(), rank=3, alpha=7.0)
    nn.init.normal_(linear.lora_layer.lora_B)
    x = torch.randn(2, 4, 6, dtype=torch.float64)
    a, b = linear.lora_layer.lora_A, linear.lora_layer.lora_B
    space = run(
        "LoRA Mathematical Foundation",
        names(input=x, A=a, B=b, alpha=7.0, rank=3, original_output=linear.original_layer(x)),
    )
    close("formula", linear(x), space["final_output"])


def ptuning_features() -> None:
    space = run("P-tuning Features")
    tokens = space["virtual_tokens"]
    assert tokens.shape == (4, 20, 768)
    assert torch.equal(space["ptuning_embeddings"].eval()(2)[0], space["ptuning_embeddings"](1)[0])


def ptuning_architecture() -> None:
    theirs = run("P-tuning Architecture")["PTuningEmbedding"](5, 8, 12)
    ours = room.PTuningEmbedding(5, 8, 12)
    ours.load_state_dict(theirs.state_dict())
    close("tokens", ours(3), theirs(3))


def adalora_features() -> None:
    space = run("AdaLoRA Features")
    assert space["effective_rank"] == 8
    assert space["output"].shape == (2, 10, 768)
    assert not space["output"].any()  # an update alone starts at zero


def adalora_mechanism() -> None:
    space = run("AdaLoRA Adaptive Mechanism")
    layer, x = room.AdaLoRALayer(6, 5, rank=4, rank_allocation="uniform").double(), torch.randn(3, 6).double()
    nn.init.normal_(layer.lora_B)
    for importance, count in (([1.0, 0.05, 1.0, -1.0], 2), ([0.09, 0.0, 0.1, 0.0], 1), ([1.0] * 4, 4)):
        with torch.no_grad():
            layer.rank_importance.copy_(torch.tensor(importance, dtype=torch.float64))
        assert space["get_effective_rank"](layer) == layer.get_effective_rank() == count
        space["forward"](layer, x)  # it ends before the computation, whose rest this is:
        a, b, g = layer.lora_A[:count], layer.lora_B[:, :count], layer.rank_importance[:count]
        close("forward", layer(x), 4.0 * (x @ a.T * g) @ b.T)


def prefix_features() -> None:
    space = run("Prefix Tuning Features")
    assert space["prefix_key"].shape == space["prefix_value"].shape == (20, 12, 64)


def prefix_architecture() -> None:
    theirs = run("Prefix Tuning Architecture")["PrefixTuning"](2, 3, 4, 5)
    theirs.num_heads, theirs.head_dimension = 3, 4  # which it forgets to keep
    ours = room.PrefixTuning(2, 3, 4, 5)
    ours.load_state_dict(theirs.state_dict())
    for layer in range(2):
        for mine, other in zip(ours.get_prefix_states(layer), theirs.get_prefix_states(layer), strict=True):
            close("states", mine.flatten(1), other)


def manager_features() -> None:
    model = Block(16)
    space = run("Manager Features", names(model=model))
    manager = space["manager"]
    trained = space["trainable_parameters"]
    assert sum(p.numel() for p in trained) == space["trainable_count"]
    assert set(manager.lora_layers) == set(manager.adalora_layers) == {"self_attn.out_proj", "linear2"}
    inside = {id(p) for p in (*manager.ptuning_embeddings.parameters(), *manager.prefix_tuning.parameters())}
    for layers in (manager.lora_layers, manager.adalora_layers):
        inside |= {id(p) for layer in layers.values() for p in layer.parameters()}
    assert inside == {id(p) for p in trained}
    x = torch.randn(3, 16)
    model.eval()
    before = model(x)
    for _, layer in (*manager.lora_layers.items(), *manager.adalora_layers.items()):
        nn.init.ones_(layer.lora_B)
        assert not torch.equal(model(x), before)  # both kinds of update are in the forward
        before = model(x)


def manager_utilities(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    model = Block(16)
    space = run("Manager Features", names(model=model))
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    run("Manager Utility Functions", space)
    assert all(torch.equal(p, start[name]) for name, p in model.named_parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert space["efficiency"] == pytest.approx(100.0 * trained / sum(p.numel() for p in model.parameters()))


def lora_example() -> None:
    apt_kernels.reset_calls()
    space = run("1. **LoRA Application Example**")
    assert apt_kernels.calls()["masked_lora_linear"] == {"torch": 2}
    assert space["output"].shape == (2, 10, 1000)
    assert space["manager"].count_trainable_parameters() == 2 * 8 * (768 + 768)


def ptuning_example() -> None:
    space = run("2. **P-tuning Application Example**")
    assert space["virtual_tokens"].shape == (4, 20, 768)
    model, trained = space["model"], space["manager"].get_trainable_parameters()
    assert {id(p) for p in trained} == {id(p) for p in space["manager"].ptuning_embeddings.parameters()}
    assert model(torch.zeros(5, 2, dtype=torch.long)).shape == (5, 2, 1000)


def adalora_example() -> None:
    layers = run("3. **AdaLoRA Application Example**")["manager"].adalora_layers
    assert {name: layer.get_effective_rank() for name, layer in layers.items()} == {"linear1": 8, "linear2": 8}


def prefix_example() -> None:
    space = run("4. **Prefix Tuning Application Example**")
    assert space["prefix_key"].shape == space["prefix_value"].shape == (20, 12, 64)
    assert space["manager"].count_trainable_parameters() == 20 * 12 * 64 * 2


def parameter_counts() -> Names:
    space = run("1. **Parameter Count Comparison**")
    found = [space[f"{name}_efficiency"] for name in ("lora", "ptuning", "adalora", "prefix")]
    assert found == pytest.approx([1.0, 0.5, 0.8, 0.2])
    return space


def memory_counts() -> None:
    space = run("2. **Memory Usage Comparison**", parameter_counts())
    found = [round(space[f"{name}_memory"], 3) for name in ("lora", "ptuning", "adalora", "prefix")]
    assert found == [0.004, 0.002, 0.003, 0.001]


def lora_workflow(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    space = training(Classifier())
    start = {name: p.detach().clone() for name, p in space["model"].named_parameters()}
    space = run("1. **LoRA Training Workflow**", space)
    manager = space["manager"]
    assert set(manager.lora_layers) == {"attention.in_proj", "attention.out_proj", "mlp.0"}
    loses(manager, start)
    again = room.apply_lora_to_model(Classifier(), target_modules=["attention", "mlp"])
    again.model.load_state_dict(start, strict=False)  # the same base, other adapters
    again.load_efficient_weights("lora_weights.pt")
    ids = space["dataloader"][0]["input_ids"]
    assert torch.equal(again.model.eval()(ids), space["model"].eval()(ids))


def ptuning_workflow(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    space = training(PromptClassifier()) | {"criterion": of_tokens}
    start = {name: p.detach().clone() for name, p in space["model"].named_parameters()}
    manager = run("2. **P-tuning Training Workflow**", space)["manager"]
    assert space["outputs"].shape == (4, 20 + 5, 3)
    loses(manager, start)
    assert (folder / "ptuning_weights.pt").exists()


def checkpointing() -> None:
    found = []
    for checkpointed in (False, True):
        model = apt.patch_model(tiny_model("bert"), method="lora").train()
        if checkpointed:
            run("1. **Gradient Checkpointing**", names(model=model))
            assert model.is_gradient_checkpointing
        torch.manual_seed(1)
        model(**tiny_batch("bert")).loss.backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    for name, gradient in found[0].items():
        close(name, found[1][name], gradient)


def mixed_precision() -> None:
    model = Classifier()
    manager = room.apply_lora_to_model(model, target_modules=["attention"])
    seen: list[torch.dtype] = []
    model.attention.register_forward_hook(lambda module, args, output: seen.append(output.dtype))
    optimizer = torch.optim.AdamW(manager.get_trainable_parameters(), lr=1e-2)
    before = [p.detach().clone() for p in manager.get_trainable_parameters()]
    run(
        "2. **Mixed Precision Training**",
        training(
            model,
            optimizer=optimizer,
            autocast=partial(torch.autocast, "cpu", dtype=torch.bfloat16),
            GradScaler=partial(torch.amp.GradScaler, "cpu"),
        ),
    )
    assert seen == [torch.bfloat16] * 3
    after = manager.get_trainable_parameters()
    assert all(p.dtype == torch.float32 for p in after)
    assert not any(torch.equal(p, old) for p, old in zip(after, before, strict=True))


def parameter_sharing() -> None:
    model = nn.ModuleDict({f"attention{i}": room.LoRALinear(nn.Linear(768, 768)) for i in range(3)})
    space = run("3. **Parameter Sharing**", names(model=model))
    shared = space["shared_lora"]
    layers: list[Any] = list(model.values())
    assert all(layer.lora_layer is shared for layer in layers)
    assert sum(p.numel() for p in model.train().parameters() if p.requires_grad) == 2 * 8 * 768
    nn.init.normal_(shared.lora_B)
    x = torch.randn(2, 768)
    for layer in layers:
        close("shared", layer(x) / 100, (layer.original_layer(x) + shared(x)) / 100)
    # The loop names the frozen linears too, so that each layer lists A and B twice; and it comes to an end.
    assert len(model.state_dict()) == 3 * (2 + 2 + 2)


def method_selection() -> None:
    for task, method in {
        "general": "lora",
        "language": "ptuning",
        "complex": "adalora",
        "generation": "prefix",
    }.items():
        space = run("1. **Method Selection Guidelines**", names(task_type=task))
        assert space["method"] == method
        chosen = ("rank", "alpha", "num_virtual_tokens", "adaptive_rank", "prefix_length")
        settings = {name: space[name] for name in chosen if name in space}
        manager = room.EfficientFineTuningManager(tiny_model("llama_gqa", torch.float32))
        call = {"prefix": "prefix_tuning"}.get(method, method)
        getattr(manager, f"apply_{call}")(**settings)
        assert manager.count_trainable_parameters() > 0


def hyperparameters() -> None:
    space = run("2. **Hyperparameter Tuning**")
    lora, ptuning, adalora = (space[f"{name}_configs"] for name in ("lora", "ptuning", "adalora"))
    for rank, alpha, dropout in zip(lora["rank"], lora["alpha"], [*lora["dropout"], 0.0], strict=True):
        layer = room.LoRALayer(40, 40, rank, alpha, dropout)
        assert layer.scale == alpha / rank
        assert layer.rank == rank
    for tokens in ptuning["num_virtual_tokens"]:
        for width in ptuning["hidden_dimension"]:
            assert room.PTuningEmbedding(tokens, 8, width)(2).shape == (2, tokens, 8)
    for rank in adalora["rank"]:
        for adaptive in adalora["adaptive_rank"]:
            for allocation in adalora["rank_allocation"]:
                layer = room.AdaLoRALayer(40, 40, rank, adaptive_rank=adaptive, rank_allocation=allocation)
                assert layer.get_effective_rank() == rank


def evaluation_metrics() -> None:
    manager = room.apply_lora_to_model(Block(16), target_modules=["linear1"])
    trained = manager.get_trainable_parameters()
    memory = [sum(p.numel() * 4 for p in parameters) for parameters in (trained, manager.model.parameters())]
    space = run(
        "3. **Evaluation Metrics**",
        names(
            trainable_parameters=manager.count_trainable_parameters(),
            total_parameters=sum(p.numel() for p in manager.model.parameters()),
            trainable_memory=memory[0],
            total_memory=memory[1],
            time_per_epoch=0.7,
            evaluation_metrics=0.9,
        ),
    )
    assert space["efficiency_score"] == pytest.approx(manager.efficiency_score(0.7, 0.9))
    assert space["parameter_efficiency"] == manager.parameter_efficiency()
    assert space["memory_efficiency"] == manager.memory_efficiency()


SCENES: dict[str, Callable[..., object]] = {
    "LoRA Features": lora_features,
    "LoRA Mathematical Foundation": lora_mathematics,
    "P-tuning Features": ptuning_features,
    "P-tuning Architecture": ptuning_architecture,
    "AdaLoRA Features": adalora_features,
    "AdaLoRA Adaptive Mechanism": adalora_mechanism,
    "Prefix Tuning Features": prefix_features,
    "Prefix Tuning Architecture": prefix_architecture,
    "Manager Features": manager_features,
    "Manager Utility Functions": manager_utilities,
    "1. **LoRA Application Example**": lora_example,
    "2. **P-tuning Application Example**": ptuning_example,
    "3. **AdaLoRA Application Example**": adalora_example,
    "4. **Prefix Tuning Application Example**": prefix_example,
    "1. **Parameter Count Comparison**": parameter_counts,
    "2. **Memory Usage Comparison**": memory_counts,
    "1. **LoRA Training Workflow**": lora_workflow,
    "2. **P-tuning Training Workflow**": ptuning_workflow,
    "1. **Gradient Checkpointing**": checkpointing,
    "2. **Mixed Precision Training**": mixed_precision,
    "3. **Parameter Sharing**": parameter_sharing,
    "1. **Method Selection Guidelines**": method_selection,
    "2. **Hyperparameter Tuning**": hyperparameters,
    "3. **Evaluation Metrics**": evaluation_metrics,
}
IN_A_FOLDER = (manager_utilities, lora_workflow, ptuning_workflow)  # they save where they are


def test_every_block_of_the_document_has_its_scene() -> None:
    assert list(blocks()) == list(SCENES)
    assert len(SCENES) == DOCUMENT.read_text(encoding="utf-8").count("```python")


@pytest.mark.parametrize("title", SCENES)
def test_a_block_runs(title: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scene = SCENES[title]
    with warnings.catch_warnings():
        warnings.simplefilter("error", DeprecationWarning)
        if scene in IN_A_FOLDER:
            scene(tmp_path, monkeypatch)
        else:
            scene()
