"""What trains in full beside the adapters: which modules, and in what precision."""

from typing import Any

import torch
from torch import Tensor, nn

from apt.families import base_model
from apt.layers import LayerTransform
from apt.methods import HyperNetwork
from apt.methods.prompts import placed_prompt


def task_head(model: nn.Module) -> list[nn.Module]:
    """What trains in full: all outside the base model, and its pooler; but a language-model head is frozen.

    Tr of self-distillation, the network behind gates and a prompt are no part of the task.
    """
    base = base_model(model)
    if base is model:  # T5 for questions has its head beside its stacks
        return [module for name, module in model.named_children() if name == "qa_outputs"]
    ours = (base, placed_prompt(model))
    outside = [m for m in model.children() if m not in ours and not isinstance(m, LayerTransform | HyperNetwork)]
    output = getattr(model, "get_output_embeddings", lambda: None)()
    if output is not None:
        return [module for module in outside if all(part is not output for part in module.modules())]
    pooler = getattr(base, "pooler", None)
    return [*outside, *([pooler] if isinstance(pooler, nn.Module) else [])]


def widen(model: nn.Module, head: list[nn.Module]) -> tuple[dict[str, torch.dtype], list[Any]]:
    """Hold the numbers of a head in at least float32, so that its steps and its moments are not rounded away.

    A learning rate of 1e-3 moves a bfloat16 weight only where the step is above 1/256 of it. The modules of the head
    get their inputs in their own precision and answer in it: logits are float32, as a loss wants them.

    Returns:
        The dtype that each parameter and buffer had, by full name, and handles of the hooks. Both are empty where the
        head was wide enough.
    """
    paths = {id(tensor): name for name, tensor in (*model.named_parameters(), *model.named_buffers())}
    dtypes: dict[str, torch.dtype] = {}
    hooks = []
    for module in head:
        narrow_ones = [t for t in (*module.parameters(), *module.buffers()) if _wide(t.dtype) != t.dtype]
        for tensor in narrow_ones:
            dtypes[paths[id(tensor)]] = tensor.dtype
            tensor.data = tensor.data.to(_wide(tensor.dtype))
        if narrow_ones:
            hooks.append(module.register_forward_pre_hook(_widen_inputs, with_kwargs=True))
    return dtypes, hooks


def narrow(model: nn.Module, dtypes: dict[str, torch.dtype]) -> None:
    """Give parameters and buffers the dtypes that they had."""
    tensors = dict((*model.named_parameters(), *model.named_buffers()))
    for name, dtype in dtypes.items():
        tensors[name].data = tensors[name].data.to(dtype)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32) if dtype.is_floating_point else dtype


def _widen_inputs(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
    own = next(module.parameters()).dtype  # the model may have been cast since

    def wide(value: Any) -> Any:
        floats = isinstance(value, Tensor) and value.is_floating_point()
        return value.to(torch.promote_types(value.dtype, own)) if floats else value

    return tuple(map(wide, args)), {name: wide(value) for name, value in kwargs.items()}
