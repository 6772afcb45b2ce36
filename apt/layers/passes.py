"""What a forward pass knows of its tokens. It belongs to that pass, also when layers are computed anew in backward.

A pass begins where the ids and the mask of a stack come in: in the innermost module that embeds tokens, whoever calls
that. It is current in its thread until that module returns. Gradient checkpointing makes the pass of a layer current
again for as long as it computes that layer anew.
"""

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from apt.families import IGNORED, Anatomy, Stack
from apt.layers.around import Call, arguments, around_of, by_name, unwrap, wrap
from apt.layers.tokens import expected_tokens, real_tokens
from apt.process.per_thread import PerThread

CHECKPOINT = "_gradient_checkpointing_func"  # what transformers calls the function that computes a layer anew


class Pass:
    """What one forward pass of a stack knows; of a decoder also what that of its encoder knew."""

    def __init__(self) -> None:
        self.valid: dict[str, Tensor | None] = {}  # stack -> [B, T], 1 real, 0 padding; None: all are real
        self.labels: Tensor | None = None  # of the caller
        self.examples: Any = None  # that gates of the example were read from
        self.positions: Tensor | None = None  # relative ones, as an attention made them

    def after(self, other: "Pass | None") -> "Pass":
        """The pass of a decoder, with what that of the encoder before it knew."""
        if other is not None:
            self.valid = dict(other.valid)
            self.examples = other.examples
        return self


class _Here(PerThread):
    def __init__(self) -> None:
        self.current: Pass | None = None
        self.latest: Pass | None = None  # the last that came to its end
        self.labels: Tensor | None = None  # of the call in flight
        self.counting = False  # whether tokens are counted though no gradient is asked for


class Passes:
    """The passes of one model, of each thread its own."""

    def __init__(self) -> None:
        self.here = _Here()

    @property
    def current(self) -> Pass | None:
        """The pass in flight; None between passes."""
        return self.here.current

    @property
    def known(self) -> Pass | None:
        """The pass in flight, or else the last of this thread: a head is called when that of its stack is over."""
        here = self.here
        return here.latest if here.current is None else here.current

    def run(self, of: Pass | None, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call a function as a part of a pass."""
        here = self.here
        before = here.current
        here.current = of
        try:
            return function(*args, **kwargs)
        finally:
            here.current = before

    @contextmanager
    def labelled(self, labels: Tensor | None) -> Iterator[None]:
        """Let the passes inside know the labels, which they are not given."""
        before = self.here.labels
        self.here.labels = labels
        try:
            yield
        finally:
            self.here.labels = before

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Let the passes inside know their tokens, also where no gradient is asked for."""
        before = self.here.counting
        self.here.counting = True
        try:
            yield
        finally:
            self.here.counting = before


class ValidTokens:
    """The padding mask of the pass in flight, for all masks of one stack: ``[B, T]``, 1 real, 0 padding.

    Args:
        passes: of the model; None has no pass, so that all tokens are real.
        stack: its name.
    """

    def __init__(self, passes: Passes | None = None, stack: str = "layers") -> None:
        self.passes = passes
        self.stack = stack

    @property
    def mask(self) -> Tensor | None:
        """The mask itself; None where all tokens are real."""
        known = None if self.passes is None else self.passes.known
        return None if known is None else known.valid.get(self.stack)

    def of(self, h: Tensor) -> Tensor | None:
        """The mask in the leading shape of h, which some layers flatten (OPT's FFN); None where h is of other tokens.

        A pooler reads one token of each row, which is never padding; relative positions are no tokens at all.
        """
        mask = self.mask
        if mask is None or mask.numel() * h.shape[-1] != h.numel():
            return None
        return mask.reshape(h.shape[:-1])


class ReadLabels:
    """Around the whole model: tells the passes inside its labels."""

    def __init__(self, names: list[str], passes: Passes) -> None:
        self.names = names
        self.passes = passes

    def __call__(self, call: Call, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        labels = by_name(self.names, args, kwargs).get("labels")
        if labels is None:
            return call(*args, **kwargs)
        here = self.passes.here
        before = here.labels
        here.labels = labels
        try:
            return call(*args, **kwargs)
        finally:
            here.labels = before


class ReadPass:
    """Around the module that embeds the tokens of a stack: a call of it is a pass.

    Args:
        names: of the arguments of that module.
        stack: whose tokens they are.
        passes: of the model.
        behind: whether it is a decoder that reads an encoder.
        expects: whether its tokens are there to say the next one, which tells padding where no mask does.

    Raises:
        ValueError: it is a replica of `DataParallel`.
    """

    def __init__(self, names: list[str], stack: Stack, passes: Passes, *, behind: bool, expects: bool) -> None:
        self.names = names
        self.stack = stack
        self.passes = passes
        self.behind = behind
        self.expects = expects

    def __call__(self, call: Call, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        refuse_replica(module)
        carry_passes(module, self.passes)
        here = self.passes.here
        new = Pass().after(here.latest) if self.behind else Pass()
        new.labels = here.labels
        given = by_name(self.names, args, kwargs)
        new.valid[self.stack.name] = self._valid(given, new.labels, module)
        before = here.current
        here.current = new
        try:
            output = call(*args, **kwargs)
        finally:
            here.current = before
        here.latest = new
        return output

    def _valid(self, given: Mapping[str, Any], labels: Tensor | None, module: Any) -> Tensor | None:
        """Which tokens are real, ``[B, T]``: by their mask, else by the labels of a decoder, else by its ids."""
        ids = given.get("input_ids")
        mask = given.get("attention_mask")
        if mask is not None or not self.behind:
            text = given.get("inputs_embeds") if ids is None else ids
            return real_tokens(mask, text.shape[1]) if isinstance(text, Tensor) else None
        if not (torch.is_grad_enabled() or self.passes.here.counting):  # nothing is collected
            return None
        if self.expects and labels is not None and (ids is None or labels.shape == ids.shape):
            return labels != IGNORED
        config = module.config
        return None if ids is None else expected_tokens(ids, config.pad_token_id, config.eos_token_id, self.expects)


def spread(kind: str) -> str:
    """What is told of a model that a class of torch spreads over devices."""
    return f"this model is in {kind}; this version trains on one device: give model.module, unwrapped"


def refuse_replica(module: nn.Module) -> None:
    """Raise ValueError in the copy that `DataParallel` makes for a device: what its masks collect goes with it."""
    if getattr(module, "_is_replica", False):
        raise ValueError(spread("DataParallel"))


class Carried:
    """A checkpointing function that computes a layer anew as a part of the pass in which it was computed first.

    In a compiled graph the mask is a tensor of that graph, forward and backward.
    """

    def __init__(self, checkpoint: Callable[..., Any], passes: Passes) -> None:
        self.checkpoint = checkpoint
        self.passes = passes

    def __call__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if not torch.compiler.is_compiling():
            function = functools.partial(self.passes.run, self.passes.current, function)
        return self.checkpoint(function, *args, **kwargs)


def carry_passes(reader: nn.Module, passes: Passes) -> None:
    """Let the layers below that are checkpointed keep their passes; asked at each pass, as it may begin at any time."""
    if not getattr(reader, "gradient_checkpointing", False) or torch.compiler.is_compiling():
        return
    for module in reader.modules():
        checkpoint = vars(module).get(CHECKPOINT)
        if checkpoint is not None and not isinstance(checkpoint, Carried):
            setattr(module, CHECKPOINT, Carried(checkpoint, passes))


def place_passes(anatomy: Anatomy) -> Passes:
    """The passes of a model; where it has none yet, the wrappers that begin them are put around its calls."""
    found = passes_of(anatomy.model)
    if found is not None:
        return found
    passes = Passes()
    model: Any = anatomy.model
    wrap(model, ReadLabels(arguments(model), passes))
    expects = getattr(model, "get_output_embeddings", lambda: None)() is not None
    for stack in anatomy.stacks:
        reader = anatomy.reader(stack)
        behind = stack != anatomy.stacks[0]
        wrap(reader, ReadPass(arguments(reader), stack, passes, behind=behind, expects=expects))
    return passes


def passes_of(model: nn.Module) -> Passes | None:
    """The passes of a model; None where nothing begins them."""
    around = around_of(model)
    wrappers = [] if around is None else around.wrappers
    return next((wrapper.passes for wrapper in wrappers if isinstance(wrapper, ReadLabels)), None)


def labels_known(model: nn.Module, labels: Any) -> AbstractContextManager[None]:
    """Let the passes of a model inside know the labels of a batch, where they are taken out of it before the call."""
    passes = passes_of(model)
    return nullcontext() if passes is None or not isinstance(labels, Tensor) else passes.labelled(labels)


def remove_passes(model: nn.Module) -> None:
    """Take out what `place_passes` put around the calls of a model."""
    for module in model.modules():
        around = around_of(module)
        if around is not None:
            around.wrappers = [own for own in around.wrappers if not isinstance(own, ReadLabels | ReadPass)]
        checkpoint = vars(module).get(CHECKPOINT)
        if isinstance(checkpoint, Carried):
            setattr(module, CHECKPOINT, checkpoint.checkpoint)
    unwrap(model)
