"""The adapted linear layer. Parameters and shapes live here; the arithmetic is one op of `apt_kernels`."""

import math
from collections.abc import Iterator
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import apt_kernels
from apt.families.linears import is_conv1d, weight_and_bias
from apt.layers.delta import Delta, InputGroup, RowGate
from apt.layers.unit_mask import UnitMask
from apt.process.per_thread import PerThread


class PastMask(PerThread):
    """Where an op that applied the mask of an adapted layer leaves word of it, until that layer gets the tensor."""

    def __init__(self) -> None:
        self.tensor: Tensor | None = None

    def has_passed(self, x: Tensor) -> bool:
        """Whether x has passed the mask already. Raises RuntimeError where another tensor has."""
        tensor = self.tensor
        self.tensor = None
        if tensor is not None and x is not tensor:
            raise RuntimeError("APTAdapter: the mask was applied to another tensor than the one that arrived here")
        return tensor is not None


class APTAdapter(nn.Module):
    """A frozen linear layer with a low-rank adapter of changing rank, and sides that shrink.

    ``y = W x + b + s * B A x``   (APT, arXiv 2401.12200, eq. 2; the masks are `unit_mask` here or act at the producer)

    It takes the place and the parameter names of the linear it adapts (``weight``, ``bias``), beside them ``lora_A``
    and ``lora_B``; with rank 0 it has neither and is that linear. With a `delta` it is ``W x + b + s B diag(g) A x``,
    of which that module holds the parameters. The scale is a stored constant: growth of the rank leaves the output as
    it was. Retained rows and columns stand first in ``weight``; ``n_out`` and ``n_in`` say how many, and forward
    computes with that view, so a dense reader of the same weight can live beside it.

    Args:
        base: the layer to adapt, `nn.Linear` or transformers' ``Conv1D``; its parameters are taken over and frozen.
        rank: initial rank R, at least 0.
        scale: unitless, the constant s (LoRA's alpha / r at the start).
        unit_mask: of the units on the input, for output and down projections.
        init_std: of the rows of A; None is ``1 / sqrt(3 I)``, the second moment of LoRA's kaiming-uniform start.
        dropout: probability in [0, 1) with which an entry of the rank-R product is dropped while training.

    Shapes: input ``[..., n_in]``, output ``[..., n_out]``.
    """

    weight: nn.Parameter  # [O, I]
    bias: nn.Parameter | None  # [O]
    lora_A: nn.Parameter | None  # [R, n_in]
    lora_B: nn.Parameter | None  # [n_out, R]
    teacher_A: Tensor | None  # [R, I], the adapter of a teacher that runs at the full widths of the weight
    teacher_B: Tensor | None  # [O, R]
    teacher_weight: Tensor | None  # [O, I], where the student's own weight was repaired since
    teacher_bias: Tensor | None  # [O], the same

    def __init__(
        self,
        base: nn.Module,
        rank: int = 0,
        scale: float = 2.0,
        unit_mask: UnitMask | None = None,
        init_std: float | None = None,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if rank < 0:
            raise ValueError(f"APTAdapter: rank must be at least 0, got {rank}")
        self.scale = scale
        self.init_std = init_std
        self.dropout = dropout
        self.conv1d = is_conv1d(base)  # so that it comes back as one
        self.weight, self.bias = weight_and_bias(base)
        self.n_out, self.n_in = self.weight.shape
        self.unit_mask = unit_mask
        self.past_mask: PastMask | None = None  # where what makes the input may apply `unit_mask` too
        self.shared: InputGroup | None = None
        self.place = 0  # among those that share its input
        self.register_buffer("teacher_A", None, persistent=False)
        self.register_buffer("teacher_B", None, persistent=False)
        self.register_buffer("teacher_weight", None, persistent=False)
        self.register_buffer("teacher_bias", None, persistent=False)
        self.lora_A, self.lora_B = None, None
        self.delta: Delta | None = None
        self.row_gate: RowGate | None = None
        if rank:
            self.lora_A = nn.Parameter(self._new_rows(rank, "lora"))
            self.lora_B = nn.Parameter(torch.zeros(self.n_out, rank, device=self.weight.device, dtype=self._dtype))

    @property
    def rank(self) -> int:
        """Ranks of the adapter, 0 where there is none."""
        if self.delta is not None:
            return self.delta.rank
        return 0 if self.lora_A is None else self.lora_A.shape[0]

    @property
    def drops(self) -> bool:
        """Whether this pass drops entries of the rank-R product."""
        return self.dropout > 0.0 and self.training

    def adapter_parameters(self) -> list[nn.Parameter]:
        """What of this layer the adapter adds."""
        own = [parameter for parameter in (self.lora_A, self.lora_B) if parameter is not None]
        return own if self.delta is None else [*own, *self.delta.parameters()]

    def side(self, axis: str) -> list[Tensor]:
        """Tensors of the adapter with a row an output ("out", dimension 0) or a column an input ("in", dimension 1)."""
        own = self.lora_B if axis == "out" else self.lora_A
        return [*([] if own is None else [own]), *([] if self.delta is None else self.delta.side(axis))]

    @property
    def in_features(self) -> int:
        """Inputs of now, as `nn.Linear` calls them."""
        return self.n_in

    @property
    def out_features(self) -> int:
        """Outputs of now, as `nn.Linear` calls them."""
        return self.n_out

    @property
    def _dtype(self) -> torch.dtype:
        """Adapters are at least float32, whatever the base is."""
        return torch.promote_types(self.weight.dtype, torch.float32)

    def _new_rows(self, num: int, init_type: str) -> Tensor:
        rows = torch.empty(num, self.n_in, device=self.weight.device, dtype=self._dtype)
        if init_type == "lora":
            return nn.init.kaiming_uniform_(rows, a=math.sqrt(5)) if rows.numel() else rows
        if init_type == "gaussian":
            return rows.normal_(0.0, self.init_std or 1.0 / math.sqrt(3 * max(1, self.n_in)))
        raise ValueError(f"APTAdapter: init_type must be 'lora' or 'gaussian', got {init_type!r}")

    def increase_rank(self, new_rank: int, init_type: Literal["lora", "gaussian"] = "lora") -> None:
        """Append random rows to A over zero columns of B: the output stays as it was.

        An optimizer must follow: `apply_rank_plan` calls this and moves its state.

        Args:
            new_rank: above the present one.
            init_type: of the rows of A: "lora" is kaiming-uniform as at the start, "gaussian" N(0, init_std^2).

        Raises:
            ValueError: the new rank is not above the present one, or there is no adapter.
        """
        if self.lora_A is None or self.lora_B is None or new_rank <= self.rank:
            raise ValueError(f"APTAdapter: new_rank must be above the present rank {self.rank}, got {new_rank}")
        num = new_rank - self.rank
        rows = self._new_rows(num, init_type).to(self.lora_A.dtype)  # a model may have been cast since
        exchange(self.lora_A, torch.cat([self.lora_A.data, rows]))
        exchange(self.lora_B, torch.cat([self.lora_B.data, self.lora_B.new_zeros(self.n_out, num)], dim=1))

    def drop_adapter(self) -> None:
        """Remove the adapter; what it added is gone too."""
        self.lora_A = self.lora_B = self.delta = self.row_gate = None

    def view(self) -> tuple[Tensor, Tensor | None]:
        """The live part of weight and bias: ``[n_out, n_in]`` and ``[n_out]``."""
        if self.weight.shape == (self.n_out, self.n_in):
            return self.weight, self.bias
        return self.weight[: self.n_out, : self.n_in], None if self.bias is None else self.bias[: self.n_out]

    def live_params(self) -> int:
        """Numbers in the live part of weight and bias."""
        return self.n_out * self.n_in + (0 if self.bias is None else self.n_out)

    def keep_dense(self) -> None:
        """Leave weight and bias as they are to a teacher that reads them, before they are repaired; once is enough."""
        if self.teacher_weight is None:
            self.teacher_weight = self.weight.detach().clone()
            self.teacher_bias = None if self.bias is None else self.bias.detach().clone()

    def drop_teacher(self) -> None:
        """Forget what is a teacher's alone."""
        self.teacher_A = self.teacher_B = self.teacher_weight = self.teacher_bias = None

    def free_tail(self) -> None:
        """Give back the memory behind the live part, and with it the adapter of a teacher that read it."""
        weight, bias = self.view()
        self.drop_teacher()
        if weight is not self.weight:
            exchange(self.weight, weight.detach().clone(memory_format=torch.contiguous_format))
            if self.bias is not None and bias is not None:
                exchange(self.bias, bias.detach().clone())

    @torch.no_grad()
    def merged_weight(self) -> Tensor:
        """``W + s B diag(g) A`` of the live part, a fresh ``[n_out, n_in]``, added in at least float32.

        Raises:
            ValueError: the update depends on the example.
        """
        weight, _ = self.view()
        if not self.rank:
            return weight.clone(memory_format=torch.contiguous_format)
        if self.row_gate is not None:
            raise ValueError("APTAdapter: an update that depends on the example cannot be merged into a weight")
        a, b = self.factors()
        with torch.autocast(weight.device.type, enabled=False):
            delta = self.scale * (b @ a)
        return (weight.to(delta.dtype) + delta).to(weight.dtype)

    def factors(self) -> tuple[Tensor, Tensor]:
        """A ``[R, n_in]`` and ``B diag(g)`` ``[n_out, R]``, with R = 0 where there is no adapter."""
        if self.delta is not None:
            a, b, gate = self.delta.factors()
            return a, b * gate
        if self.lora_A is None or self.lora_B is None:
            return self.weight.new_zeros(0, self.n_in), self.weight.new_zeros(self.n_out, 0)
        return self.lora_A, self.lora_B

    def forward(self, x: Tensor) -> Tensor:
        if self.shared is not None and self.shared.together(self):
            return self.shared.output(self, x)
        mask_in = None
        masked = self.past_mask is not None and self.past_mask.has_passed(x)
        if self.unit_mask is not None and not masked:
            if self.rank and self.unit_mask.only_masks:
                mask_in = self.unit_mask.feature_mask()  # the op multiplies: a kernel needs no pass of its own for it
            else:
                x = self.unit_mask(x)
        weight, bias = self.view()
        if not self.rank:
            return F.linear(x, weight, bias)
        a, b, gate = (self.lora_A, self.lora_B, None) if self.delta is None else self.delta.factors()
        assert a is not None and b is not None  # noqa: PT018
        if self.row_gate is not None:
            rows = self.row_gate.rows(x, a.shape[0])
            gate = rows if gate is None else rows * gate
        # The seed comes from torch's generator, so that checkpointing drops the same entries again.
        dropout, seed = (self.dropout, int(torch.randint(2**31 - 1, ()))) if self.drops else (0.0, None)
        return apt_kernels.masked_lora_linear(
            x,
            weight,
            a,
            b,
            scale=self.scale,
            bias=bias,
            gate=gate,
            mask_in=mask_in,
            dropout=dropout,
            seed=seed,
        )

    def extra_repr(self) -> str:
        return f"in_features={self.n_in}, out_features={self.n_out}, rank={self.rank}, scale={self.scale}"


def exchange(parameter: Tensor, data: Tensor) -> None:
    """Give a parameter data of another shape; the object, and with it every list that holds it, stays.

    While a graph of an earlier step is alive (a loop's ``loss`` variable is enough), autograd keeps the old shape in
    the parameter's gradient accumulator, and lets go only when the dtype changes: so it passes through another one.
    """
    other = torch.float16 if data.dtype != torch.float16 else torch.float32
    parameter.data = data.new_empty(0, dtype=other)
    parameter.data = data


def adapted(model: nn.Module) -> Iterator[tuple[str, APTAdapter]]:
    """Every adapted linear of a model with its full name, in the order of the modules, rank 0 ones included."""
    for name, module in model.named_modules():
        if isinstance(module, APTAdapter):
            yield name, module
