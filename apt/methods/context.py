"""What the gates of an example depend on: its context, read after one layer of a pass and kept for all above it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import apt_kernels
from apt.families import IGNORED
from apt.layers.around import Call, by_name
from apt.layers.hidden import HiddenMask
from apt.layers.passes import Pass, Passes
from apt.layers.weak import WeakModules
from apt.methods.config import MethodConfig
from apt.methods.hypernetwork import HyperNetwork, logistic_noise, open_gates
from apt.process.per_thread import PerThread

EPS = 1e-5  # of the norm of a context
CACHED = "apt_examples"  # name of the examples on a cache of keys and values


@dataclass
class _Examples:
    """What one forward pass leaves for its gates."""

    context: Tensor  # [B, D], without a graph: nothing below it trains
    noise: Tensor | None  # [B, R], in training
    gate: Tensor | None = None  # [B, R], where it was made once for all
    graph: bool = False  # whether that was with gradients on


class _Here(PerThread):
    def __init__(self) -> None:
        self.prompt_length: int | None = None  # while `generate` runs


class GateContext:
    """Reads the context of each example, and makes its gates for every adapted linear above.

    Encoders: the first token after layer l, or the mean over the tokens that are no padding. Causal decoders: the mean
    over the tokens of the prompt, which are those before the first label that counts, or what `generate` was given;
    where nothing marks a prompt, the first token. So no token sees a later one. Contexts and gates belong to the pass
    that they were read in; one that continues a cache keeps those of the pass that began it.

    Args:
        hyper: the network, shared by all layers.
        settings: context, gate_temperature.
        layers: of the model.
        passes: of the model.
        stack: name of that whose tokens are read.
        prompts: whether contexts are of prompts alone.
        hidden: the mask of the hidden dimensions, where they may be pruned.
    """

    def __init__(
        self,
        hyper: HyperNetwork,
        settings: MethodConfig,
        layers: list[nn.Module],
        passes: Passes,
        *,
        stack: str,
        prompts: bool,
        hidden: HiddenMask | None = None,
    ) -> None:
        self.hyper = hyper
        self.settings = settings
        self.layers = WeakModules(layers)  # on which the hooks of it hang
        self.passes = passes
        self.stack = stack
        self.prompts = prompts
        self.hidden = hidden
        self.here = _Here()
        self._forget()

    def _forget(self) -> None:
        self._to_learn: _Examples | None = None  # those of the latest pass with gradients on
        self._opened: tuple[Tensor, int] | None = None  # open gates [R] since the last step of training, of examples

    def __getstate__(self) -> dict[str, Any]:
        """A copy knows no pass, whose tensors have a graph."""
        return {name: value for name, value in vars(self).items() if name not in ("_to_learn", "_opened")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget()

    def capture(self, stream_BSD: Tensor) -> None:
        """Read the contexts from the output of layer l, once a pass: not where it continues or is computed anew."""
        current = self.passes.current
        if current is None:
            if _in_backward():
                return
            current = self.passes.here.latest = Pass()  # of a stack that was called by itself
        if current.examples is not None:
            return
        learns = torch.is_grad_enabled()
        with torch.no_grad(), torch.autocast(stream_BSD.device.type, enabled=False):
            weights_BS = self._weights(stream_BSD, current)
            context_BD = torch.einsum("bs,bsd->bd", weights_BS, stream_BSD.to(weights_BS.dtype))
            context_BD = self._norm(context_BD / weights_BS.sum(1, keepdim=True))
            noise = None
            if self.hyper.training:
                noise = logistic_noise(context_BD.new_empty(len(context_BD), self.hyper.open.out_features))
                self._opened = None
            else:
                opened = (self.hyper(context_BD) > 0).sum(0)
                before = self._opened or (torch.zeros_like(opened), 0)
                self._opened = before[0] + opened, before[1] + len(context_BD)
        current.examples = _Examples(context_BD, noise)
        if learns:
            self._to_learn = current.examples

    def _weights(self, stream: Tensor, current: Pass) -> Tensor:
        """Weights ``[B, S]``: 1 for the tokens in the context of their example, of which it has at least one."""
        shape = stream.shape[:2]
        dtype = self.hyper.read.weight.dtype
        valid = torch.ones(shape, dtype=torch.bool, device=stream.device)
        mask = current.valid.get(self.stack)
        if mask is not None and mask.shape == shape:
            valid = mask.bool()
        first = torch.zeros_like(valid).scatter_(1, valid.int().argmax(1, keepdim=True), True)
        labels = current.labels
        prompt_length = self.here.prompt_length
        chosen = first
        if not self.prompts:
            chosen = valid if self.settings.context == "mean" else first
        elif prompt_length is not None:
            chosen = valid & (torch.arange(shape[1], device=valid.device) < prompt_length)
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
        known = self.passes.known
        examples: _Examples | None = None if known is None else known.examples
        if self.passes.current is None and _in_backward():  # computed anew by what hands no pass on
            examples = self._to_learn
        if examples is None:
            raise ValueError(
                "dynacsg: a layer with gates was called before any example passed the layer that they are read from; "
                "call the whole model"
            )
        graph = torch.is_grad_enabled()
        if examples.gate is not None and examples.graph == graph:
            return examples.gate
        gate = open_gates(self.hyper(examples.context), examples.noise, self.settings.gate_temperature)
        if not (graph and any(getattr(layer, "gradient_checkpointing", False) for layer in self.layers.alive())):
            examples.gate = gate
            examples.graph = graph
        return gate

    def num_active(self, count: int) -> float:
        """How many of the first `count` gates an example opened, the mean over those since the last training step."""
        if self._opened is None:
            return 0.0
        opened, examples = self._opened
        return float(opened[:count].sum()) / max(1, examples)


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
        known = self.context.passes.known
        positions = None if known is None else known.positions
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


class ReadExamples:
    """Around the call of a stack, inside its pass: where that continues another, it has the examples of the other.

    Args:
        names: of the arguments of the stack.
        passes: of the model.
    """

    def __init__(self, names: list[str], passes: Passes) -> None:
        self.names = names
        self.passes = passes

    def __call__(self, call: Call, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        cache = by_name(self.names, args, kwargs).get("past_key_values")
        here = self.passes.here
        current = here.current
        assert current is not None
        if cache is not None and int(cache.get_seq_length()) > 0:
            latest = None if here.latest is None else here.latest.examples
            current.examples = getattr(cache, CACHED, latest)
        output = call(*args, **kwargs)
        if cache is None:
            cache = getattr(output, "past_key_values", None)
        if cache is not None:
            setattr(cache, CACHED, current.examples)
        return output


class PositionHook:
    """Forward hook of the dropout by which an attention hands relative positions to its own query and key."""

    module = "pos_dropout"

    def __init__(self, context: GateContext) -> None:
        self.context = context

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        known = self.context.passes.known
        if known is not None:
            known.positions = output


class CaptureHook:
    """Forward hook of the context layer l: hands its output to the context."""

    def __init__(self, context: GateContext) -> None:
        self.context = context

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self.context.capture(output[0] if isinstance(output, tuple) else output)


def generate(model: nn.Module, plain: Callable[..., Any], context: GateContext, *args: Any, **kwargs: Any) -> Any:
    """Generate as the class of the model does; what it is given is marked as the prompt."""
    given = [*args[:1], *(kwargs.get(name) for name in ("inputs", "input_ids", "inputs_embeds"))]
    prompt = next((tensor for tensor in given if isinstance(tensor, Tensor)), None)
    here = context.here
    here.prompt_length = 1 if prompt is None else prompt.shape[1]
    try:
        return plain(*args, **kwargs)
    finally:
        here.prompt_length = None
