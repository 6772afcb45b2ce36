"""AdaLoRA (Zhang et al., 2023, arXiv 2303.10512): P diag(lambda) Q, whose ranks go where they matter least."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from apt.layers import Delta, adapted
from apt.methods.config import MethodConfig
from apt.records import TrimPlan
from apt_kernels.autocast import outside_autocast

INIT_STD = 0.02  # of P and Q, as in the authors' code
Triplet = tuple[Tensor, Tensor, Tensor]  # of A, B and lambda


class AdaLoRA(Delta):
    """``A = Q``, ``B = P``, ``g = lambda``, all three trained: P and Q from random numbers, lambda from 0.

    The averages from which ranks are chosen lie beside the parameters and have their shapes, so that surgery and
    checkpoints take them along; they are gone once the ranks are final.
    """

    sensitivity_A: Tensor | None
    sensitivity_B: Tensor | None
    sensitivity_E: Tensor | None
    uncertainty_A: Tensor | None
    uncertainty_B: Tensor | None
    uncertainty_E: Tensor | None

    def __init__(self, outputs: int, inputs: int, rank: int, like: Tensor) -> None:
        super().__init__()
        like = like.new_empty(0, dtype=torch.promote_types(like.dtype, torch.float32))
        self.lora_A = nn.Parameter(like.new_empty(rank, inputs).normal_(0.0, INIT_STD))  # Q [R, n_in]
        self.lora_B = nn.Parameter(like.new_empty(outputs, rank).normal_(0.0, INIT_STD))  # P [n_out, R]
        self.lora_E = nn.Parameter(like.new_zeros(rank))  # lambda [R]
        for side, parameter in zip("ABE", self.triplet(), strict=True):
            self.register_buffer(f"sensitivity_{side}", torch.zeros_like(parameter))
            self.register_buffer(f"uncertainty_{side}", torch.zeros_like(parameter))

    @classmethod
    def of(cls, weight: Tensor, rank: int, settings: MethodConfig) -> "AdaLoRA":
        return cls(weight.shape[0], weight.shape[1], rank, weight)

    @property
    def rank(self) -> int:
        return self.lora_E.numel()

    @property
    def num_active(self) -> int:
        return int((self.lora_E.detach() != 0).sum())

    def triplet(self) -> tuple[nn.Parameter, nn.Parameter, nn.Parameter]:
        """A, B and lambda."""
        return self.lora_A, self.lora_B, self.lora_E

    def factors(self) -> Triplet:
        return self.triplet()

    def _averages(self, side: str) -> list[Tensor]:
        found = (getattr(self, f"sensitivity_{side}"), getattr(self, f"uncertainty_{side}"))
        return [tensor for tensor in found if tensor is not None]

    def side(self, axis: str) -> list[Tensor]:
        if axis == "out":
            return [self.lora_B, *self._averages("B")]
        return [self.lora_A, *self._averages("A")]

    def rank_side(self) -> list[tuple[Tensor, int]]:
        rows = [self.lora_A, *self._averages("A"), self.lora_E, *self._averages("E")]
        return [*((tensor, 0) for tensor in rows), *((tensor, 1) for tensor in (self.lora_B, *self._averages("B")))]

    def settle(self) -> None:
        for side in "ABE":
            setattr(self, f"sensitivity_{side}", None)
            setattr(self, f"uncertainty_{side}", None)

    @torch.no_grad()
    def update_scores(self, grads: Sequence[Tensor], settings: MethodConfig) -> None:
        """Take in ``|w dL/dw|`` of one step: its average, and the average distance to that."""
        for side, parameter, grad in zip("ABE", self.triplet(), grads, strict=True):
            sensitivity, uncertainty = self._averages(side)
            now = (parameter * grad).abs()
            sensitivity.mul_(settings.beta1).add_(now, alpha=1.0 - settings.beta1)
            uncertainty.mul_(settings.beta2).add_((now - sensitivity).abs(), alpha=1.0 - settings.beta2)

    def scores(self) -> Tensor:
        """Importance of each rank, ``[R]``: lambda's own, and the means over its row of Q and its column of P."""
        products = {side: torch.mul(*self._averages(side)) for side in "ABE"}
        return products["E"] + products["A"].mean(1) + products["B"].mean(0)

    def extra_repr(self) -> str:
        return f"rank={self.rank}"


@outside_autocast
def _apart_from_orthogonal(rows_RD: Tensor) -> Tensor:
    """``|Q Q^T - I|``, the Frobenius norm."""
    gram = rows_RD @ rows_RD.T
    return torch.linalg.matrix_norm(gram - torch.eye(len(gram), dtype=gram.dtype, device=gram.device))


def orthogonality(deltas: Sequence[Delta], settings: MethodConfig) -> Tensor | None:
    """``orth_reg_weight`` times the mean over all P and Q of ``|P^T P - I|`` and ``|Q Q^T - I|``, Frobenius norms."""
    terms = []
    for delta in deltas:
        if isinstance(delta, AdaLoRA):
            terms += [_apart_from_orthogonal(delta.lora_A), _apart_from_orthogonal(delta.lora_B.T)]
    return settings.orth_reg_weight * torch.stack(terms).mean() if terms and settings.orth_reg_weight else None


class RankBudget:
    """The ranks that AdaLoRA leaves: all until `tinit`, then fewer on a cubic, the target from ``total - tfinal`` on.

    Between, every `deltaT` steps, lambda of the least important ranks is set to 0; training may bring it back. At the
    end the choice is final, and the ranks that it leaves out are removed.

    Args:
        model: patched with ``method="adalora"``.
        rank: of every adapter at the start.
        settings: tinit, tfinal, deltaT, target_r, beta1, beta2.
        total_steps: of the run.

    Raises:
        ValueError: no step lies between tinit and the end of the budget, or the target is above the start.
    """

    def __init__(self, model: nn.Module, rank: int, settings: MethodConfig, total_steps: int) -> None:
        self.model = model
        self.settings = settings
        self.last = total_steps - settings.tfinal
        deltas = self._deltas()
        target = max(1, 2 * rank // 3) if settings.target_r is None else settings.target_r
        self.start = sum(delta.rank for delta in deltas.values())
        self.target = target * len(deltas)
        self._grads: dict[str, list[Tensor]] = {}
        if settings.tinit >= self.last:
            raise ValueError(
                f"methods: tinit {settings.tinit} and tfinal {settings.tfinal} leave no step of {total_steps} in which "
                f"the budget falls; lower them, or train longer"
            )
        if target > rank:
            raise ValueError(f"methods: target_r {target} is above the rank {rank} that every adapter starts with")

    def _deltas(self) -> dict[str, AdaLoRA]:
        """Those whose ranks are not chosen yet; an earlier run of the model may have settled them."""
        found = {name: m.delta for name, m in adapted(self.model) if isinstance(m.delta, AdaLoRA)}
        return {name: delta for name, delta in found.items() if delta.sensitivity_E is not None}

    def settled(self, step: int) -> bool:
        """Whether no rank goes after that step."""
        return step >= self.last or not self._deltas()

    def budget(self, step: int) -> int:
        """Ranks of all adapters together that may be used after that step."""
        if step <= self.settings.tinit:
            return self.start
        left = 1.0 - (min(step, self.last) - self.settings.tinit) / (self.last - self.settings.tinit)
        return int((self.start - self.target) * left**3 + self.target)

    def after_backward(self, step: int, grad_scale: float) -> None:
        """Keep the gradients of the step in the making: when it is done, a Trainer has emptied them."""
        self._grads = {}
        if step < self.last:
            for name, delta in self._deltas().items():
                grads = [parameter.grad for parameter in delta.triplet()]
                self._grads[name] = [grad / grad_scale for grad in grads if grad is not None]

    @torch.no_grad()
    def after_step(self, step: int) -> TrimPlan | None:
        """Score and mask ranks after an optimizer step, the first being 1. At the last one, what is to be removed."""
        if step > self.last:
            return None
        deltas = self._deltas()
        settings = self.settings
        for name, grads in self._grads.items():
            if name in deltas and len(grads) == 3:
                deltas[name].update_scores(grads, settings)
        self._grads = {}
        if not deltas or (step != self.last and (step <= settings.tinit or step % settings.deltaT)):
            return None
        kept = self._choose(deltas, self.budget(step))
        for name, delta in deltas.items():
            delta.lora_E.masked_fill_(~kept[name], 0.0)
        if step < self.last:
            return None
        return TrimPlan(step=step, kept={name: mask.nonzero().flatten().tolist() for name, mask in kept.items()})

    def _choose(self, deltas: dict[str, AdaLoRA], budget: int) -> dict[str, Tensor]:
        if self.settings.rank_allocation == "magnitude":
            return self._kept({name: delta.lora_E.abs() for name, delta in deltas.items()}, budget)
        scores = {name: delta.scores() for name, delta in deltas.items()}
        if self.settings.rank_allocation == "importance":
            return self._kept(scores, budget)
        each = {name: {name: score} for name, score in scores.items()}
        return {n: self._kept(each[n], budget * len(score) // self.start)[n] for n, score in scores.items()}

    @staticmethod
    def _kept(scores: dict[str, Tensor], budget: int) -> dict[str, Tensor]:
        """Which ranks are among the `budget` most important ones of all adapters."""
        everything = torch.cat(list(scores.values()))
        surplus = everything.numel() - budget
        if surplus <= 0:
            return {name: torch.ones_like(score, dtype=torch.bool) for name, score in scores.items()}
        threshold = torch.kthvalue(everything, surplus).values
        return {name: score > threshold for name, score in scores.items()}
