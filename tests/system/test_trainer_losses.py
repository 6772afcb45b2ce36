"""A loss of the user's own, overridden or handed in, keeps all that a run adds to a loss."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_models import tiny_batch, tiny_model
from tiny_trainer import EVENTS, Rows, decisions, losses, trainer
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

import apt
from apt.families import anatomy_of
from apt.layers import adapted
from apt.pruning.units import find_units
from apt.training.whole_loss import loss_with

PLAIN = {"target_sparsity": 0.0, "num_events": 0, "max_steps": 4}
TAUGHT = {"use_self_distillation": True, "distill_end": 1.0}
ADALORA = {"method": "adalora", "prune": False, "tinit": 1, "tfinal": 1, "deltaT": 1, "target_r": 1}


class Labelled(Rows):
    """Sentences of which a part of the labels counts, another number in each; of every third none does."""

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = super().__getitem__(index)
        labels = row["labels"].clone()
        labels[1 + index % 3 * 2 :] = -100
        if index % 3 == 0:
            labels[:] = -100
        return {**row, "labels": labels}


def cross_entropy(outputs: Any, labels: Tensor, **how: Any) -> Tensor:
    """The loss of the model itself, written down again."""
    logits = outputs["logits"]
    if logits.dim() == 3:
        logits = logits[:, :-1]
        labels = labels[:, 1:]
    return torch.nn.functional.cross_entropy(logits.flatten(0, -2).float(), labels.flatten(), **how)


class OwnLoss(apt.APTrainer):
    """The documented way to a loss of one's own: nothing of the base is called."""

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **_: Any) -> Any:
        labels = inputs.pop("labels")
        outputs = model(**inputs)
        loss = cross_entropy(outputs, labels)
        return (loss, outputs) if return_outputs else loss


class ScaledLoss(apt.APTrainer):
    """It divides by the items of the whole step, and says so."""

    loss_is_scaled_for_ga = True

    def compute_loss(self, model: Any, inputs: Any, *_: Any, num_items_in_batch: Any = None, **__: Any) -> Any:
        labels = inputs.pop("labels")
        return cross_entropy(model(**inputs), labels, reduction="sum") / num_items_in_batch


def summed(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    return cross_entropy(outputs, labels, reduction="sum") / num_items_in_batch


def same(ours: apt.APTrainer, theirs: apt.APTrainer, rel: float = 0.0) -> None:
    assert list(losses(ours)) == list(losses(theirs))
    assert list(losses(ours).values()) == pytest.approx(list(losses(theirs).values()), rel=rel, abs=0.0)


def trained(folder: Path, name: str, kind: type[apt.APTrainer], **settings: Any) -> Any:
    """Made and trained in one go, as both draw from the random state."""
    ran = trainer(folder / kind.__name__, name, kind=kind, **settings)
    ran.train()
    return ran


@pytest.mark.parametrize("name", ["bert", "llama_gqa"])
def test_an_overridden_loss_keeps_the_teacher(name: str, tmp_path: Path) -> None:
    settings = {"max_steps": 12, **EVENTS, "num_events": 1, "prune_end": 6, **TAUGHT}
    plain, own = trained(tmp_path, name, apt.APTrainer, **settings), trained(tmp_path, name, OwnLoss, **settings)
    assert any(row.get("distill_loss", 0.0) > 0.0 for row in own.state.log_history)
    same(own, plain, rel=1e-5)
    assert [event["prune"] for event in decisions(own)] == [event["prune"] for event in decisions(plain)]


def adalora(folder: Path, kind: type[apt.APTrainer] = apt.APTrainer, **settings: Any) -> Any:
    model = apt.patch_model(tiny_model("llama_gqa", torch.float32), rank=2, **ADALORA)
    return kind(model=model, args=arguments(folder, **settings.pop("args", {})), **settings)


def arguments(folder: Path, **settings: Any) -> TrainingArguments:
    known = {"max_steps": 4, "save_strategy": "no", "learning_rate": 3e-3, "logging_steps": 1, "report_to": "none"}
    return TrainingArguments(str(folder), use_cpu=True, disable_tqdm=True, seed=4, **{**known, **settings})


ONE = {"per_device_train_batch_size": 8}
TWO = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
WAYS: dict[str, tuple[type[apt.APTrainer], dict[str, Any], dict[str, Any]]] = {
    "the model's": (apt.APTrainer, {}, {}),
    "overridden": (OwnLoss, {}, {}),
    "overridden, scaled": (ScaledLoss, {}, {}),
    "a function": (apt.APTrainer, {"compute_loss_func": summed}, {}),
    "label smoothing": (apt.APTrainer, {}, {"label_smoothing_factor": 0.1}),
}


@pytest.mark.parametrize("way", WAYS)
def test_accumulated_micro_batches_are_one_batch_whoever_computes_the_loss(way: str, tmp_path: Path) -> None:
    """AdaLoRA's penalty is added once a step, and each micro-batch weighs as its labels, be there none."""
    kind, settings, args = WAYS[way]
    runs = []
    for name, sizes in (("one", ONE), ("two", TWO)):
        ran = adalora(tmp_path / name, kind, args={**sizes, **args}, train_dataset=Labelled(True), **settings)
        ran.train()
        runs.append(ran)
    same(runs[1], runs[0], rel=1e-4)
    without = Trainer(
        model=apt.patch_model(tiny_model("llama_gqa", torch.float32), rank=2, **ADALORA),
        args=arguments(tmp_path / "without", max_steps=1, **ONE, **args),
        train_dataset=Labelled(True),
    )
    without.train()
    # The penalty of the first step is what differs from the loss that a plain Trainer has.
    model: Any = apt.patch_model(tiny_model("llama_gqa", torch.float32), rank=2, **ADALORA)
    penalty = [
        torch.linalg.matrix_norm(gram - torch.eye(len(gram)))
        for module in model.modules()
        if getattr(module, "delta", None) is not None
        for gram in (module.delta.lora_A @ module.delta.lora_A.T, module.delta.lora_B.T @ module.delta.lora_B)
    ]
    first = losses(runs[0])[1] - without.state.log_history[0]["loss"]
    assert first == pytest.approx(0.5 * torch.stack(penalty).mean().item(), rel=1e-3)


@pytest.mark.parametrize("kind", [apt.APTrainer, OwnLoss])
def test_a_micro_batch_without_labels_is_trained_past(kind: type[apt.APTrainer], tmp_path: Path) -> None:
    """As transformers does it, which divides by the labels of the whole step."""
    rows = [{**Rows(True)[i], "labels": torch.full((8,), -100) if i % 2 else Rows(True)[i]["labels"]} for i in range(8)]
    sizes = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4, "max_steps": 2, "logging_steps": 1}

    def model() -> Any:
        return apt.patch_model(tiny_model("llama_gqa", torch.float32), method="lora", rank=2)

    theirs = Trainer(model=model(), args=arguments(tmp_path / "theirs", **sizes), train_dataset=rows)
    ours = kind(model=model(), args=arguments(tmp_path / "ours", **sizes), train_dataset=rows)
    for ran in (theirs, ours):
        ran.train()
    same(ours, theirs, rel=1e-5)


def test_an_overridden_loss_that_is_no_number_stops_the_run(tmp_path: Path) -> None:
    class NoNumber(OwnLoss):
        def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            loss: Tensor = super().compute_loss(model, inputs, *args, **kwargs)
            return loss * float("nan") if self.state.global_step == 2 else loss

    ran = trainer(tmp_path, kind=NoNumber, **PLAIN)
    with pytest.raises(FloatingPointError, match=r"the loss is nan at step 3; .*; saved as .*checkpoint-2$"):
        ran.train()


def test_a_loss_set_on_the_object_is_taken_and_stays_there(tmp_path: Path) -> None:
    plain = trained(tmp_path, "bert", apt.APTrainer, **PLAIN)
    own = trainer(tmp_path / "own", **PLAIN)
    method = own.compute_loss

    def doubled(*args: Any, **kwargs: Any) -> Any:
        return 2.0 * method(*args, **kwargs)

    own.compute_loss = doubled
    own.train()
    assert losses(own)[1] == pytest.approx(2.0 * losses(plain)[1], rel=1e-6)
    assert own.compute_loss is doubled
    assert "compute_loss" not in vars(plain)


def test_a_training_step_that_leaves_the_base_out_is_told(tmp_path: Path) -> None:
    class Alone(apt.APTrainer):
        def training_step(self, model: Any, inputs: Any, *_: Any, **__: Any) -> Tensor:
            loss: Tensor = model(**self._prepare_inputs(inputs))["loss"]
            loss.backward()
            return loss.detach()

    with pytest.raises(ValueError, match=r"Alone\.training_step does not call that of its base"):
        trainer(tmp_path, kind=Alone, **PLAIN).train()


def test_a_pass_of_a_compiled_model_is_seen_from_outside() -> None:
    """What is watched is the wrapper that is called, so no hook gets into the graph, and one graph does."""

    class Toy(nn.Linear):
        def forward(self, input_ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
            logits = super().forward(input_ids)
            return {"logits": logits, "loss": (logits - labels).square().mean()}

    model, seen = torch.compile(Toy(3, 2), backend="eager"), []
    owner: Any = SimpleNamespace(compute_loss=lambda model, inputs: model(**inputs)["loss"])
    inputs = {"input_ids": torch.ones(4, 3), "labels": torch.zeros(4, 2)}
    torch._dynamo.utils.counters.clear()
    for _ in range(3):
        with loss_with(owner, lambda loss, passed: seen.append(passed) or loss):
            loss = owner.compute_loss(model, dict(inputs))
        assert seen[-1].batch.keys() == inputs.keys()
        assert seen[-1].named(loss).keys() == {"logits", "loss"}
    with torch.no_grad(), loss_with(owner, lambda loss, passed: seen.append(passed) or loss):
        owner.compute_loss(model, dict(inputs))
    assert not seen[-1].batch  # nothing is learnt from a pass without gradients
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2


def taken_out(folder: Path, model: Any, batch: dict[str, Tensor], trains: bool) -> None:
    """Let a trainer smooth the labels of a batch, which the model is then not given, and go backward if it trains."""
    ran = apt.APTrainer(model=model, args=arguments(folder, label_smoothing_factor=0.1), train_dataset=Rows(True))
    if not trains:
        ran.prediction_step(model, dict(batch), False)
        return
    with loss_with(ran, lambda loss, seen: loss):
        ran.compute_loss(model, dict(batch)).backward()


@pytest.mark.parametrize("trains", [True, False])
def test_gates_know_the_prompt_where_the_loss_takes_the_labels(trains: bool, tmp_path: Path) -> None:
    batch = tiny_batch("llama_gqa")
    batch["labels"][:, :4] = -100
    model: Any = apt.patch_model(tiny_model("llama_gqa", torch.float32), method="dynacsg", rank=2)
    passes = next(module.row_gate.context.passes for _, module in adapted(model) if module.row_gate is not None)
    model(**batch)
    prompts = passes.known.examples.context
    model(**{name: value for name, value in batch.items() if name != "labels"})
    assert not torch.equal(passes.known.examples.context, prompts)
    taken_out(tmp_path, model, batch, trains)
    assert torch.equal(passes.known.examples.context, prompts)


def test_tokens_of_t5_are_those_with_a_label_where_the_loss_takes_them(tmp_path: Path) -> None:
    """Where no end token tells that a text is one token short, its ids alone count one too many."""
    batch = tiny_batch("t5")
    batch["labels"].clamp_(min=2)
    batch["labels"][1:, -1] = -100
    model: Any = apt.patch_model(tiny_model("t5", torch.float32), rank=2)
    batch["decoder_input_ids"] = model.prepare_decoder_input_ids_from_labels(labels=batch["labels"])
    groups = [group for group in find_units(anatomy_of(model)) if group.part.layer.stack.name == "decoder"]
    for group in groups:
        group.mask.collecting = True
    taken_out(tmp_path, model.train(), batch, trains=True)
    assert {int(group.mask.count) for group in groups if group.part.name.endswith("neurons")} == {
        int((batch["labels"] != -100).sum())
    }
