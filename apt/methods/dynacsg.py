"""Dynamic conditional spectral gates: one small network opens singular directions, example by example."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from apt.families import Anatomy, Layer, PlacedPart
from apt.families.linears import features
from apt.layers import Delta, adapted
from apt.layers.around import arguments, wrap
from apt.layers.hidden import HiddenMask
from apt.layers.own_methods import put_method, take_method
from apt.layers.passes import place_passes
from apt.methods.config import MethodConfig
from apt.methods.context import CaptureHook, ContextGate, GateContext, PositionHook, ReadExamples, generate
from apt.methods.hypernetwork import HyperNetwork
from apt.methods.svd import singular_triplets

NAME = "apt_gates"  # of the network in the model


class DynamicSpectral(Delta):
    """``W = U S V^T`` with ``S_i (1 + alpha g_i)`` for the r_b largest, g in {0, 1} of each example.

    ``A = V^T``, ``B = U``, ``g = alpha S`` are frozen; the adapted linear multiplies by the gates of its `row_gate`.
    """

    U: Tensor  # [n_out, r_b]
    S: Tensor  # [r_b]
    Vh: Tensor  # [r_b, n_in]

    def __init__(self, u: Tensor, s: Tensor, vh: Tensor, alpha: float) -> None:
        super().__init__()
        for name, tensor in (("U", u), ("S", s), ("Vh", vh)):
            self.register_buffer(name, tensor)
        self.alpha = alpha
        self.context: GateContext | None = None  # that gates it

    @classmethod
    def of(cls, weight: Tensor, rank: int, settings: MethodConfig) -> "DynamicSpectral":
        """Take the largest directions of a weight ``[O, I]``, all where it has fewer."""
        count = min(settings.num_directions or rank, *weight.shape)
        return cls(*singular_triplets(weight, count, settings.svd_cache), settings.gate_alpha)

    @property
    def rank(self) -> int:
        return self.S.numel()

    @property
    def num_active(self) -> float:
        """Gates that an example opens, the mean over those seen in evaluation since the last step of training."""
        return 0.0 if self.context is None else self.context.num_active(self.rank)

    def factors(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.Vh, self.U, self.alpha * self.S

    def side(self, axis: str) -> list[Tensor]:
        return [self.U] if axis == "out" else [self.Vh]

    def extra_repr(self) -> str:
        return f"directions={self.rank}, alpha={self.alpha}"


def expected_gates(deltas: Sequence[Delta], settings: MethodConfig) -> Tensor | None:
    """``l0_weight`` times the number of gates that an example is expected to open, the mean over the last batch."""
    context = next((delta.context for delta in deltas if isinstance(delta, DynamicSpectral)), None)
    logits = None if context is None or not settings.l0_weight else context.logits()
    return None if logits is None else settings.l0_weight * torch.sigmoid(logits).sum(-1).mean()


def layers_above(anatomy: Anatomy, settings: MethodConfig) -> list[Layer]:
    """The layers whose linears have gates: those after layer l of the first stack, and every other stack.

    Raises:
        ValueError: there is none.
    """
    layers = anatomy.layers
    last = settings.context_layer
    first = [layer for layer in layers if layer.stack == layers[0].stack]
    if last >= len(first) or len(layers) == last + 1:
        highest = len(first) - 2 if len(first) == len(layers) else len(first) - 1
        raise ValueError(
            f"methods: context_layer {last} leaves no layer above it for gates; the model has {len(first)} layers, so "
            f"use at most {highest}"
        )
    return layers[last + 1 :]


def place_row_gates(anatomy: Anatomy, settings: MethodConfig, hidden: HiddenMask | None = None) -> list[Any]:
    """Put the network, the reading of contexts and the gates into a model whose linears are adapted already.

    Returns:
        Handles of the hooks.
    """
    model = anatomy.model
    linears = [linear for _, linear in adapted(model) if isinstance(linear.delta, DynamicSpectral)]
    layers = anatomy.layers
    count = max((linear.rank for linear in linears), default=1)
    hyper = HyperNetwork(_width(anatomy.parts), count, settings.hyper_params, linears[0].weight)
    model.add_module(NAME, hyper.train(model.training))
    classifies = type(model).__name__.endswith("SequenceClassification")  # it answers once all was read
    modules = [layer.module for layer in layers]
    passes = place_passes(anatomy)
    first = anatomy.stacks[0]
    prompts = anatomy.family.decoder and not classifies
    context = GateContext(hyper, settings, modules, passes, stack=first.name, prompts=prompts, hidden=hidden)
    for linear in linears:
        linear.row_gate = ContextGate(context)
        linear.delta.context = context  # type: ignore[union-attr]
    hooks: list[Any] = [modules[settings.context_layer].register_forward_hook(CaptureHook(context))]
    for stack in anatomy.stacks:
        reader = anatomy.reader(stack)
        hooks.append(wrap(reader, ReadExamples(arguments(reader), passes)))
    for part in anatomy.attentions:
        positions = getattr(part.module, PositionHook.module, None)
        if positions is not None:
            hooks.append(positions.register_forward_hook(PositionHook(context)))
    if context.prompts:
        put_method(model, "generate", generate, context)
    return hooks


def remove_row_gates(model: nn.Module) -> None:
    """Take the network out again; the hooks are the caller's."""
    if hasattr(model, NAME):
        delattr(model, NAME)
    take_method(model, "generate")


def _width(parts: Sequence[PlacedPart]) -> int:
    """Hidden dimensions, from the first linear that reads or writes them."""
    for part in parts:
        for role, linear in part.linears.items():
            return features(linear)[0 if role == part.table.reader else 1]
    raise ValueError("methods: the model has no linear left that reads its hidden dimensions")
