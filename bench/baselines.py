"""What the op is measured against: the frozen linear layer, which is the limit, and four ways to write LoRA.

A baseline takes the inputs of a case and gives a forward call and the leaves ``[x, a, b]`` that it differentiates.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

Forward = Callable[[], Tensor]
Built = tuple[Forward, list[Tensor]]


@dataclass(frozen=True)
class Inputs:
    """One copy of the inputs of a case; a and b are float32 and hold values that the dtype of x can."""

    x: Tensor
    weight: Tensor
    a: Tensor
    b: Tensor
    dy: Tensor
    scale: float
    gate: Tensor | None = None
    mask_in: Tensor | None = None
    mask_out: Tensor | None = None

    def to(self, dtype: torch.dtype) -> "Inputs":
        names = ("x", "weight", "a", "b", "dy", "gate", "mask_in", "mask_out")
        cast = {name: getattr(self, name).to(dtype) for name in names if getattr(self, name) is not None}
        return replace(self, **cast)

    @property
    def masked(self) -> bool:
        return any(tensor is not None for tensor in (self.gate, self.mask_in, self.mask_out))


def leaf(tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """A tensor that learns; it shares memory with its source unless the dtype changes."""
    return tensor.detach().to(dtype or tensor.dtype).requires_grad_()


def frozen(inputs: Inputs) -> Built:
    """cuBLAS alone: ``x W^T``, and dx in backward."""
    x = leaf(inputs.x)
    return (lambda: linear(x, inputs.weight)), [x]


def naive_masked(inputs: Inputs) -> Built:
    """Eager LoRA as PEFT writes it, adapters in the dtype of x, and each mask a multiplication of its own."""
    dtype = inputs.x.dtype
    x, a, b = leaf(inputs.x), leaf(inputs.a, dtype), leaf(inputs.b, dtype)
    gate, mask_in, mask_out = (t if t is None else t.to(dtype) for t in (inputs.gate, inputs.mask_in, inputs.mask_out))

    def forward() -> Tensor:
        xm = x if mask_in is None else x * mask_in
        z = linear(xm, a)
        z = z if gate is None else z * gate
        y = linear(xm, inputs.weight)
        y = y + linear(z, b) * inputs.scale
        return y if mask_out is None else y * mask_out

    return forward, [x, a, b]


class UnslothStyle(torch.autograd.Function):
    """Hand-written backward after Unsloth's published idea; nothing of rank R is saved, all products are cuBLAS's.

    Forward adds the low-rank part into y in place. Backward makes ``x A^T`` again, and ``dy B`` once for dA and once
    for dx. It does not write dx over x, as the original may.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
        y = x @ weight.T
        y.addmm_(x @ a.T, b.T, alpha=scale)
        ctx.save_for_backward(x, weight, a, b)
        ctx.scale = scale
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (dy,) = grads
        x, weight, a, b = ctx.saved_tensors
        grad_b = (dy.T @ (x @ a.T)).mul_(ctx.scale)
        grad_a = ((dy @ b).T @ x).mul_(ctx.scale)
        grad_x = dy @ weight
        grad_x.addmm_(dy @ b, a, alpha=ctx.scale)
        return grad_x, None, grad_a, grad_b, None


def unsloth_style(inputs: Inputs) -> Built:
    x, a, b = leaf(inputs.x), leaf(inputs.a, inputs.x.dtype), leaf(inputs.b, inputs.x.dtype)
    return (lambda: UnslothStyle.apply(x, inputs.weight, a, b, inputs.scale)), [x, a, b]


def _peft_layer(inputs: Inputs, *, wide: bool) -> Any:
    """PEFT's LoRA layer around the frozen weight, with our a and b; float32 adapters where `wide`."""
    from peft import LoraConfig, get_peft_model

    (d_out, d_in), rank = inputs.weight.shape, inputs.a.shape[0]
    base = nn.Linear(d_in, d_out, bias=False, device="meta")
    base.weight = nn.Parameter(inputs.weight, requires_grad=False)
    model = nn.Sequential()
    model.add_module("proj", base)
    config = LoraConfig(r=rank, lora_alpha=inputs.scale * rank, lora_dropout=0.0, target_modules=["proj"])
    layer: Any = get_peft_model(model, config, autocast_adapter_dtype=wide).base_model.model.proj
    dtype = torch.float32 if wide else inputs.x.dtype
    layer.lora_A["default"].weight = nn.Parameter(inputs.a.to(dtype, copy=True))
    layer.lora_B["default"].weight = nn.Parameter(inputs.b.to(dtype, copy=True))
    return layer


def peft_same_dtype(inputs: Inputs) -> Built:
    """PEFT with adapters in the dtype of the model."""
    layer, x = _peft_layer(inputs, wide=False), leaf(inputs.x)
    return (lambda: layer(x)), [x, layer.lora_A["default"].weight, layer.lora_B["default"].weight]


def peft_default(inputs: Inputs) -> Built:
    """PEFT as it comes: float32 adapters, run under autocast."""
    layer, x = _peft_layer(inputs, wide=True), leaf(inputs.x)
    kind, dtype = x.device.type, x.dtype

    def forward() -> Tensor:
        # Without the cache, which is emptied at the end of each call anyway and may not be used in a graph.
        with torch.autocast(kind, dtype, enabled=dtype != torch.float32, cache_enabled=False):
            return layer(x)

    return forward, [x, layer.lora_A["default"].weight, layer.lora_B["default"].weight]


BASELINES: dict[str, Callable[[Inputs], Built]] = {
    "frozen": frozen,
    "peft same dtype": peft_same_dtype,
    "peft default": peft_default,
    "naive masked": naive_masked,
    "unsloth style": unsloth_style,
}
MASKED = ("frozen", "naive masked")  # those that a case with masks or a gate is measured against
