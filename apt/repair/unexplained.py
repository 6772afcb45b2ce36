"""What of a unit the others cannot give back: the salience of a choice that knows it will be repaired."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from apt.repair.solve import USUAL, Moment


@dataclass
class Unexplained:
    """The inverse second moment of the features of the units of a group that are still open.

    Args:
        inverse: ``(G + r I)^-1`` over those features, ``[D, D]``, float64.
        size: features of a unit.
        open: which of all units they are, ``[num_units]``.
    """

    inverse: Tensor
    size: int
    open: Tensor

    @classmethod
    def of(cls, moment: Moment, size: int, *, with_bias: bool) -> "Unexplained":
        """All units open; r is `USUAL` times the mean of the diagonal.

        Args:
            moment: of what the projection reads.
            size: features of a unit.
            with_bias: whether a bias takes the mean, so that only what varies is to be explained.

        Raises:
            FloatingPointError: the moment holds a number that is NaN or infinite.
        """
        moment.check()
        second = moment.per_token(centred=with_bias)
        diagonal = second.diagonal()
        # Where nothing passes, nothing is left of any unit.
        diagonal += USUAL * diagonal.mean().clamp(min=torch.finfo(torch.float64).tiny / USUAL)
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(second))
        return cls(inverse, size, torch.ones(len(inverse) // size, dtype=torch.bool, device=inverse.device))

    def keep(self, units: Sequence[int]) -> None:
        """Shut all units but these: ``K_SS - K_SP K_PP^-1 K_PS`` is the inverse over the features that stay."""
        stays = torch.zeros_like(self.open)
        stays[list(units)] = True
        going = ~stays[self.open].repeat_interleave(self.size)
        self.open &= stays
        if not bool(going.any()):
            return
        rows = self.inverse[~going]
        inverse, across = rows[:, ~going], rows[:, going]
        factor = torch.linalg.cholesky(self.inverse[going][:, going])
        self.inverse = inverse - across @ torch.cholesky_solve(across.T, factor)

    def scores(self, gradients: Tensor) -> Tensor:
        """What every open unit has alone, weighed by the gradients: ``[num_units]``, float64; 0 for one that is shut.

        With K the inverse and g the gradient of the features of a unit, ``E[g^2] / K_jj``, of several features the sum
        over all entries of ``E[g g^T] * (K_bb)^-1``: what is left of ``E[x x^T]`` once the other open units are
        regressed on (the score of the Optimal Brain Surgeon; OSSCAR, ZipLM).

        Args:
            gradients: sums over tokens of the squares ``[D]``, or of the products inside units ``[num_units, d, d]``.
        """
        found = torch.zeros(self.open.shape, dtype=torch.float64, device=self.inverse.device)
        gradients = gradients.to(found)
        if self.size == 1:
            found[self.open] = gradients[self.open] / self.inverse.diagonal()
        else:
            own = self.inverse.unflatten(0, (-1, self.size)).unflatten(2, (-1, self.size)).diagonal(dim1=0, dim2=2)
            # By Cholesky, as they are positive: the LU of several matrices fails in oneMKL on more than one thread.
            left = torch.cholesky_inverse(torch.linalg.cholesky(own.permute(2, 0, 1)))
            found[self.open] = (left * gradients[self.open]).sum((1, 2))
        return found.clamp(min=0.0)
