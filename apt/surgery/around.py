"""What comes to a patched model from around it: a state of other sizes, a longer vocabulary, copies of it."""

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from apt.families.linears import replace_module
from apt.layers import APTAdapter, exchange
from apt.layers.own_methods import put_method, take_method
from apt.surgery.state import patch_state

RESIZE = "resize_token_embeddings"


def watch(model: nn.Module) -> list[Any]:
    """Let a state of other sizes be told, and a vocabulary grow under an adapted output layer. Returns handles."""
    if _adapted_output(model) is not None:
        put_method(model, RESIZE, _resize)
    return [model.register_load_state_dict_pre_hook(_tell_sizes)]


def unwatch(model: nn.Module) -> None:
    """Take out what `watch` put on the model itself; its handles are the caller's to remove."""
    take_method(model, RESIZE)


def _tell_sizes(
    model: nn.Module,
    state: dict[str, Tensor],
    prefix: str,
    metadata: Any,
    strict: bool,
    missing: list[str],
    unexpected: list[str],
    errors: list[str],
) -> None:
    """Say why the sizes of a state differ, beside what torch says of each."""
    own = {f"{prefix}{name}": parameter.shape for name, parameter in model.named_parameters()}
    if any(name in state and state[name].shape != shape for name, shape in own.items()):
        errors.append(
            "apt: this state has the sizes of another moment of the run, and load_state_dict (accelerate's load_state "
            "too) changes none; APTrainer.train(resume_from_checkpoint=...), and apt.resume_checkpoint for a loop of "
            "your own, bring the shapes back first"
        )


def tell_copies(model: nn.Module, step: int) -> None:
    """Warn that copies of a model, as an average of its weights is one, do not follow the event of a step."""
    state = patch_state(model)
    alive = sum(reference() is not None for reference in state.copies)
    state.copies = []
    if alive:
        warnings.warn(
            f"surgery: {alive} copies of the model do not follow the event after step {step}, which changes shapes; "
            f"make an averaged copy (EMA) anew after each event, or begin it after the last",
            stacklevel=2,
        )


def _adapted_output(model: nn.Module) -> tuple[str, APTAdapter] | None:
    """The output layer of a language model by its full name, where it is adapted."""
    output = getattr(model, "get_output_embeddings", lambda: None)()
    if not isinstance(output, APTAdapter):
        return None
    return next(name for name, module in model.named_modules() if module is output), output


def _resize(model: nn.Module, resize: Callable[..., nn.Module], *args: Any, **kwargs: Any) -> nn.Module:
    """Resize the vocabulary as transformers does, which knows a plain output layer only; its adapter follows."""
    found = _adapted_output(model)
    if found is None:
        return resize(*args, **kwargs)
    name, adapter = found
    outputs, inputs = adapter.weight.shape
    plain = nn.Linear(inputs, outputs, bias=adapter.bias is not None, device="meta")
    plain.weight = adapter.weight
    plain.bias = adapter.bias  # type: ignore[assignment]
    replace_module(model, name, plain)
    try:
        embeddings = resize(*args, **kwargs)
    finally:
        resized: Any = model.get_submodule(name)
        replace_module(model, name, adapter)
    adapter.weight = resized.weight
    adapter.bias = resized.bias
    adapter.n_out = adapter.weight.shape[0]
    for tensor in adapter.side("out"):
        exchange(tensor, _with_rows(tensor.detach(), adapter.n_out))
    return embeddings


def _with_rows(tensor: Tensor, num: int) -> Tensor:
    """The first rows of a tensor; more are 0, so that a new token begins without an update."""
    kept = tensor[:num]
    return torch.cat([kept, kept.new_zeros(num - len(kept), *kept.shape[1:])])
