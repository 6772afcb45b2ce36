"""Steps of the adapted linear layer on tensors that have shapes and no memory: what a stub driver compiles."""

from typing import Any

import torch
from torch import Tensor

from apt_kernels import masked_lora, masked_lora_group
from apt_kernels.tiles import padded_rank

Size = tuple[int, int, int, int]  # T, I, O, R
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32

IMPLEMENTATIONS = ("split_cublas", "split_triton", "one_kernel")
PLAIN: dict[str, Any] = {"bias": False, "mask_in": False, "mask_out": False, "gate": None, "dropout": 0.0}
MASKED = {**PLAIN, "bias": True, "mask_in": True, "mask_out": True}


def shape(*sizes: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(*sizes, dtype=dtype, device="meta")


def step(implementation: str, size: Size, options: dict[str, Any] = MASKED, dtype: torch.dtype = BF16) -> None:
    """Forward and backward of one layer, every gradient asked for."""
    forward(implementation, size, options, dtype)
    backward(implementation, size, options, dtype)


def forward(implementation: str, size: Size, options: dict[str, Any] = MASKED, dtype: torch.dtype = BF16) -> None:
    T, I, O, R = size
    bias = shape(O, dtype=dtype) if options["bias"] else None
    x_TI, weight_OI, a_RI, b_OR = shape(T, I, dtype=dtype), shape(O, I, dtype=dtype), shape(R, I), shape(O, R)
    masked_lora.forward(implementation, x_TI, weight_OI, a_RI, b_OR, bias, *rest(size, options))


def backward(implementation: str, size: Size, options: dict[str, Any] = MASKED, dtype: torch.dtype = BF16) -> None:
    T, I, O, R = size
    x_TI, dy_TO, z_TP = shape(T, I, dtype=dtype), shape(T, O, dtype=dtype), shape(T, padded_rank(R), dtype=dtype)
    weight_OI, needs = shape(O, I, dtype=dtype), (True, True, True, options["gate"] is not None)
    masked_lora.backward(
        implementation, dy_TO, x_TI, z_TP, weight_OI, shape(R, I), shape(O, R), *rest(size, options), needs
    )


def rest(size: Size, options: dict[str, Any]) -> tuple[Any, ...]:
    """Gate, masks, scale, dropout, seed."""
    T, I, O, R = size
    gate = {None: None, "rank": shape(R), "row": shape(T, R)}[options["gate"]]
    masks = shape(I) if options["mask_in"] else None, shape(O) if options["mask_out"] else None
    return gate, *masks, 0.5, options["dropout"], 1234567


def group_step(implementation: str, size: Size) -> None:
    """The same of three layers that share their input."""
    T, I, O, R = size
    x_TI, dys, weights = shape(T, I, dtype=BF16), [shape(T, O, dtype=BF16)] * 3, [shape(O, I, dtype=BF16)] * 3
    a, b = [shape(R, I)] * 3, [shape(O, R)] * 3
    *_, z_TP = masked_lora_group.forward(implementation, x_TI, weights, a, b, [None] * 3, 0.5)
    masked_lora_group.backward(dys, x_TI, z_TP, weights, a, b, 0.5, True)
