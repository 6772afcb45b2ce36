"""Statistics -> scores of units and adapters, and their moving averages."""

import torch
from torch import Tensor

import apt_kernels
from apt.layers import APTAdapter
from apt.layers.unit_mask import UnitMask
from apt.pruning.dimensions import Group
from apt.pruning.layers import LayerGroup
from apt.pruning.units import Member

SALIENCES = ("product_of_sums", "sum_of_products", "gate_taylor", "fisher", "obs", "magnitude")
SQUARES = ("fisher", "obs")  # of sums of squares, of activations and gradients
IMPORTANCES = ("signed", "elementwise")
KURTOSES = ("off", "paper", "normalized", "original")


def unit_scores(group: Group, grad_scale: float = 1.0, salience: str = "product_of_sums") -> Tensor:
    """Salience of each unit: ``[num_units]``, float32.

    With h the unit's features at its mask, y what leaves the mask, and sums over the valid tokens of the step::

        product_of_sums   sum over features of mean|h| * sum|dL/dy|    (APT, arXiv 2401.12200, eq. 4, Algorithm 1)
        sum_of_products   sum over features and tokens of |h * dL/dy|
        gate_taylor       |sum over features and tokens of h * dL/dy|, which is |dL/dmask| of an open unit
        fisher            sum over tokens of h^2 times that of (dL/dy)^2; of a unit with several features the sum over
                          all entries of (sum over tokens of h h^T) * (sum over tokens of g g^T), g being dL/dy
        obs               those sums of the gradients alone, times the tokens: ``[D]``, or ``[num_units, d, d]`` of
                          units of d features; `apt.repair.unexplained` makes scores of them, with the moments
        magnitude         sum of |w| over all weights and biases of the unit, adapters merged; asks for no statistics

    Of a layer it is block influence, whatever `salience` says (`apt.layers.layer_mask`).

    The mean divides the product once by the number of tokens: for a mean-reduced loss no score depends on batch size
    or padding. A hidden dimension is a feature of every site: products of sums are taken site by site, then added.

    Args:
        group: its mask holds the sums of one optimizer step (all its micro-batches), of the kind that `salience` needs.
        grad_scale: the loss scaler's factor on the gradients.
        salience: one of `SALIENCES`.
    """
    if isinstance(group, LayerGroup):
        return group.mask.influence()
    if salience == "magnitude":
        return _magnitude(group)
    if salience in SQUARES and group.mask.blocks is not None:
        of_h, of_grad = group.mask.blocks
        of_grad = of_grad / grad_scale**2
        return of_grad * group.mask.count if salience == "obs" else (of_h * of_grad).sum((1, 2))
    first_D, second_D = group.mask.sums.unbind(-2)  # of hidden dimensions one row a site: [sites, D]
    if salience == "product_of_sums":
        features_D = first_D * second_D / (group.mask.count.clamp(min=1.0)[..., None] * grad_scale)
    elif salience == "obs":
        return second_D * (group.mask.count / grad_scale**2)
    elif salience == "fisher":
        features_D = first_D * (second_D / grad_scale**2)
    elif salience == "sum_of_products":
        features_D = first_D / grad_scale
    else:
        features_D = second_D / grad_scale
    features_D = features_D if features_D.dim() == 1 else features_D.sum(0)
    units: Tensor = features_D.view(-1, group.mask.unit_size).sum(1)
    return units.abs() if salience == "gate_taylor" else units


def not_finite(scores: dict[str, Tensor]) -> list[str]:
    """The groups with a score that is NaN or infinite; asks the device once."""
    if not scores:
        return []
    finite = torch.stack(torch._foreach_norm(list(scores.values()), float("inf"))).isfinite().tolist()
    return [name for name, good in zip(scores, finite, strict=True) if not good]


@torch.no_grad()
def _magnitude(group: Group) -> Tensor:
    """L1 norm of each unit, ``[num_units]``: over its cost, the mean |w| of the unit."""
    norms = torch.zeros((), device=group.mask.values.device)
    for member in group.members:
        norms = norms + _l1(member).view(-1, member.width).sum(1)
    for vector in group.vectors:
        norms = norms + vector.abs()
    return norms


def _l1(member: Member) -> Tensor:
    """Sum of |w| of each row or column of a member, bias included, adapter merged."""
    weight_OI, bias_O = member.linear.view()
    if member.linear.rank:
        weight_OI = member.linear.merged_weight()
    wide = torch.promote_types(weight_OI.dtype, torch.float32)
    sums: Tensor = weight_OI.abs().sum(1 if member.axis == "out" else 0, dtype=wide)
    return sums + bias_O.abs() if member.axis == "out" and bias_O is not None else sums


class OutlierTerm:
    """Adds to salience ``sqrt(max(0, kurtosis))`` of each unit (APT, arXiv 2401.12200, eq. 5).

    It is the kurtosis of ``(W + s B A) diag(c)`` in the projection that reads the units, c being the mean input of the
    step, over all columns of a unit. In a neuron's one column c cancels: its term is kept from step to step unless an
    adapter trains there. Of a hidden dimension it is the sum over all output and down projections, of the kurtosis of
    its row.

    Args:
        mode: "off" adds nothing; "paper" the term over the tokens of the step, as salience here is the paper's over
            that number, so the ranking is the paper's; "normalized" scales it, so that over all units of a kind
            it weighs as much as the salience; "original" is "paper" with the slips of the authors' code (moments of the
            sample, and heads made of entries that lie `num_heads` apart), to compare with it.
    """

    def __init__(self, mode: str) -> None:
        self.mode = mode
        self._kept: dict[str, Tensor] = {}

    def reset(self) -> None:
        """Forget what was kept: the weights have changed."""
        self._kept.clear()

    def needs_total(self, group: Group) -> bool:
        """Whether the mask must collect its signed input for the group's own term."""
        return self.mode != "off" and group.mask.unit_size > 1  # in one column the mean input cancels

    def inputs(self, groups: list[Group]) -> list[UnitMask]:
        """Masks that must collect their signed input for the hidden dimensions among the groups."""
        if self.mode == "off":
            return []
        masks = [writer.unit_mask for group in groups for writer in group.writers]
        return [mask for mask in masks if mask is not None]

    def add(self, groups: list[Group], scores: dict[str, Tensor]) -> dict[str, Tensor]:
        """The scores of one step with the term added; the masks hold that step's sums."""
        if self.mode == "off":
            return scores
        terms = {group.name: self._term(group).to(scores[group.name].dtype) for group in groups}
        if self.mode == "normalized":
            for kind in {group.kind for group in groups}:
                names = [group.name for group in groups if group.kind == kind]
                mean = torch.cat([terms[name] for name in names]).mean()
                salience = torch.cat([scores[name] for name in names]).mean()
                if mean > 0:
                    for name in names:
                        terms[name] = terms[name] * (salience / mean)
        return {name: scores[name] + term for name, term in terms.items()}

    @torch.no_grad()
    def _term(self, group: Group) -> Tensor:
        if group.reader is None:
            rows = [self._rows(writer) for writer in group.writers if writer.n_in]
            return torch.stack(rows).sum(0) if rows else torch.zeros_like(group.mask.values)
        term = self._kept.get(group.name)
        if term is None:
            term = self._kurtosis(group.reader, group.mask).clamp(min=0.0).sqrt()
            if group.mask.unit_size == 1 and not group.reader.rank:
                self._kept[group.name] = term
        return self._over_tokens(term, group.mask)

    def _over_tokens(self, term: Tensor, mask: UnitMask) -> Tensor:
        return term if self.mode == "normalized" else term / mask.count.clamp(min=1.0)

    def _kurtosis(self, linear: APTAdapter, mask: UnitMask) -> Tensor:
        """The kurtosis of the columns of each unit in the projection that reads them."""
        weight_OI, _ = linear.view()
        a_RI, b_OR = linear.factors() if linear.rank else (None, None)
        size = mask.unit_size
        mean_I = _mean(mask) if size > 1 else None
        if self.mode == "original" and mean_I is not None:
            mixed = (linear.merged_weight() * mean_I).T.reshape(-1, mask.num_units)
            weight_OI = mixed
            a_RI = None
            b_OR = None
            mean_I = None
            size = 1
        kurtosis, _ = apt_kernels.weight_kurtosis(
            weight_OI, a_RI, b_OR, scale=linear.scale, group=size, column_scale=mean_I
        )
        return self._of_sample(kurtosis, weight_OI.shape[0] * size)

    def _rows(self, writer: APTAdapter) -> Tensor:
        """The terms of the rows of one projection."""
        assert writer.unit_mask is not None
        a_RI, b_OR = writer.factors() if writer.rank else (None, None)
        _, kurtosis = apt_kernels.weight_kurtosis(
            writer.view()[0], a_RI, b_OR, scale=writer.scale, column_scale=_mean(writer.unit_mask)
        )
        return self._over_tokens(self._of_sample(kurtosis, writer.n_in).clamp(min=0.0).sqrt(), writer.unit_mask)

    def _of_sample(self, kurtosis: Tensor, n: int) -> Tensor:
        """The kurtosis as it is; in mode "original" as with the unbiased variance of n entries."""
        if self.mode != "original":
            return kurtosis
        return (kurtosis + 3.0) * ((n - 1) / n) ** 2 - 3.0


def _mean(mask: UnitMask) -> Tensor:
    """The mean input of a mask over the valid tokens of the step."""
    return mask.total / mask.count.clamp(min=1.0)


@torch.no_grad()
def adapter_importance(adapter: APTAdapter, grad_scale: float = 1.0, kind: str = "signed") -> Tensor:
    """How much an adapter's B matters to the loss (method.md 5.1), a scalar tensor; 0 without a gradient.

    ``"signed"`` is ``sum_k |sum_i B_ik dL/dB_ik|``, signed inside a rank and the same from A;
    ``"elementwise"`` is ``sum_ik |B_ik dL/dB_ik|`` (APT, arXiv 2401.12200, eq. 7).
    """
    assert adapter.lora_B is not None, "ranks grow on A and B that are parameters"
    if adapter.lora_B.grad is None:
        return adapter.lora_B.new_zeros(())
    wide = torch.promote_types(adapter.lora_B.dtype, torch.float32)
    products_OR = adapter.lora_B.to(wide) * adapter.lora_B.grad.to(wide)
    terms = products_OR.sum(0) if kind == "signed" else products_OR
    return terms.abs().sum() / grad_scale


class MovingAverage:
    """``S <- momentum S + (1 - momentum) s`` per name, from 0 and without bias correction (a common factor)."""

    def __init__(self, momentum: float) -> None:
        self.momentum = momentum
        self.values: dict[str, Tensor] = {}

    def update(self, new: dict[str, Tensor]) -> None:
        for name, value in new.items():
            old = self.values.get(name)
            self.values[name] = (1 - self.momentum) * value if old is None else torch.lerp(value, old, self.momentum)

    def keep(self, name: str, kept: Tensor) -> None:
        """Follow an event: only the positions `kept` stay."""
        if name in self.values:
            self.values[name] = self.values[name][kept]

    def reset(self) -> None:
        self.values.clear()
