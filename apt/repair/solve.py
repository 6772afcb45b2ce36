"""The closed form: what columns that stay have to add, so that the output changes least. Tensors in, tensors out."""

from dataclasses import dataclass

import torch
from torch import Tensor

RIDGES = (1e-6, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)  # tried, relative to the mean of the diagonal
USUAL = 1e-2  # where there is nothing held out to choose by; between 1e-3 and 1e-1 it hardly matters


@dataclass
class Moment:
    """Second moment of the inputs of a linear over tokens, with their sum.

    `second` ``[D, D]`` is the sum over tokens of ``x x^T``, `total` ``[D]`` that of x, `count` ``[]`` how many there
    were; all in at least float32.
    """

    second: Tensor
    total: Tensor
    count: Tensor

    @classmethod
    def zeros(cls, width: int, device: torch.device, dtype: torch.dtype) -> "Moment":
        """The moment of no token."""
        total = torch.zeros(width, device=device, dtype=torch.promote_types(dtype, torch.float32))
        return cls(total.new_zeros(width, width), total, total.new_zeros(()))

    def add(self, x_TD: Tensor) -> None:
        """Take in the tokens of ``[T, D]``, widened first."""
        x_TD = x_TD.to(self.second.dtype)
        self.second.addmm_(x_TD.T, x_TD)
        self.total += x_TD.sum(0)
        self.count += x_TD.shape[0]

    def plus(self, other: "Moment") -> "Moment":
        return Moment(self.second + other.second, self.total + other.total, self.count + other.count)

    def to(self, device: torch.device | str) -> "Moment":
        return Moment(self.second.to(device), self.total.to(device), self.count.to(device))

    def check(self) -> None:
        """Raise FloatingPointError where it holds a number that is NaN or infinite."""
        if not bool(self.second.isfinite().all()):
            raise FloatingPointError("the inputs hold a number that is NaN or infinite")

    def mean(self) -> Tensor:
        """``[D]``, float64."""
        return self.total.double() / self.count.double().clamp(min=1.0)

    def per_token(self, *, centred: bool) -> Tensor:
        """The mean of ``x x^T``, of ``(x - mean)(x - mean)^T`` where it is centred; ``[D, D]``, float64."""
        second = self.second.double() / self.count.double().clamp(min=1.0)
        if centred:
            mean = self.mean()
            second.addr_(mean, mean, alpha=-1.0)
        return second


@dataclass(frozen=True)
class Solution:
    """What the kept columns and the bias get added, and what that is worth.

    `weight` is ``[O, S]`` and `bias` ``[O]`` or None, both float64. `ridge` is relative to the mean of the diagonal;
    None where nothing helped, so that both are 0. `before` and `after` are the errors without and with it: the mean
    squared change of the output over that of the output itself, on tokens held out where there were any.
    """

    weight: Tensor
    bias: Tensor | None
    ridge: float | None
    before: float
    after: float


def solve(weight_OD: Tensor, fit: Moment, held_out: Moment | None, kept_S: Tensor, *, with_bias: bool) -> Solution:
    """Ridge regression of what the pruned columns gave on the columns that stay.

    ``dW = W_P C_PS (C_SS + r I)^-1``, with r the ridge times the mean of the diagonal of ``C_SS``: the minimum of
    ``|x W^T - x_S (W_S + dW)^T|^2 + r |dW|^2``, after GRAIL (arXiv 2602.23795), but drawn towards the kept weights, so
    that it is 0 where nothing is pruned. C is the mean of ``x x^T``; with a bias it is centred, and the bias takes the
    mean of what is left: ``db = W_P mean_P - dW mean_S``. The ridge is the one of `RIDGES` with the least error on the
    tokens held out, no repair among them; then the rest is fitted anew on all tokens.

    Args:
        weight_OD: the weight as it acts, adapters merged.
        fit: moment of its inputs over calibration tokens.
        held_out: the same over other tokens; None takes `USUAL` unless that helps nothing on `fit`.
        kept_S: ascending columns that stay.
        with_bias: whether there is a bias to take the mean.

    Raises:
        FloatingPointError: the moments hold a number that is NaN or infinite.
    """
    whole = fit if held_out is None else fit.plus(held_out)
    whole.check()
    weight_OD = weight_OD.double()
    gone_P = _others(kept_S, weight_OD.shape[1])
    judge = fit if held_out is None else held_out
    mean, second = judge.mean(), judge.per_token(centred=False)
    scale = float(((weight_OD @ second) * weight_OD).sum().clamp(min=torch.finfo(torch.float64).tiny))
    cut = _Cut(weight_OD, kept_S, gone_P, with_bias)
    best = cut.nothing()
    before = least = cut.error(best, mean, second)
    ridge = None
    system = cut.system(fit)
    for tried in RIDGES if held_out is not None else (USUAL,):
        added = cut.fit(system, tried)
        if added is not None and (error := cut.error(added, mean, second)) < least:
            best, least, ridge = added, error, tried
    if ridge is not None and held_out is not None:
        best = cut.fit(cut.system(whole), ridge) or best
    return Solution(best[0], best[1], ridge, before / scale, least / scale)


Added = tuple[Tensor, Tensor | None]  # to the kept columns [O, S], to the bias [O]


@dataclass(frozen=True)
class _Cut:
    """A linear `weight` ``[O, D]`` whose columns `kept` ``[S]`` stay and `gone` ``[P]`` go."""

    weight: Tensor
    kept: Tensor
    gone: Tensor
    with_bias: bool

    def nothing(self) -> Added:
        """The cut as it is."""
        rows = self.weight.shape[0]
        return self.weight.new_zeros(rows, self.kept.numel()), self.weight.new_zeros(rows) if self.with_bias else None

    def system(self, moment: Moment) -> tuple[Tensor, Tensor, Tensor]:
        """``C_SS``, the right side ``C_SP W_P^T``, and the mean input."""
        second = moment.per_token(centred=self.with_bias)
        rows = second[self.kept]
        return rows[:, self.kept], rows[:, self.gone] @ self.weight[:, self.gone].T, moment.mean()

    def fit(self, system: tuple[Tensor, Tensor, Tensor], ridge: float) -> Added | None:
        """The repair with this ridge; None where the moment is singular in spite of it."""
        second, right, mean = system
        if not self.kept.numel():
            weight = self.nothing()[0]
        else:
            solved = damped_solve(second, right, ridge)
            if solved is None:
                return None
            weight = solved.T
        return weight, -self.change(weight) @ mean if self.with_bias else None

    def change(self, weight: Tensor) -> Tensor:
        """What the cut, with this on the kept columns, changes in the whole weight: ``[O, D]``."""
        change = torch.empty_like(self.weight)
        change[:, self.kept] = weight
        change[:, self.gone] = -self.weight[:, self.gone]
        return change

    def error(self, added: Added, mean: Tensor, second: Tensor) -> float:
        """The mean squared change of the output over tokens of this mean and second moment."""
        weight, bias = added
        change = self.change(weight)
        error = ((change @ second) * change).sum()
        if bias is not None:
            error = error + 2.0 * (bias @ (change @ mean)) + bias @ bias
        return float(error)


def damped_solve(second: Tensor, right: Tensor, ridge: float) -> Tensor | None:
    """``(C + r I)^-1 right``, r the ridge times the mean of the diagonal of C; None where that is singular still."""
    damped = second.clone()
    damped.diagonal().add_(ridge * second.diagonal().mean())
    factor, info = torch.linalg.cholesky_ex(damped)
    return torch.cholesky_solve(right, factor) if int(info) == 0 else None


def _others(kept: Tensor, width: int) -> Tensor:
    """The positions below `width` that are not among these, ascending."""
    gone = torch.ones(width, dtype=torch.bool, device=kept.device)
    gone[kept] = False
    return gone.nonzero().flatten()
