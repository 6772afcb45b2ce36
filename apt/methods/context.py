"""What the gates of an example depend on: its context, read after one layer of a pass and kept for all above it."""

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import apt_kernels
from apt.families import IGNORED
from apt.layers.hidden import HiddenMask
from apt.methods.config import MethodConfig
from apt.methods.hypernetwork import HyperNetwork, logistic_noise, open_gates

EPS = 1e-5  # of the norm of a context


@dataclass
class _Examples:
    """What one forward pass leaves for its gates."""

    context: Tensor  # [B, D], without a graph: nothing below it trains
    noise: Tensor | None  # [B, R], in training
    gate: Tensor | None = None  # [B, R], where it was made once for all
    graph: bool = False  # whether that was with gradients on


class GateContext:
    """Reads the context of each example, and makes its gates for every adapted linear above.

    Encoders: the first token after layer l, or the mean over the tokens that are no padding. Causal decoders: the mean
    over the tokens of the prompt, which are those before the first label that counts, or what `generate` was given;
    where nothing marks a prompt, the first token. So no token sees a later one. A pass that continues a cache keeps the
    gates of the pass that began it.

    Args:
        hyper: the network, shared by all layers.
        settings: context, gate_temperature.
        layers: of the model.
        prompts: whether contexts are of prompts alone.
        hidden: the mask of the hidden dimensions, where they may be pruned.
    """

    def __init__(
        self,
        hyper: HyperNetwork,
        settings: MethodConfig,
        layers: list[nn.Module],
        *,
        prompts: bool,
        hidden: HiddenMask | None = None,
    ) -> None:
        self.hyper = hyper
        self.settings = settings
        self.layers = layers
        self.prompts = prompts
        self.hidden = hidden
        self._forget()

    def _forget(self) -> None:
        self.prompt_length: int | None = None  # while `generate` runs
        self.valid: Tensor | None = None  # [B, S] of the pass in flight, 1 real, 0 padding
        self.labels: Tensor | None = None  # of it
        self.positions: Tensor | None = None  # relative positions of its attention, which belong to no example
        self.continues = False  # whether it continues a cache
        self._latest: _Examples | None = None
        self._to_learn: _Examples | None = None  # the latest with gradients on: a recomputed layer is of that pass
        self._opened: Tensor | None = None  # [R], open gates since the last step of training
        self._count = 0  # of examples since then

    def __getstate__(self) -> dict[str, Any]:
        """A copy knows no pass, whose tensors have a graph."""
        return {name: getattr(self, name) for name in ("hyper", "settings", "layers", "prompts", "hidden")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget()

    def capture(self, stream_BSD: Tensor) -> None:
        """Read the contexts from the output of layer l."""
        labels = self.labels
        self.labels = None
        if self.continues or _in_backward():
            return
        learns = torch.is_grad_enabled()
        with torch.no_grad(), torch.autocast(stream_BSD.device.type, enabled=False):
            weights_BS = self._weights(stream_BSD, labels)
            context_BD = torch.einsum("bs,bsd->bd", weights_BS, stream_BSD.to(weights_BS.dtype))
            context_BD = self._norm(context_BD / weights_BS.sum(1, keepdim=True))
            noise = None
            if self.hyper.training:
                noise = logistic_noise(context_BD.new_empty(len(context_BD), self.hyper.open.out_features))
                self._opened = None
                self._count = 0
            else:
                opened = (self.hyper(context_BD) > 0).sum(0)
                self._opened = opened if self._opened is None else self._opened + opened
                self._count += len(context_BD)
        self._latest = _Examples(context_BD, noise)
        if learns:
            self._to_learn = self._latest

    def _weights(self, stream: Tensor, labels: Tensor | None) -> Tensor:
        """Weights ``[B, S]``: 1 for the tokens in the context of their example, of which it has at least one."""
        shape = stream.shape[:2]
        dtype = self.hyper.read.weight.dtype
        valid = torch.ones(shape, dtype=torch.bool, device=stream.device)
        if self.valid is not None and self.valid.shape == shape:
            valid = self.valid.bool()
        first = torch.zeros_like(valid).scatter_(1, valid.int().argmax(1, keepdim=True), True)
        chosen = first
        if not self.prompts:
            chosen = valid if self.settings.context == "mean" else first
        elif self.prompt_length is not None:
            chosen = valid & (torch.arange(shape[1], device=valid.device) < self.prompt_length)
        elif labels is not None and labels.shape == shape:
            chosen = valid & (((labels != IGNORED) & valid).cumsum(1) == 0)
        return torch.where(chosen.any(1, keepdim=True), chosen, first).to(dtype)

    def _norm(self, context_BD: Tensor) -> Tensor:
        """The context at mean 0 and variance 1, so that a model's scale does not matter; the pruned is 0 or gone."""
        mask = None
        if self.hidden is not None and self.hidden.masked and not self.hidden.dense:
            mask = self.hidden.values.to(context_BD)
        weight = context_BD.new_ones(context_BD.shape[-1]) if mask is None else mask
        return apt_kernels.masked_norm(context_BD, weight, None, mask=mask, eps=EPS, kind="layer")

    def logits(self) -> Tensor | None:
        """Logits ``[B, R]`` of the gates of the latest pass with gradients; None before any."""
        return None if self._to_learn is None else self.hyper(self._to_learn.context)

    def gates(self) -> Tensor:
        """The gates of the pass in flight, ``[B, R]``, 0 or 1.

        They are made once a pass; where layers are computed anew in backward, once a linear, so that each computes the
        same whenever it runs.

        Raises:
            ValueError: no pass has begun.
        """
        examples = self._to_learn if _in_backward() else self._latest
        if examples is None:
            raise ValueError(
                "dynacsg: a layer with gates was called before any example passed the layer that they are read from; "
                "call the whole model"
            )
        graph = torch.is_grad_enabled()
        if examples.gate is not None and examples.graph == graph:
            return examples.gate
        gate = open_gates(self.hyper(examples.context), examples.noise, self.settings.gate_temperature)
        if not (graph and any(getattr(layer, "gradient_checkpointing", False) for layer in self.layers)):
            examples.gate = gate
            examples.graph = graph
        return gate

    def num_active(self, count: int) -> float:
        """How many of the first `count` gates an example opened, the mean over those since the last training step."""
        return 0.0 if self._opened is None else float(self._opened[:count].sum()) / max(1, self._count)


class ContextGate:
    """The gates of one linear, in the shape of its input. See `RowGate`."""

    def __init__(self, context: GateContext) -> None:
        self.context = context

    def rows(self, x: Tensor, rank: int) -> Tensor:
        """Gates ``[..., R]`` for an input ``[..., I]``, whose tokens lie example by example.

        Beams and flattened tokens come as so many rows of each example. Relative positions (DeBERTa) belong to no
        example: their gates are shut.

        Raises:
            ValueError: the rows are not those of the examples that the gates are of.
        """
        positions = self.context.positions
        if positions is not None and x.data_ptr() == positions.data_ptr():
            return x.new_zeros(rank)
        gates_BR = self.context.gates()[:, :rank]
        examples = len(gates_BR)
        lead = x.shape[:-1]
        tokens = lead.numel()
        rows = lead[0] if len(lead) > 1 else tokens
        if not examples or rows % examples:
            raise ValueError(
                f"dynacsg: the gates are of {examples} examples, but a layer got an input of {list(x.shape)}; begin a "
                f"batch with a pass through the whole model"
            )
        return gates_BR.repeat_interleave(tokens // examples, 0).reshape(*lead, rank)


def _in_backward() -> bool:
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


class _Hook:
    """A forward pre-hook that reads arguments by name, however they were given."""

    def __init__(self, module: nn.Module, context: GateContext) -> None:
        self.names = list(inspect.signature(module.forward).parameters)
        self.context = context

    def given(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        return {**dict(zip(self.names, args, strict=False)), **kwargs}


class LabelHook(_Hook):
    """Forward pre-hook of the whole model: hands the labels, which say where a prompt ends, to the context."""

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        labels = self.given(args, kwargs).get("labels")
        if labels is not None:
            self.context.labels = labels


class InputHook(_Hook):
    """Forward pre-hook of the base model or its encoder: tells padding, and whether a cache is continued."""

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = self.given(args, kwargs)
        mask = given.get("attention_mask")
        cache = given.get("past_key_values")
        self.context.valid = mask if isinstance(mask, Tensor) and mask.dim() == 2 else None
        self.context.continues = cache is not None and int(cache.get_seq_length()) > 0


class PositionHook:
    """Forward hook of the dropout by which an attention hands relative positions to its own query and key."""

    module = "pos_dropout"

    def __init__(self, context: GateContext) -> None:
        self.context = context

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        self.context.positions = output


class CaptureHook:
    """Forward hook of the context layer l: hands its output to the context."""

    def __init__(self, context: GateContext) -> None:
        self.context = context

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self.context.capture(output[0] if isinstance(output, tuple) else output)


class Generate:
    """A model's own `generate`, which marks what it is given as the prompt."""

    def __init__(self, model: nn.Module, context: GateContext) -> None:
        self.model = model
        self.context = context

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        given = [*args[:1], *(kwargs.get(name) for name in ("inputs", "input_ids", "inputs_embeds"))]
        prompt = next((tensor for tensor in given if isinstance(tensor, Tensor)), None)
        self.context.prompt_length = 1 if prompt is None else prompt.shape[1]
        try:
            model: Any = self.model
            return type(model).generate(model, *args, **kwargs)
        finally:
            self.context.prompt_length = None
