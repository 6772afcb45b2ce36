"""SelfDistiller: the model as it was teaches the model that shrinks (APT, arXiv 2401.12200, section 4.4)."""

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily

from apt.distillation.config import DistillationConfig
from apt.distillation.losses import SPANS, layer_loss, prediction_loss, predictions_of
from apt.distillation.taps import Taps, matching_layers, sample_layers, untap
from apt.distillation.teacher import Teacher
from apt.families import FFN, Attention, Stack, anatomy_of, base_model
from apt.layers import TRANSFORM, LayerTransform
from apt.layers.hidden import HiddenNorm
from apt.layers.passes import passes_of
from apt.pruning.units import find_units

TRANSFORM_SCALE = 2.0  # unitless, of the trainable part of Tr, as of the adapters
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class TeacherOutput:
    """What a teacher says of a batch."""

    predictions: dict[str, Tensor]  # its output by name: logits, or start_logits and end_logits
    layers: dict[int, Tensor]  # hidden states after the sampled layers, ``[B, T, D]``


@dataclass(frozen=True)
class DistillTerms:
    """The two parts of a distillation loss, without a graph."""

    prediction: Tensor
    layer: Tensor


class SelfDistiller:
    """A teacher that shares the student's frozen weights, and the loss that draws the student towards it.

    ``L = w_pred * L_pred + w_layer * L_layer`` with L_pred the tempered KL divergence of the predictions and L_layer
    the sum over sampled layers i of ``MSE(Tr(H_s[phi(i)]), H_t[i])``, both over valid tokens.

    Alone, in a loop of your own::

        distiller = SelfDistiller(model)          # puts Tr into the model: give it to the optimizer too
        distiller.snapshot()                      # the student as it is now becomes the teacher
        for batch in loader:
            output = model(**batch)               # the student first: its layers are caught on the way
            teacher = distiller.forward_teacher(batch)
            loss = mu * distiller.compute_distill_loss(output, teacher, batch) + (1 - mu) * output.loss

    While there is a teacher, prune with ``keep_tail=True``. A `Controller` does all of this by itself.

    Args:
        model: patched by `apt.patch_model` with method "apt".
        layer_mapping_strategy: "nearest" or "cofi"; None is what the config says.
        config: None is the default one.
        seed: draws the layers and the start of Tr, from a generator of the distiller's own.

    Raises:
        ValueError: the model's family is unknown, or it has no prunable layers.
    """

    def __init__(
        self,
        model: nn.Module,
        layer_mapping_strategy: str | None = None,
        config: DistillationConfig | None = None,
        *,
        seed: int = 0,
    ) -> None:
        config = config or DistillationConfig()
        if layer_mapping_strategy is not None:
            config = replace(config, teacher_layer_mapping=layer_mapping_strategy)
        self.model = model
        self.config = config
        self.anatomy = anatomy_of(model)
        self.generator = torch.Generator().manual_seed(seed)
        self.transform = place_transform(model, config, seed)
        self.teacher = Teacher(self.anatomy)
        self.terms: DistillTerms | None = None  # of the latest loss
        layers = self.anatomy.layers
        self._stacks: list[tuple[Stack, range]] = []
        for stack in self.anatomy.stacks:
            places = [place for place, layer in enumerate(layers) if layer.stack == stack]
            self._stacks.append((stack, range(places[0], places[-1] + 1)))
        self._taps = self._new_taps()
        self._names = {layer.name: place for place, layer in enumerate(layers)}
        self._alive: set[int] = set()
        self.sampled: list[int] = []
        self.follow()
        self.draw()
        self.listen(True)

    def _new_taps(self) -> Taps:
        # Of a layer that went the teacher's is listened to.
        layers = [layer.whole or layer.module for layer in self.anatomy.layers]
        return Taps(layers, passes_of(self.anatomy.model))

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_taps": self._taps.listening}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A copy listens to the layers of its own model."""
        self.__dict__.update(state)
        self._taps = self._new_taps()
        self._taps.listening = state["_taps"]
        self._choose_taps()

    def draw(self) -> None:
        """Sample the teacher's layers for the next batch, one from each of `num_teacher_layers` blocks of a stack."""
        blocks = self.config.num_teacher_layers
        generator = self.generator
        with unset_fake_temporarily():  # of a model of fake tensors too the layers are real numbers
            self.sampled = [
                places[layer] for _, places in self._stacks for layer in sample_layers(len(places), blocks, generator)
            ]
        self._choose_taps()

    def follow(self) -> None:
        """Find the layers that still have a head and a neuron. Call it after each pruning event."""
        parts: dict[int, set[type]] = {}
        for group in find_units(self.anatomy):
            layer = group.part.layer
            parts.setdefault(self._names[layer.name], set()).add(type(group.part.table))
        self._alive = {place for place, found in parts.items() if found == {Attention, FFN}}
        self._choose_taps()

    def listen(self, on: bool) -> None:
        """Keep the hidden states of the student's next passes, or, where they are not distilled, none."""
        self._taps.listening = on
        self._taps.seen = {}

    def _choose_taps(self) -> None:
        self._taps.wanted = frozenset(match for place in self.sampled for match in self._matches(place))

    def _matches(self, place: int) -> list[int]:
        """phi: layers of the student, in the same stack, that may learn from a layer of the teacher."""
        places = next(places for _, places in self._stacks if place in places)
        alive = [other for other in sorted(self._alive) if other in places]
        return matching_layers(place, alive, self.config.teacher_layer_mapping)

    def snapshot(self) -> None:
        """Make the student as it stands the teacher, without its masks, at the widths its weights have now."""
        self.teacher.snapshot()

    @property
    def has_teacher(self) -> bool:
        """Whether a snapshot was taken."""
        return bool(self.teacher.shapes)

    def forward_teacher(self, batch: Mapping[str, Any]) -> TeacherOutput:
        """The teacher's predictions and sampled hidden states, under ``no_grad``, in evaluation mode, without labels.

        Afterwards the student, its mode and every random state are what they were. Without a snapshot, the first call
        takes one.

        Args:
            batch: what the student was called with.
        """
        if not self.has_teacher:
            self.snapshot()
        with self._taps.of_teacher(self.sampled) as seen, self._precision():
            predictions = predictions_of(_eager(self.teacher.forward, batch))
        return TeacherOutput(predictions, dict(seen))

    @contextmanager
    def _precision(self) -> Iterator[None]:
        """Autocast as asked for, or as the student had it."""
        device = next(self.model.parameters()).device.type
        enabled, dtype = self._taps.autocast or (torch.is_autocast_enabled(device), torch.get_autocast_dtype(device))
        if self.config.teacher_dtype is not None:
            enabled = True
            dtype = DTYPES[self.config.teacher_dtype]
        with torch.autocast(device, dtype=dtype, enabled=enabled):
            yield

    def compute_distill_loss(
        self, student_outputs: Any, teacher_outputs: TeacherOutput, batch: Mapping[str, Any] | None = None
    ) -> Tensor:
        """``w_pred * L_pred + w_layer * L_layer``; then the layers of the next batch are drawn.

        Args:
            student_outputs: what the model returned for the batch.
            teacher_outputs: of the same batch.
            batch: its ``labels`` say which tokens count (those that are not -100); None counts all that are valid.

        Raises:
            ValueError: the outputs name no predictions, or no pass of the student came before.
        """
        student = predictions_of(student_outputs)
        labels = (batch or {}).get("labels")
        missing = self._taps.wanted - set(self._taps.seen)
        if missing:
            raise ValueError(
                f"distillation: the student did not pass layer {min(missing)} since its last loss; call the model with "
                f"gradients before every loss, and compile it before the controller is made"
            )
        prediction = prediction_loss(
            student,
            teacher_outputs.predictions,
            labels=labels if isinstance(labels, Tensor) else None,
            valid=self._valid_tokens(self._stacks[-1][0]),
            loss_type=getattr(self.model, "loss_type", None),
            problem_type=getattr(getattr(self.model, "config", None), "problem_type", None),
            tau=self.config.tau,
        )
        layer = self._layer_loss(teacher_outputs.layers)
        self.terms = DistillTerms(prediction.detach(), layer.detach())
        self._taps.seen = {}
        self.draw()
        return self._prediction_weight(student) * prediction + self.config.w_layer * layer

    def _layer_loss(self, teacher: Mapping[int, Tensor]) -> Tensor:
        """Summed over the sampled layers of a stack, averaged over stacks."""
        normalize = self.config.normalize_layers
        if normalize is None:
            normalize = any(stack.decoder for stack, _ in self._stacks)
        sums = []
        for stack, places in self._stacks:
            valid = self._valid_tokens(stack)
            errors = []
            for place in (place for place in teacher if place in places):
                found = [
                    layer_loss(self.transform(self._taps.seen[match]), teacher[place], valid, normalize)
                    for match in self._matches(place)
                ]
                errors.append(found[0] if len(found) == 1 else torch.stack(found).min())
            sums.append(torch.stack(errors).sum())
        return torch.stack(sums).mean()

    def _valid_tokens(self, stack: Stack) -> Tensor | None:
        """Those of the pass whose layers were caught."""
        caught = self._taps.caught
        return None if caught is None else caught.valid.get(stack.name)

    def _prediction_weight(self, student: Mapping[str, Tensor]) -> float:
        if self.config.w_pred is not None:
            return self.config.w_pred
        return 0.1 if SPANS[0] in student or student["logits"].dim() == 3 else 1.0

    def drop(self) -> None:
        """End it: no teacher, no taps, no Tr in the model. The optimizer is the caller's to clean."""
        self.teacher.drop()
        self.listen(False)
        release(self.model)

    def draw_state(self) -> dict[str, Tensor]:
        """The sampled layers, and the generator that draws the next ones."""
        return {"draw/sampled": torch.tensor(self.sampled), "draw/generator": self.generator.get_state()}

    def state_dict(self) -> dict[str, Tensor]:
        """Snapshot, sampled layers and generator, as tensors; Tr is in the model's own state."""
        return self.teacher.state_dict() | self.draw_state()

    def load_state_dict(self, state: Mapping[str, Tensor], counts: dict[str, dict[str, int]] | None) -> None:
        """Take up where `state_dict` was made.

        Args:
            state: as it was.
            counts: of its teacher, as `Teacher.counts` has them; None where there was none.
        """
        if counts is not None:
            self.teacher.load_state_dict({k: v for k, v in state.items() if not k.startswith("draw/")})
            self.teacher.counts = counts
        self.generator.set_state(state["draw/generator"].cpu())
        self.sampled = state["draw/sampled"].tolist()
        self.follow()


def place_transform(model: nn.Module, config: DistillationConfig, seed: int = 0) -> LayerTransform:
    """Tr of a model; a new one where it has none. It starts as the identity and always trains."""
    found = getattr(model, TRANSFORM, None)
    if isinstance(found, LayerTransform):
        return found
    width, stored = _widths(model)
    generator = torch.Generator().manual_seed(seed)
    like = next(base_model(model).parameters())
    transform = LayerTransform(width, stored, config.transform_rank, TRANSFORM_SCALE, generator, like)
    setattr(model, TRANSFORM, transform)
    return transform


def _widths(model: nn.Module) -> tuple[int, int]:
    """Hidden dimensions of the student, and of the weights that a teacher shares with it."""
    norm = next((module for module in model.modules() if isinstance(module, HiddenNorm)), None)
    if norm is not None:
        return norm.hidden.num_units, norm.hidden.order.numel()
    config: Any = model.config
    return config.hidden_size, config.hidden_size


def release(model: nn.Module) -> None:
    """Take Tr and the taps out of a model, if it has them."""
    if isinstance(getattr(model, TRANSFORM, None), LayerTransform):
        delattr(model, TRANSFORM)
    for module in model.modules():
        untap(module)


def _eager(function: Any, *arguments: Any) -> Any:
    """Call without compiling: the teacher's shapes would fill the student's caches."""
    if "torch._dynamo" in sys.modules:
        function = torch._dynamo.disable(function)
    return function(*arguments)
