"""Steps of the adapted linear layer on tensors that have shapes and no memory: what a stub driver compiles."""

from typing import Any

import torch
from torch import Tensor

from apt_kernels import masked_lora, masked_lora_group
from apt_kernels.operands import LoraNeeds, LoraOperands
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
    T, I, _, _ = size
    masked_lora.forward(implementation, shape(T, I, dtype=dtype), layer(size, options, dtype))


def backward(implementation: str, size: Size, options: dict[str, Any] = MASKED, dtype: torch.dtype = BF16) -> None:
    T, I, O, R = size
    x_TI, dy_TO, z_TP = shape(T, I, dtype=dtype), shape(T, O, dtype=dtype), shape(T, padded_rank(R), dtype=dtype)
    needs = LoraNeeds(x=True, a=True, b=True, gate=options["gate"] is not None)
    masked_lora.backward(implementation, dy_TO, x_TI, z_TP, layer(size, options, dtype), needs)


def layer(size: Size, options: dict[str, Any], dtype: torch.dtype) -> LoraOperands:
    T, I, O, R = size
    return LoraOperands(
        weight=shape(O, I, dtype=dtype),
        a=shape(R, I),
        b=shape(O, R),
        bias=shape(O, dtype=dtype) if options["bias"] else None,
        gate={None: None, "rank": shape(R), "row": shape(T, R)}[options["gate"]],
        mask_in=shape(I) if options["mask_in"] else None,
        mask_out=shape(O) if options["mask_out"] else None,
        scale=0.5,
        dropout=options["dropout"],
        seed=1234567,
    )


def group_step(implementation: str, size: Size) -> None:
    """The same of three layers that share their input."""
    T, I, O, _ = size
    x_TI, dys, layers = shape(T, I, dtype=BF16), [shape(T, O, dtype=BF16)] * 3, [layer(size, PLAIN, BF16)] * 3
    _, z_TP = masked_lora_group.forward(implementation, x_TI, layers)
    masked_lora_group.backward(dys, x_TI, z_TP, layers, True)
