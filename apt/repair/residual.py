"""The closed form of what a projection should add to its output: ridge regression of a residual on its inputs."""

from dataclasses import dataclass

import torch
from torch import Tensor

from apt.repair.solve import RIDGES, USUAL, Moment, Solution, damped_solve


@dataclass
class Residual:
    """Moments over tokens of the inputs x of a linear and of the residual r that its output should get added.

    `cross` ``[D, O]`` is the sum of ``x r^T``, `total` ``[O]`` that of r, `energy` ``[]`` that of ``|r|^2``.
    """

    inputs: Moment
    cross: Tensor
    total: Tensor
    energy: Tensor

    @classmethod
    def zeros(cls, width: int, outputs: int, device: torch.device, dtype: torch.dtype) -> "Residual":
        """The moments of no token."""
        inputs = Moment.zeros(width, device, dtype)
        total = inputs.total.new_zeros(outputs)
        return cls(inputs, total.new_zeros(width, outputs), total, total.new_zeros(()))

    def add(self, x_TD: Tensor, r_TO: Tensor) -> None:
        """Take in tokens, widened first."""
        x_TD, r_TO = x_TD.to(self.cross.dtype), r_TO.to(self.cross.dtype)
        self.inputs.add(x_TD)
        self.cross.addmm_(x_TD.T, r_TO)
        self.total += r_TO.sum(0)
        self.energy += r_TO.square().sum()

    def plus(self, other: "Residual") -> "Residual":
        inputs = self.inputs.plus(other.inputs)
        return Residual(inputs, self.cross + other.cross, self.total + other.total, self.energy + other.energy)


def solve_residual(fit: Residual, held_out: Residual | None, kept_S: Tensor, *, with_bias: bool) -> Solution:
    """The minimum of ``|r - x_S dW^T - db|^2 + l |dW|^2``: ``dW = C_rS (C_SS + l I)^-1``, drawn towards no change.

    The ridge l is chosen as in `apt.repair.solve.solve`, no change among the choices.

    Args:
        fit: of calibration tokens.
        held_out: of other tokens; None takes `USUAL` unless that helps nothing on `fit`.
        kept_S: columns that stay.
        with_bias: whether there is a bias to take the mean.

    Returns:
        What is added; `before` and `after` are the mean ``|r|^2`` without and with it, on the tokens held out.

    Raises:
        FloatingPointError: the moments hold a number that is NaN or infinite.
    """
    whole = fit if held_out is None else fit.plus(held_out)
    whole.inputs.check()
    if not bool(whole.energy.isfinite()):
        raise FloatingPointError("the stream holds a number that is NaN or infinite")
    judge = fit if held_out is None else held_out
    none = torch.zeros(whole.cross.shape[1], kept_S.numel(), dtype=torch.float64, device=whole.cross.device)
    best = (none, torch.zeros_like(whole.total, dtype=torch.float64) if with_bias else None)
    before = least = _error(judge, kept_S, *best)
    ridge = None
    for tried in RIDGES if held_out is not None else (USUAL,):
        added = _fit(fit, kept_S, tried, with_bias=with_bias)
        if added is not None and (error := _error(judge, kept_S, *added)) < least:
            best, least, ridge = added, error, tried
    if ridge is not None and held_out is not None:
        best = _fit(whole, kept_S, ridge, with_bias=with_bias) or best
    return Solution(best[0], best[1], ridge, before, least)


def _fit(of: Residual, kept: Tensor, ridge: float, *, with_bias: bool) -> tuple[Tensor, Tensor | None] | None:
    """What is added with this ridge; None where the moment is singular in spite of it, or no column stays."""
    if not kept.numel():
        return None
    count = of.inputs.count.double().clamp(min=1.0)
    mean, mean_r = of.inputs.mean()[kept], of.total.double() / count
    right = of.cross[kept].double() / count
    if with_bias:
        right.addr_(mean, mean_r, alpha=-1.0)
    second = of.inputs.per_token(centred=with_bias)[kept][:, kept]
    solved = damped_solve(second, right, ridge)
    if solved is None:
        return None
    return solved.T, mean_r - solved.T @ mean if with_bias else None


def _error(of: Residual, kept: Tensor, weight: Tensor, bias: Tensor | None) -> float:
    """The mean ``|r - x dW^T - db|^2``."""
    count = of.inputs.count.double().clamp(min=1.0)
    second = of.inputs.per_token(centred=False)[kept][:, kept]
    error = of.energy.double() / count + (((weight @ second) - 2.0 * of.cross[kept].double().T / count) * weight).sum()
    if bias is not None:
        mean_r = of.total.double() / count
        error = error + bias @ (2.0 * (weight @ of.inputs.mean()[kept] - mean_r) + bias)
    return float(error)
