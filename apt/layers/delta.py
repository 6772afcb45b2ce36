"""What an adapted layer may have beside A and B: an update of its method, gates of the example, a group of layers."""

from abc import ABC, abstractmethod
from typing import Any, Protocol

from torch import Tensor, nn


class Delta(nn.Module, ABC):
    """The low-rank update of a method whose A and B are more than two parameters: ``s B diag(g) A``.

    Its parameters train; its buffers are frozen. Each method has a class of its own.
    """

    @property
    @abstractmethod
    def rank(self) -> int: ...

    @property
    def num_active(self) -> float:
        """Ranks that change the output at present; a mean where it depends on the example."""
        return self.rank

    @abstractmethod
    def factors(self) -> tuple[Tensor, Tensor, Tensor]:
        """A ``[R, n_in]``, B ``[n_out, R]`` and g ``[R]``, differentiable in what trains."""

    @abstractmethod
    def side(self, axis: str) -> list[Tensor]:
        """Its tensors with a row an output ("out", along dimension 0) or a column an input ("in", dimension 1).

        Each row (column) of the update must come from that row (column) of them alone, so that to cut one is exact.
        """

    def rank_side(self) -> list[tuple[Tensor, int]]:
        """Its tensors with an entry a rank, and along which dimension; none where the ranks are fixed."""
        return []

    def settle(self) -> None:
        """Let go of what only the choice of ranks needed: it is made."""


class InputGroup(Protocol):
    """Layers that read one tensor, which the first one called computes for all of them."""

    def together(self, member: Any) -> bool:
        """Whether this one is computed together with the others at present."""

    def output(self, member: Any, x: Tensor) -> Tensor:
        """What one of them makes of x."""


class RowGate(Protocol):
    """Gates that depend on the example, beside those that an update has of its own."""

    def rows(self, x: Tensor, rank: int) -> Tensor:
        """Gates of an input ``[..., I]``: ``[..., R]``, or ``[R]``."""
