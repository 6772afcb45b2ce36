"""Ways of using a Trainer, and things done to a patched model, that work, or of which one line says what to do."""

import copy
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_models import tiny_model
from tiny_trainer import Rows, trainer
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments, Trainer, TrainingArguments

import apt
from apt.runs.models import check_lengths
from apt.training.controller.built import check_one_device

SHORT: dict[str, Any] = {"num_events": 1, "prune_end": 4, "max_steps": 6}


@pytest.fixture
def arguments(tmp_path: Path) -> TrainingArguments:
    return TrainingArguments(str(tmp_path), use_cpu=True, report_to="none", max_steps=6)


class WithOptions(Trainer):
    """A trainer of somebody's, with arguments of its own in its own order."""

    def __init__(
        self, model: Any = None, flavour: str = "", args: Any = None, *, topping: str = "", **more: Any
    ) -> None:
        super().__init__(model=model, args=args, **more)
        self.chosen = flavour, topping


def test_arguments_of_all_classes_reach_their_own(arguments: TrainingArguments) -> None:
    kind = apt.trainer_class(WithOptions)
    assert kind is apt.trainer_class(WithOptions)
    assert apt.trainer_class(Trainer) is apt.APTrainer
    assert issubclass(kind, apt.APTrainer)
    assert issubclass(kind, WithOptions)

    class Subclass(kind):  # type: ignore[misc, valid-type]
        def __init__(self, *args: Any, size: int, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.size = size

    ran = Subclass(
        apt.patch_model(tiny_model("bert", torch.float32)),
        "sweet",
        arguments,
        topping="cream",
        size=3,
        train_dataset=Rows(),
        **{"target_sparsity": 0.5, "num_events": 1, "prune_end": 4},
    )
    ran.train()
    assert (*ran.chosen, ran.size) == ("sweet", "cream", 3)
    assert apt.summary(ran.model).sparsity >= 0.5
    with pytest.raises(ValueError, match="unknown setting 'toping'"):
        kind(model=ran.model, args=arguments, toping="cream")
    with pytest.raises(TypeError, match="takes model, flavour, args, topping; give them by name, each once"):
        kind(ran.model, "sweet", arguments, model=ran.model)
    with pytest.raises(ValueError, match=r"takes a subclass of transformers\.Trainer, got <class 'int'>"):
        apt.trainer_class(int)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", [apt.APTrainer, apt.trainer_class(Seq2SeqTrainer)])
def test_predict_with_generate_is_respected(kind: Any, tmp_path: Path) -> None:
    settings = {"predict_with_generate": True, "generation_max_length": 5, "eval_strategy": "steps", "eval_steps": 3}
    asked = Seq2SeqTrainingArguments(str(tmp_path), use_cpu=True, report_to="none", max_steps=6, **settings)
    model = apt.patch_model(tiny_model("t5", torch.float32))
    rows = [{**Rows()[index], "labels": Rows()[index + 1]["input_ids"]} for index in range(8)]
    seen = []

    def look(found: Any) -> dict[str, float]:
        seen.append((found.predictions.dtype.kind, found.predictions.ndim))
        return {}

    goal = {"target_sparsity": 0.3, "num_events": 1, "prune_end": 4}
    ran = kind(model=model, args=asked, train_dataset=rows, eval_dataset=rows, compute_metrics=look, **goal)
    ran.train()
    assert seen == [("i", 2)] * 2  # tokens, not the logits of a vocabulary
    assert isinstance(ran, Seq2SeqTrainer)
    assert apt.summary(ran.model).sparsity >= 0.3


@pytest.mark.parametrize("name", ["bert", "llama_gqa"])
def test_a_model_that_is_cast_after_the_patch_prunes_and_grows(name: str, tmp_path: Path) -> None:
    ran = trainer(tmp_path, name, **SHORT)
    ran.model.to(torch.bfloat16)
    ran.train()
    assert apt.summary(ran.model).sparsity >= 0.6
    assert max(apt.summary(ran.model).ranks.values()) > 3
    assert {parameter.dtype for parameter in ran.model.parameters()} == {torch.bfloat16}
    apt.export_model(ran.model, tmp_path / "small")


def test_evaluation_in_bfloat16_before_and_after_training(tmp_path: Path) -> None:
    ran = trainer(tmp_path, bf16_full_eval=True, eval_dataset=Rows(), **SHORT)
    first = ran.evaluate()["eval_loss"]
    ran.train()
    assert apt.summary(ran.model).sparsity >= 0.6
    assert ran.evaluate()["eval_loss"] != first


def test_more_devices_than_one_are_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"sees 2 GPUs.*DataParallel.*CUDA_VISIBLE_DEVICES=0"):
        check_one_device(2)
    ran = trainer(tmp_path, **SHORT)
    monkeypatch.setattr(TrainingArguments, "n_gpu", 2)
    with pytest.raises(ValueError, match=r"sees 2 GPUs"):
        apt.APTrainer(model=ran.model, args=ran.args)
    model = apt.patch_model(tiny_model("bert", torch.float32), method="lora")
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    with pytest.raises(ValueError, match=r"in DataParallel; .* give model.module"):
        apt.Controller(nn.DataParallel(model), optimizer, 5)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    with pytest.raises(ValueError, match="trains in one process, whatever the method"):
        apt.Controller(model, optimizer, 5)


def test_a_model_spread_by_torch_is_told() -> None:
    os.environ.update(MASTER_ADDR="localhost", MASTER_PORT="29477")
    torch.distributed.init_process_group("gloo", rank=0, world_size=1)
    try:
        model = apt.patch_model(tiny_model("bert", torch.float32))
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
        with pytest.raises(ValueError, match=r"in DistributedDataParallel; .* give model.module"):
            apt.Controller(nn.parallel.DistributedDataParallel(model), optimizer, 5)
        sharded = FullyShardedDataParallel(tiny_model("bert", torch.float32), device_id=torch.device("cpu"))
        with pytest.raises(ValueError, match=r"in FullyShardedDataParallel; .* give model.module"):
            apt.patch_model(sharded)
        for settings in ({}, {"method": "lora"}):
            plain = tiny_model("bert", torch.float32)
            fully_shard(plain)
            with pytest.raises(ValueError, match="query has no weight here: it is offloaded or sharded"):
                apt.patch_model(plain, **settings)
    finally:
        torch.distributed.destroy_process_group()


def test_a_state_from_another_side_of_an_event_is_told(tmp_path: Path) -> None:
    """As accelerate's load_state loads it."""
    ran = trainer(tmp_path, **SHORT)
    before = {name: tensor.clone() for name, tensor in ran.model.state_dict().items()}
    ran.model.load_state_dict(before)
    ran.train()
    with pytest.raises(RuntimeError, match=r"sizes of another moment of the run.*resume_checkpoint"):
        ran.model.load_state_dict(before)
    plain = apt.unpatch_model(ran.model)
    assert not plain._load_state_dict_pre_hooks


def test_a_copy_that_does_not_follow_an_event_is_told(tmp_path: Path) -> None:
    ran = trainer(tmp_path, **SHORT)
    average = torch.optim.swa_utils.AveragedModel(ran.model)
    with pytest.warns(UserWarning, match=r"1 copies of the model do not follow the event after step 4.*EMA"):
        ran.train()
    with pytest.raises(RuntimeError, match="must match the size"):
        average.update_parameters(ran.model)
    after = copy.deepcopy(ran.model)
    assert apt.summary(after).units == apt.summary(ran.model).units


RESUMED: dict[str, tuple[dict[str, Any], str]] = {
    "a new teacher": ({"use_self_distillation": True, "distill_end": 1.0}, "is of a run without a teacher"),
    "other targets": ({"target_modules": ["q", "k"]}, r"patched with adapters on .*value.*, this one on .*key"),
    "another rank": ({"rank": 5}, "patched with rank=3, this one with 5"),
}


@pytest.mark.parametrize("way", RESUMED)
def test_a_checkpoint_of_another_run_is_told(way: str, tmp_path: Path) -> None:
    first = trainer(tmp_path, save_strategy="steps", save_steps=5, **SHORT)
    first.train()
    settings, line = RESUMED[way]
    patched = {name: settings[name] for name in ("target_modules", "rank") if name in settings}
    model = apt.patch_model(tiny_model("bert", torch.float32), **{"rank": 3, **patched})
    goal: dict[str, Any] = {"target_sparsity": 0.6, "num_events": 1, "prune_end": 4, "round_to": 4}
    again = apt.APTrainer(
        model=model, args=first.args, train_dataset=Rows(), **goal, **(settings if not patched else {})
    )
    with pytest.raises(ValueError, match=line):
        again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
    with pytest.raises(ValueError, match=r"has been through 1 events already.*patch it anew"):
        first.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))


def test_a_teacher_that_was_there_must_be_asked_for_again(tmp_path: Path) -> None:
    settings: dict[str, Any] = {**SHORT, "use_self_distillation": True, "distill_end": 1.0}
    trainer(tmp_path, save_strategy="steps", save_steps=5, **settings).train()
    with pytest.raises(
        ValueError, match="the checkpoint is of a run with a teacher; resume with use_self_distillation=True"
    ):
        trainer(tmp_path, **SHORT).train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))


def test_a_model_of_peft_is_told_what_to_do(arguments: TrainingArguments, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    lora = peft.LoraConfig(target_modules=["query"], task_type="SEQ_CLS")
    model = apt.patch_model(peft.get_peft_model(tiny_model("bert", torch.float32), lora))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    ways = (
        lambda: apt.APTrainer(model=model, args=arguments),
        lambda: apt.Controller(model, optimizer, 5),
        lambda: apt.export_model(model, tmp_path / "small"),
        lambda: apt.summary(model),
    )
    for way in ways:
        with pytest.raises(ValueError, match=r"a model of PEFT.*merge_and_unload\(\).*model\.unload\(\)"):
            way()
    with pytest.raises(ValueError, match="not its name 'bert-base'"):
        apt.APTrainer(model="bert-base", args=arguments)


VOCABULARIES = [
    ("bert", {}),
    ("bert_mlm", {"unit_types": ("head", "neuron", "hidden")}),
    ("llama", {"unit_types": ("head", "neuron", "hidden")}),
    ("llama_gqa", {"unit_types": ("head", "neuron", "hidden")}),
    ("gpt2", {"unit_types": ("head", "neuron", "hidden")}),
    ("t5_gated", {"unit_types": ("head", "neuron", "hidden")}),
    ("llama", {"method": "lora", "target_modules": ["lm_head", "q"]}),
    ("llama_gqa", {"method": "adalora", "target_modules": ["lm_head", "q"]}),
]


@pytest.mark.parametrize(("name", "settings"), VOCABULARIES)
@pytest.mark.parametrize("size", [70, 50])
def test_a_vocabulary_is_resized_after_the_patch(
    name: str, settings: dict[str, Any], size: int, tmp_path: Path
) -> None:
    """As transformers does it before the patch; then it trains, and exports."""
    plain, model = tiny_model(name, torch.float32), tiny_model(name, torch.float32)
    apt.patch_model(model, **settings)
    inputs: dict[str, Any] = {"input_ids": torch.arange(40, 48)[None]}
    if name.startswith("t5"):
        inputs["decoder_input_ids"] = inputs["input_ids"]
    for each in (plain, model):
        torch.manual_seed(0)
        each.resize_token_embeddings(size, mean_resizing=False)
    with torch.no_grad():
        ours, theirs = model(**inputs).logits, plain(**inputs).logits
    assert ours.shape == theirs.shape
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    trained = [p for p in model.parameters() if p.requires_grad]
    model(**inputs).logits.square().mean().backward()
    torch.optim.SGD(trained, lr=0.1).step()
    apt.export_model(model, tmp_path / "small")
    small = apt.load_model(tmp_path / "small")
    with torch.no_grad():
        torch.testing.assert_close(small(**inputs).logits, model(**inputs).logits, rtol=1e-4, atol=1e-4)
    apt.unpatch_model(model).resize_token_embeddings(size + 1)


def test_a_tokenizer_of_another_model_is_told() -> None:
    rows = SimpleNamespace(columns={"input_ids": [[1, 2], [], [3, 60]]})
    data: Any = SimpleNamespace(train=rows, test=rows, length_setting="data.max_length")
    with pytest.raises(ValueError, match="the tokenizer makes token 60, but the model embeds 60 tokens; put the"):
        check_lengths(data, tiny_model("bert"))
    data.train.columns["input_ids"][2][1] = 59
    check_lengths(data, tiny_model("bert"))
