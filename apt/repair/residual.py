"""The closed form of what a projection should add to its output: ridge regression of a residual on its inputs."""

from dataclasses import dataclass

import torch
from torch import Tensor

from apt.repair.solve import RIDGES, USUAL, Moment, Solution, damped_solve


@dataclass
class Residual:
    """Moments over tokens of inputs x of a linear, those that stay, and of the residual r that its output should get.

    `cross` ``[S, O]`` is the sum of ``x r^T``, `total` ``[O]`` that of r, `energy` ``[]`` that of ``|r|^2``.
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

    def add(self, x_TS: Tensor, r_TO: Tensor) -> None:
        """Take in tokens, widened first."""
        x_TS, r_TO = x_TS.to(self.cross.dtype), r_TO.to(self.cross.dtype)
        self.inputs.add(x_TS)
        self.cross.addmm_(x_TS.T, r_TO)
        self.total += r_TO.sum(0)
        self.energy += r_TO.square().sum()

    def plus(self, other: "Residual") -> "Residual":
        inputs = self.inputs.plus(other.inputs)
        return Residual(inputs, self.cross + other.cross, self.total + other.total, self.energy + other.energy)


def solve_residual(fit: Residual, held_out: Residual | None, *, with_bias: bool) -> Solution:
    """The minimum of ``|r - x dW^T - db|^2 + l |dW|^2``: ``dW = C_rx (C_xx + l I)^-1``, drawn towards no change.

    The ridge l is chosen as in `apt.repair.solve.solve`, no change among the choices.

    Args:
        fit: of calibration tokens.
        held_out: of other tokens; None takes `USUAL` unless that helps nothing on `fit`.
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
    none = torch.zeros_like(whole.cross.T, dtype=torch.float64)
    best = (none, torch.zeros_like(whole.total, dtype=torch.float64) if with_bias else None)
    before = least = _error(judge, *best)
    ridge = None
    for tried in RIDGES if held_out is not None else (USUAL,):
        added = _fit(fit, tried, with_bias=with_bias)
        if added is not None and (error := _error(judge, *added)) < least:
            best, least, ridge = added, error, tried
    if ridge is not None and held_out is not None:
        best = _fit(whole, ridge, with_bias=with_bias) or best
    return Solution(best[0], best[1], ridge, before, least)


def _fit(of: Residual, ridge: float, *, with_bias: bool) -> tuple[Tensor, Tensor | None] | None:
    """What is added with this ridge; None where the moment is singular in spite of it, or no input stays."""
    if not of.cross.numel():
        return None
    count = of.inputs.count.double().clamp(min=1.0)
    mean, mean_r = of.inputs.mean(), of.total.double() / count
    right = of.cross.double() / count
    if with_bias:
        right.addr_(mean, mean_r, alpha=-1.0)
    second = of.inputs.per_token(centred=with_bias)
    solved = damped_solve(second, right, ridge)
    if solved is None:
        return None
    return solved.T, mean_r - solved.T @ mean if with_bias else None


def _error(of: Residual, weight: Tensor, bias: Tensor | None) -> float:
    """The mean ``|r - x dW^T - db|^2``."""
    count = of.inputs.count.double().clamp(min=1.0)
    second = of.inputs.per_token(centred=False)
    error = of.energy.double() / count + (((weight @ second) - 2.0 * of.cross.double().T / count) * weight).sum()
    if bias is not None:
        mean_r = of.total.double() / count
        error = error + bias @ (2.0 * (weight @ of.inputs.mean() - mean_r) + bias)
    return float(error)
