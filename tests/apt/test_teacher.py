"""The teacher is the snapshot, whatever becomes of the student; and its pass leaves no trace in the student."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from check import close
from safetensors.torch import load_file
from tiny_models import NAMES, fill_adapters, free_heads, random_plan, set_masks, tiny_batch, tiny_model
from torch import Tensor, nn

import apt
from apt.distillation import DistillationConfig, SelfDistiller
from apt.families import EmptyAttention, anatomy_of
from apt.layers import adapted
from apt.layers.derived import plain_class
from apt.pruning.units import find_units
from apt.runs.evaluation.evaluate import saved_bytes
from apt.surgery.prune import apply_prune_plan
from apt.surgery.tails import free_tails

EVERYWHERE = ("q", "k", "v", "o", "up", "down")
FFN = "layers.0.neurons"
DROPOUT = {"hidden_dropout_prob": 0.3, "attention_probs_dropout_prob": 0.3}


def patched(name: str, **settings: Any) -> Any:
    """Adapters everywhere, with a B that is not zero."""
    return fill_adapters(apt.patch_model(tiny_model(name, **settings), rank=3, target_modules=EVERYWHERE))


def seen_by(model: Any, batch: dict[str, Tensor]) -> tuple[Tensor, list[Tensor]]:
    """Logits and the outputs of all layers, in evaluation mode, by plain hooks."""
    outputs: list[Tensor] = []
    hooks = [
        layer.module.register_forward_hook(lambda *a: outputs.append(a[2][0] if isinstance(a[2], tuple) else a[2]))
        for layer in anatomy_of(model).layers
    ]
    with torch.no_grad():
        logits = model.eval()(**batch).logits
    for hook in hooks:
        hook.remove()
    return logits, outputs


def train_a_little(model: Any, name: str) -> None:
    """Move every parameter that trains."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(**tiny_batch(name, seed=9)).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def same_as(distiller: SelfDistiller, batch: dict[str, Tensor], wanted: tuple[Tensor, list[Tensor]]) -> None:
    random_state = torch.get_rng_state()
    found = distiller.forward_teacher(batch)
    assert torch.equal(torch.get_rng_state(), random_state)
    close("logits", found.predictions["logits"], wanted[0])
    assert sorted(found.layers) == sorted(distiller.sampled)
    for index, hidden in found.layers.items():
        close(f"layer {index}", hidden, wanted[1][index])
        assert not hidden.requires_grad


@pytest.mark.parametrize("name", NAMES)
def test_the_teacher_stays_what_the_student_was(name: str) -> None:
    """Through updates, masks and two events that empty sub-layers, whose attention the student no longer has."""
    model = patched(name)
    batch, start = tiny_batch(name), copy.deepcopy(model)
    distiller = SelfDistiller(model.train())
    distiller.snapshot()
    wanted = seen_by(start, batch)
    for event, empty in enumerate([[*free_heads(model)[-1:], FFN], free_heads(model)], 1):
        train_a_little(model, name)
        plan = random_plan(model, empty=empty, seed=event)
        set_masks(model, plan)
        same_as(distiller, batch, wanted)
        apply_prune_plan(model, plan, keep_tail=True)
        distiller.follow()
        same_as(distiller, batch, wanted)
    student = seen_by(copy.deepcopy(model), batch)[0]
    assert (student - wanted[0]).abs().max() > 1e-2  # otherwise the teacher might be the student


@pytest.mark.parametrize("name", ["bert", "llama_gqa", "opt"])
def test_its_pass_leaves_no_trace_in_the_student(name: str) -> None:
    """Neither in parameters and buffers nor in modes, sizes, counts and gates; also where the pass fails."""
    model = patched(name, **(DROPOUT if name == "bert" else {})).train()
    model.get_input_embeddings().eval()
    distiller = SelfDistiller(model)
    distiller.snapshot()
    plan = random_plan(model, empty=free_heads(model)[-1:], seed=1)
    apply_prune_plan(model, plan, keep_tail=True)
    distiller.follow()
    set_masks(model, random_plan(model, seed=2))
    for group in find_units(anatomy_of(model)):
        group.mask.collecting = True
    batch = tiny_batch(name)
    model(**batch).loss.backward()

    def trace() -> tuple[dict[str, Tensor], list[Any]]:
        tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        plain = [
            (where, {k: v for k, v in vars(module).items() if isinstance(v, bool | int | float)})
            for where, module in model.named_modules()
        ]
        return {key: tensor.clone() for key, tensor in tensors.items()}, plain

    before, identities = trace(), {key: id(p) for key, p in model.named_parameters()}
    stack = anatomy_of(model).stacks[0]
    assert distiller._valid_tokens(stack) is batch["attention_mask"]
    distiller.forward_teacher(tiny_batch(name))
    assert distiller._valid_tokens(stack) is batch["attention_mask"]
    with pytest.raises(IndexError):
        distiller.forward_teacher({**batch, "input_ids": batch["input_ids"] + 1000})
    after = trace()
    assert list(after[0]) == list(before[0])
    assert all(torch.equal(after[0][key], before[0][key]) for key in before[0])
    assert after[1] == before[1]
    assert {key: id(p) for key, p in model.named_parameters()} == identities
    assert any(group.mask.sums.any() for group in find_units(anatomy_of(model)))


@pytest.mark.parametrize("method", ["gsa", "spectral_a", "spectral_r"])
def test_a_student_of_any_method_is_its_own_teacher(method: str) -> None:
    model = apt.patch_model(tiny_model("llama_gqa"), method=method, prune=True, rank=3, target_modules=EVERYWHERE)
    train_a_little(model.train(), "llama_gqa")
    batch, start = tiny_batch("llama_gqa"), copy.deepcopy(model)
    distiller = SelfDistiller(model.train())
    distiller.snapshot()
    train_a_little(model, "llama_gqa")
    apply_prune_plan(model, random_plan(model, empty=free_heads(model)[-1:], seed=1), keep_tail=True)
    distiller.follow()
    same_as(distiller, batch, seen_by(start, batch))
    output = model(**batch)
    distiller.compute_distill_loss(output, distiller.forward_teacher(batch), batch).backward()
    assert all(p.grad is not None for _, linear in adapted(model) for p in linear.adapter_parameters())


def test_dropout_of_the_student_does_not_reach_it() -> None:
    model = patched("bert", **DROPOUT)
    batch, start = tiny_batch("bert"), copy.deepcopy(model)
    distiller = SelfDistiller(model.train())
    distiller.snapshot()
    noisy = [model(**batch).logits for _ in range(2)]
    assert not torch.equal(*noisy)
    same_as(distiller, batch, seen_by(start, batch))


def test_the_first_call_takes_the_snapshot_if_no_one_has() -> None:
    model = patched("bert").train()
    wanted = seen_by(copy.deepcopy(model), tiny_batch("bert"))
    distiller = SelfDistiller(model)
    assert not distiller.has_teacher
    same_as(distiller, tiny_batch("bert"), wanted)
    train_a_little(model, "bert")
    same_as(distiller, tiny_batch("bert"), wanted)


def test_a_second_snapshot_is_as_narrow_as_its_student() -> None:
    model = patched("llama_gqa").train()
    distiller = SelfDistiller(model)
    distiller.snapshot()
    apply_prune_plan(model, random_plan(model, empty=free_heads(model)[-1:], seed=1), keep_tail=True)
    free_tails(model)
    distiller.snapshot()
    wanted = seen_by(copy.deepcopy(model), tiny_batch("llama_gqa"))
    train_a_little(model, "llama_gqa")
    apply_prune_plan(model, random_plan(model, seed=2), keep_tail=True)
    distiller.follow()
    same_as(distiller, tiny_batch("llama_gqa"), wanted)


def test_without_the_tails_the_teacher_says_so() -> None:
    model = patched("bert")
    distiller = SelfDistiller(model)
    distiller.snapshot()
    apply_prune_plan(model, random_plan(model, seed=1))
    with pytest.raises(ValueError, match=r"was \[32, 32\] .* and is \[.*\] now; prune with keep_tail=True"):
        distiller.forward_teacher(tiny_batch("bert"))


@pytest.mark.parametrize("name", ["bert", "llama_gqa"])
def test_when_it_goes_its_memory_goes_and_the_student_stays(name: str) -> None:
    model, twin = patched(name), patched(name)
    distiller = SelfDistiller(model)
    distiller.snapshot()
    plan = random_plan(model, empty=[*free_heads(model)[-1:], FFN], seed=1)
    apply_prune_plan(model, plan, keep_tail=True)
    apply_prune_plan(twin, plan)
    stale = [module for module in model.modules() if isinstance(module, EmptyAttention) and module.dense]
    assert stale
    distiller.drop()
    free_tails(model)
    assert {key: t.shape for key, t in model.state_dict().items()} == {
        key: t.shape for key, t in twin.state_dict().items()
    }
    assert not any(module.dense for module in stale)
    assert all(m.teacher_A is None and m.teacher_B is None for _, m in adapted(model))
    assert all(tensor.is_contiguous() for tensor in model.parameters())
    close("logits", seen_by(model, tiny_batch(name))[0], seen_by(twin, tiny_batch(name))[0])
    assert [type(module) for module in model.modules()] == [type(module) for module in twin.modules()]


def test_each_event_leaves_less_for_backward_while_the_teacher_is_dense() -> None:
    model = patched("bert", num_hidden_layers=4).train()
    distiller = SelfDistiller(model)
    distiller.snapshot()
    batch = tiny_batch("bert", size=8)
    teacher = distiller.forward_teacher(batch)

    class Step(nn.Module):
        """The student's pass and the distillation loss."""

        def forward(self, **batch: Tensor) -> Tensor:
            return distiller.compute_distill_loss(model(**batch), teacher, batch)

    step = Step()
    step.model = model  # whose parameters do not count as saved
    sizes = [saved_bytes(step, batch)]
    for event in range(1, 4):
        apply_prune_plan(model, random_plan(model, empty=["layers.1.heads"], keep=0.7, seed=event), keep_tail=True)
        distiller.sampled, distiller.generator = [0, 2], torch.Generator()
        distiller.follow()
        teacher = distiller.forward_teacher(batch)
        sizes.append(saved_bytes(step, batch))
        assert all(m.weight.shape in {(32, 32), (40, 32), (32, 40)} for _, m in adapted(model))
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[-1] < 0.8 * sizes[0]


@pytest.mark.parametrize("name", ["bert", "llama_gqa", "deberta"])
def test_a_snapshot_goes_to_a_model_patched_anew(name: str) -> None:
    """Onto replayed events, and where another base had other weights in what stands aside."""
    model = patched(name)
    distiller = SelfDistiller(model, seed=5)
    distiller.snapshot()
    train_a_little(model, name)
    plans = [random_plan(model, empty=free_heads(model)[-1:], seed=1)]
    apply_prune_plan(model, plans[0], keep_tail=True)
    plans.append(random_plan(model, seed=2))
    apply_prune_plan(model, plans[1], keep_tail=True)
    distiller.follow()

    twin = patched(name)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.add_(1.0)
    for plan in plans:
        apply_prune_plan(twin, plan, keep_tail=True)
    other = SelfDistiller(twin)
    twin.load_state_dict(model.state_dict())
    other.load_state_dict(distiller.state_dict(), distiller.teacher.counts)
    assert other.sampled == distiller.sampled
    for _ in range(2):
        ours, theirs = (each.forward_teacher(tiny_batch(name)) for each in (other, distiller))
        assert torch.equal(ours.predictions["logits"], theirs.predictions["logits"])
        assert ours.layers.keys() == theirs.layers.keys()
        assert all(torch.equal(ours.layers[i], theirs.layers[i]) for i in ours.layers)
        other.draw()
        distiller.draw()
    assert other.sampled == distiller.sampled


def test_nothing_of_it_is_exported_counted_or_left_by_unpatch(tmp_path: Path) -> None:
    model, twin = patched("bert"), patched("bert")
    layer = plain_class(twin.bert.encoder.layer[0])
    distiller = SelfDistiller(model)
    distiller.snapshot()
    files = [apt.save_adapter(each, tmp_path / name) for each, name in ((model, "a"), (twin, "b"))]
    adapters = [load_file(file / "adapter_model.safetensors") for file in files]
    assert adapters[0].keys() == adapters[1].keys()
    plan = random_plan(model, empty=["layers.1.heads"], seed=1)
    apply_prune_plan(model, plan, keep_tail=True)
    apply_prune_plan(twin, plan)
    assert "apt_transform.lora_A" in model.state_dict()
    ours, theirs = apt.summary(model), apt.summary(twin)
    assert (ours.params_after, ours.sparsity) == (theirs.params_after, theirs.sparsity)
    small = apt.load_model(apt.export_model(model, tmp_path / "small"))
    plain = apt.load_model(apt.export_model(twin, tmp_path / "plain"))
    assert small.state_dict().keys() == plain.state_dict().keys()
    assert all(torch.equal(t, plain.state_dict()[key]) for key, t in small.state_dict().items())
    apt.unpatch_model(model, merge=True)
    apt.unpatch_model(twin, merge=True)
    assert model.state_dict().keys() == twin.state_dict().keys()
    assert type(model.bert.encoder.layer[0]) is layer
    assert all(t.untyped_storage().nbytes() == t.nbytes for t in model.parameters())


def test_a_copy_of_a_student_has_no_part_in_its_distillation() -> None:
    model = patched("bert").train()
    distiller = SelfDistiller(model)
    output = model(**tiny_batch("bert"))
    twin = copy.deepcopy(model)
    twin(**tiny_batch("bert", seed=3))
    loss = distiller.compute_distill_loss(output, distiller.forward_teacher(tiny_batch("bert")))
    assert loss.item() == pytest.approx(0.0, abs=1e-20)  # the student is its own teacher still
    other = SelfDistiller(twin)
    twin(**tiny_batch("bert"))
    assert other.forward_teacher(tiny_batch("bert")).layers.keys() == set(other.sampled)


def test_autocast_of_the_student_and_of_the_settings_reaches_it() -> None:
    model = apt.patch_model(tiny_model("bert", torch.float32), rank=3).train()
    plain = SelfDistiller(model).forward_teacher(tiny_batch("bert"))
    settings = DistillationConfig(teacher_dtype="bf16")
    asked = SelfDistiller(model, config=settings).forward_teacher(tiny_batch("bert"))
    distiller = SelfDistiller(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(**tiny_batch("bert"))
    followed = distiller.forward_teacher(tiny_batch("bert"))
    rough = asked.predictions["logits"]
    assert torch.equal(followed.predictions["logits"], rough)
    assert 0 < (rough.float() - plain.predictions["logits"]).abs().max() < 0.5
