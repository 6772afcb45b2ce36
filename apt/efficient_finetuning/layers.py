"""LoRA and AdaLoRA as layers to build with: the update alone, and a linear with its update in one op."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import apt_kernels
from apt.families.linears import is_conv1d, is_linear
from apt.families.plain import find_obstacle
from apt.methods import LowRank, MethodConfig, RankImportance, new_factors


class _Layer:
    """What the two layers have beside A and B: a scale, dropout on the rank-R product, a bias that trains."""

    scale: float
    dropout_probability: float
    bias: nn.Parameter | None  # [O]

    def _settle(self, dimensions: tuple[int, int], rank: int, alpha: float, dropout: float, bias: bool) -> None:
        self.input_dimension, self.output_dimension = dimensions
        self.scale = alpha / rank
        self.dropout_probability = dropout
        self.bias = nn.Parameter(torch.zeros(dimensions[1])) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        layer: Any = self
        a, b, gate = (factor.to(x.dtype) for factor in layer.factors())
        # Without a frozen product there is nothing to fuse with: the op would multiply by a weight of zeros.
        z = F.dropout(F.linear(x, a) * gate, self.dropout_probability, layer.training)
        return F.linear(z * self.scale, b, None if self.bias is None else self.bias.to(x.dtype))


class LoRALayer(_Layer, LowRank):
    """LoRA's update alone: ``alpha / rank * B A x``, plus a bias if asked for.

    Args:
        input_dimension: features of x; ``input_dim`` is the same.
        output_dimension: features of the update; ``output_dim`` is the same.
        rank: R, at least 1.
        alpha: above 0.
        dropout_probability: on the rank-R product while training, [0, 1).
        bias: whether a bias trains, from 0.

    Shapes: ``[..., input_dimension]`` to ``[..., output_dimension]``. It starts at zero.
    """

    def __init__(
        self,
        input_dimension: int | None = None,
        output_dimension: int | None = None,
        rank: int = 8,
        alpha: float = 16.0,
        dropout_probability: float = 0.0,
        bias: bool = False,
        *,
        input_dim: int | None = None,
        output_dim: int | None = None,
    ) -> None:
        inputs = _one_of("input", input_dimension, input_dim)
        outputs = _one_of("output", output_dimension, output_dim)
        _check(rank, alpha, dropout_probability)
        super().__init__(*new_factors(outputs, inputs, rank, torch.empty(0)))
        self._settle((inputs, outputs), rank, alpha, dropout_probability, bias)

    def __setattr__(self, name: str, value: Any) -> None:
        # A loop over named_modules() that hands a shared layer to every module meets the layer itself: a module that is
        # its own part would send train() and state_dict() round in circles.
        if value is not self:
            super().__setattr__(name, value)


class AdaLoRALayer(_Layer, RankImportance):
    """The simple form of AdaLoRA alone: ``alpha / rank * B diag(g) A x``; see `RankImportance`.

    Args:
        input_dimension: features of x.
        output_dimension: features of the update.
        rank: R, at least 1.
        alpha: above 0.
        dropout_probability: on the rank-R product while training, [0, 1).
        bias: whether a bias trains, from 0.
        adaptive_rank: whether the importance of each rank is learned; otherwise all are used.
        rank_allocation: which ranks are used, "uniform", "importance" or "magnitude".
    """

    def __init__(
        self,
        input_dimension: int,
        output_dimension: int,
        rank: int = 8,
        alpha: float = 16.0,
        dropout_probability: float = 0.0,
        bias: bool = False,
        adaptive_rank: bool = True,
        rank_allocation: str = "uniform",
    ) -> None:
        _check(rank, alpha, dropout_probability)
        settings = MethodConfig(adaptive_rank=adaptive_rank, rank_allocation=rank_allocation)
        super().__init__(*new_factors(output_dimension, input_dimension, rank, torch.empty(0)), settings)
        self._settle((input_dimension, output_dimension), rank, alpha, dropout_probability, bias)


class LoRALinear(nn.Module):
    """A frozen linear with an update, in one op: ``W x + b + alpha / rank * B A x``.

    Linears may share one update: give them the same `lora_layer`, an `AdaLoRALayer` too.

    Args:
        original_layer: `nn.Linear`; taken over and frozen.
        rank: R, at least 1.
        alpha: above 0.
        dropout_probability: on the rank-R product while training, [0, 1).
        bias: whether a bias of the update trains, from 0.
    """

    lora_layer: LoRALayer | AdaLoRALayer

    def __init__(
        self,
        original_layer: nn.Linear,
        rank: int = 8,
        alpha: float = 16.0,
        dropout_probability: float = 0.0,
        bias: bool = False,
    ) -> None:
        super().__init__()
        if not is_linear(original_layer) or is_conv1d(original_layer):
            raise ValueError(f"LoRALinear: original_layer must be nn.Linear, got {type(original_layer).__name__}")
        obstacle = find_obstacle(original_layer, "")
        if obstacle is not None:
            raise ValueError(f"LoRALinear: original_layer {obstacle.text}; {obstacle.advice}")
        self.original_layer = original_layer.requires_grad_(False)
        weight = original_layer.weight
        layer = LoRALayer(weight.shape[1], weight.shape[0], rank, alpha, dropout_probability, bias)
        self.lora_layer = layer.to(weight.device, torch.promote_types(weight.dtype, torch.float32))

    def forward(self, x: Tensor) -> Tensor:
        layer = self.lora_layer
        original = self.original_layer
        a, b, gate = layer.factors()
        drops = self.training and layer.dropout_probability > 0.0
        y = apt_kernels.masked_lora_linear(
            x,
            original.weight,
            a,
            b,
            scale=layer.scale,
            bias=original.bias,
            gate=gate if isinstance(layer, AdaLoRALayer) else None,
            dropout=layer.dropout_probability if drops else 0.0,
            # From torch's generator, so that checkpointing drops the same entries again.
            seed=int(torch.randint(2**31 - 1, ())) if drops else None,
        )
        return y if layer.bias is None else y + layer.bias.to(y.dtype)


def _one_of(side: str, long: int | None, short: int | None) -> int:
    given = [value for value in (long, short) if value is not None]
    if len(given) != 1:
        raise ValueError(f"LoRALayer: give {side}_dimension (or {side}_dim), once")
    return given[0]


def _check(rank: int, alpha: float, dropout: float) -> None:
    if rank < 1 or alpha <= 0.0 or not 0.0 <= dropout < 1.0:
        raise ValueError(
            f"efficient_finetuning: rank must be at least 1, alpha above 0 and dropout_probability in [0, 1), "
            f"got {rank}, {alpha} and {dropout}"
        )
