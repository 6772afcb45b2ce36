"""The teacher: the student's frozen weights at full widths, with the adapters and the head of an earlier moment."""

import inspect
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from apt.families import Anatomy, Attention, EmptyAttention
from apt.layers import TRANSFORM, APTAdapter, adapted
from apt.layers.layer_mask import NAME as MASK
from apt.layers.layer_mask import layer_mask
from apt.layers.passes import labels_known
from apt.pruning.dimensions import HiddenGroup, hidden_group

LABELS = ("labels", "label", "label_ids", "start_positions", "end_positions")


def outer_axes(group: HiddenGroup) -> dict[str, list[int]]:
    """Which axes of the parameters outside the layers run over the stream: full name -> axes."""
    axes: dict[str, list[int]] = {}
    for part in group.parts:
        if part.layer is None:
            for attribute, axis in part.held:
                axes.setdefault(f"{part.name}.{attribute}", []).append(axis)
    return axes


class Teacher:
    """A snapshot of a student, run on the student's own modules.

    It costs the adapters and the trained head once more; everything else is shared. Surgery with `keep_tail` leaves the
    shared weights whole, in a new order, and keeps the snapshot's adapters in that order. `snapshot` is to be taken
    where no tails are (`free_tails`): its widths are those that the student has then.

    Args:
        anatomy: of a model patched by `apt.patch_model`.
    """

    def __init__(self, anatomy: Anatomy) -> None:
        self.anatomy = anatomy
        self.model = anatomy.model
        self.head: dict[str, Tensor] = {}  # trained parameters that are no adapters, by their full name
        self.counts: dict[str, dict[str, int]] = {}  # attention -> what its forward reads of its number of heads
        self.shapes: dict[str, tuple[int, ...]] = {}  # of every frozen weight

    @torch.no_grad()
    def snapshot(self) -> None:
        """Take the student as it is now."""
        inside: set[int] = set()
        for _, linear in adapted(self.model):
            linear.drop_teacher()
            if linear.rank:
                linear.teacher_A, linear.teacher_B = (factor.detach().clone() for factor in linear.factors())
            inside |= {id(parameter) for parameter in linear.parameters()}
        self.head = {
            name: parameter.detach().clone()
            for name, parameter in self.model.named_parameters()
            if parameter.requires_grad and id(parameter) not in inside and not name.startswith(f"{TRANSFORM}.")
        }
        self.counts = {
            part.name: part.attention.head_counts(part.module)
            for part in self.anatomy.attentions
            if not isinstance(part.module, EmptyAttention)
        }
        self.shapes = {name: tuple(linear.weight.shape) for name, linear in adapted(self.model)}

    def drop(self) -> None:
        """Forget the snapshot; the tails stay until `free_tails`."""
        for _, linear in self._linears():
            linear.drop_teacher()
        self.head = {}
        self.counts = {}
        self.shapes = {}

    def _linears(self) -> Iterator[tuple[str, APTAdapter]]:
        """Every adapted linear under the name it had in the dense model, those that stand aside too."""
        with ExitStack() as stack:
            self._put_back(stack)
            found = list(adapted(self.model))
        yield from found

    def _put_back(self, stack: ExitStack) -> None:
        """Put layers and attentions that stand aside back into their places, with the head counts they had."""
        for layer in self.anatomy.layers:
            if layer.gone and layer.whole is not None:
                parent, _, child = layer.path.rpartition(".")
                _swap(stack, self.model.get_submodule(parent), child, layer.whole)
            if layer_mask(layer.module) is not None:
                _swap(stack, layer.module, MASK, None)
        for part in self.anatomy.attentions:
            table = part.attention
            empty = part.module
            if isinstance(empty, EmptyAttention) and empty.dense:
                parent, _, child = table.module.rpartition(".")
                _swap(stack, part.layer.module.get_submodule(parent), child, empty.dense[0])
            dense = part.module
            for key, value in self.counts.get(part.name, {}).items():
                if (now := table.head_counts(dense)[key]) != value:
                    stack.callback(table.set_count, dense, key, now)
                    table.set_count(dense, key, value)

    @contextmanager
    def _dense(self) -> Iterator[None]:
        """The model as the teacher has it, in evaluation mode; afterwards every module is as it was."""
        with ExitStack() as stack:
            self._put_back(stack)
            for name, linear in adapted(self.model):
                self._check(name, linear)
                rows, columns = linear.weight.shape
                _swap(stack, linear, "n_out", rows)
                _swap(stack, linear, "n_in", columns)
                for own, value in (("weight", linear.teacher_weight), ("bias", linear.teacher_bias)):
                    if value is not None:
                        _swap(stack, linear, own, _frozen(value))
                if linear.unit_mask is not None:
                    _swap(stack, linear, "unit_mask", None)
                if linear.delta is not None:
                    _swap(stack, linear, "delta", None)
                for ours, theirs in (("lora_A", linear.teacher_A), ("lora_B", linear.teacher_B)):
                    if theirs is not None or getattr(linear, ours) is not None:
                        _swap(stack, linear, ours, None if theirs is None else _frozen(theirs))
            group = hidden_group(self.anatomy)
            if group is not None:
                _swap(stack, group.mask, "dense", True)
            axes = {} if group is None else outer_axes(group)
            for name, value in self.head.items():
                owner, _, leaf = name.rpartition(".")
                if group is not None:  # in the order of the weights before it
                    for axis in axes.get(name, ()):
                        value = value.index_select(axis, group.mask.order)
                _swap(stack, self.model.get_submodule(owner), leaf, _frozen(value))
            for module in self.model.modules():
                if module.training:
                    _swap(stack, module, "training", False)
            yield

    def _check(self, name: str, linear: APTAdapter) -> None:
        if self.shapes[name] != tuple(linear.weight.shape):
            raise ValueError(
                f"distillation: {name} was {list(self.shapes[name])} when the teacher was taken and is "
                f"{list(linear.weight.shape)} now; prune with keep_tail=True while there is a teacher"
            )

    @torch.no_grad()
    def forward(self, batch: Mapping[str, Any]) -> Any:
        """The output of the teacher on a batch, its labels left out. Neither the student nor a random state changes."""
        model: Any = self.model
        inputs = {name: value for name, value in batch.items() if name not in LABELS}
        make = getattr(model, "prepare_decoder_input_ids_from_labels", None)
        if make is not None and "decoder_input_ids" not in inputs and batch.get("labels") is not None:
            inputs["decoder_input_ids"] = make(labels=batch["labels"])
        if "use_cache" in inspect.signature(model.forward).parameters:
            inputs["use_cache"] = False  # nothing is generated
        with self._dense(), labels_known(model, batch.get("labels")):
            return model(**inputs, return_dict=True)

    def state_dict(self) -> dict[str, Tensor]:
        """Adapters and head of the snapshot, and what the model's own state lacks.

        That is weights from before a repair, and what stands aside.
        """
        state = {f"head/{name}": value for name, value in self.head.items()}
        for name, linear in self._linears():
            if linear.teacher_A is not None and linear.teacher_B is not None:
                state |= {f"A/{name}": linear.teacher_A, f"B/{name}": linear.teacher_B}
            for kind, value in (("weight", linear.teacher_weight), ("bias", linear.teacher_bias)):
                if value is not None:
                    state[f"{kind}/{name}"] = value
        for name, module in self._aside():
            state |= {f"aside/{name}/{key}": value for key, value in module.state_dict().items()}
        return {name: value.detach().clone() for name, value in state.items()}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take up a snapshot; the events since it have been replayed on the model with `keep_tail`."""
        linears = dict(self._linears())
        aside = dict(self._aside())
        own = dict(self.model.named_parameters())
        self.head = {}
        for name, value in state.items():
            kind, _, place = name.partition("/")
            if kind == "head":
                self.head[place] = value.to(own[place].device)
            elif kind == "aside":
                module, _, key = place.partition("/")
                aside[module].get_parameter(key).data.copy_(value)
            else:
                setattr(linears[place], f"teacher_{kind}", value.to(linears[place].weight.device))
        self.shapes = {name: tuple(linear.weight.shape) for name, linear in linears.items()}

    def _aside(self) -> list[tuple[str, nn.Module]]:
        """What stands aside, by the name of its layer or part."""
        found: list[tuple[str, nn.Module]] = []
        for layer in self.anatomy.layers:
            whole = layer.whole
            if whole is None:
                continue
            found += [(layer.name, whole)] * layer.gone
            for table in layer.stack.parts:
                empty = whole.get_submodule(table.module) if isinstance(table, Attention) else None
                if isinstance(empty, EmptyAttention) and empty.dense:
                    found.append((f"{layer.name}.{table.units}", empty.dense[0]))
        return found


def _swap(stack: ExitStack, owner: Any, name: str, value: Any) -> None:
    """Set an attribute until the stack unwinds."""
    stack.callback(setattr, owner, name, getattr(owner, name))
    setattr(owner, name, value)


def _frozen(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)
