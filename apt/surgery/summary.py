"""Counts of a patched model: what trains, what is gone, what is left."""

from dataclasses import dataclass

from torch import nn

from apt.families import known_anatomy
from apt.layers import TRANSFORM, adapted
from apt.layers.layer_mask import layer_mask
from apt.layers.unit_mask import UnitMask
from apt.methods.prompts import PROMPT, placed_prompt
from apt.pruning.dimensions import hidden_group
from apt.pruning.units import block_params, unit_masks
from apt.records import UnitName
from apt.surgery.state import bare_model, patch_state
from apt.surgery.tails import live_views


@dataclass(frozen=True)
class Summary:
    """What is trainable, gone and left. Counts of the whole model are with the adapters merged."""

    sparsity: float  # 1 - kept / total of the block parameters
    params_before: int
    params_after: int
    trainable_params: int
    units: dict[str, int]  # heads (KV groups) and neurons left in every unit group: "layers.0.heads": 12, ...
    layers: dict[str, bool]  # whether each is left: "layers.0": True, ...
    hidden: int  # hidden dimensions; 0 where they cannot be removed
    masked: int  # units whose mask is below 1
    ranks: dict[str, int]  # of every adapter
    # Ranks that change the output, adapter by adapter: gates that have left 0, or that an example opens, on average.
    active: dict[str, float]
    virtual_tokens: int  # of the prompt; 0 where there is none
    init_seconds: float  # that the start of the adapters took, decompositions included

    @property
    def heads(self) -> list[int]:
        """KV groups left, attention by attention."""
        return [count for name, count in self.units.items() if name.endswith("heads")]

    @property
    def neurons(self) -> list[int]:
        """Neurons left, layer by layer."""
        return [count for name, count in self.units.items() if name.endswith("neurons")]

    def __str__(self) -> str:
        rows: dict[str, list[int]] = {}
        for name, count in self.units.items():
            rows.setdefault(UnitName.parse(name).title, []).append(count)
        left = self.layers.values()
        ranks = sorted(self.ranks.values())
        active = self.active.values()
        spread = f"{ranks[0]}-{ranks[-1]} over {len(ranks)} adapters" if ranks else "no adapters"
        return "\n".join(
            [
                f"parameters  {self.params_after:,} of {self.params_before:,} ({self.trainable_params:,} train)",
                f"sparsity    {self.sparsity:.1%} of the block parameters, {self.masked} units masked",
                *(f"{title:<11} {' '.join(map(str, counts))}" for title, counts in rows.items()),
                *([f"layers      {sum(left)} of {len(left)}"] if not all(left) else []),
                f"hidden      {self.hidden or 'stay'}",
                f"ranks       {spread}",
                *([f"prompt      {self.virtual_tokens} virtual tokens"] if self.virtual_tokens else []),
                *([f"active      {sum(active):g} of {sum(ranks)} gates"] if sum(active) != sum(ranks) else []),
            ]
        )


def summary(model: nn.Module) -> Summary:
    """Count a patched model.

    Args:
        model: patched by `apt.patch_model`, compiled or not.

    Returns:
        Counts, which ``print`` shows as a table.

    Raises:
        ValueError: it is not patched.
    """
    model = bare_model(model)
    state = patch_state(model)
    modules = dict(adapted(model))
    anatomy = known_anatomy(model)
    group = hidden_group(anatomy)
    ours = (f"{TRANSFORM}.", f"{PROMPT}.")
    prompt = placed_prompt(model)
    parameters = sum(p.numel() for name, p in model.named_parameters() if not name.startswith(ours))
    kept = 0 if prompt is None else sum(p.numel() for p in prompt.plain().parameters())  # in an export
    tails = sum(stored.numel() - live.numel() for stored, live in live_views(model, group))
    adapters = sum(p.numel() for m in modules.values() for p in m.adapter_parameters())
    masks: list[UnitMask | None] = [None if group is None else group.mask]
    units: dict[str, int] = {}
    sparsity = 0.0
    if state.config.prunes and anatomy is not None:
        masks += unit_masks(anatomy).values()
        masks += [layer_mask(layer.module) for layer in anatomy.layers]
        units = anatomy.num_units()
        sparsity = 1.0 - block_params(anatomy) / state.block_params
    return Summary(
        sparsity=sparsity,
        params_before=state.params_before,
        params_after=parameters - tails - adapters + kept,
        trainable_params=sum(p.numel() for p in model.parameters() if p.requires_grad),
        units=units,
        layers={} if anatomy is None else {layer.name: not layer.gone for layer in anatomy.layers},
        hidden=0 if group is None else group.num_units,
        masked=sum(int((mask.values < 1).sum()) for mask in masks if mask is not None),
        ranks={name: module.rank for name, module in modules.items() if module.rank},
        active={name: m.rank if m.delta is None else m.delta.num_active for name, m in modules.items() if m.rank},
        virtual_tokens=0 if prompt is None else prompt.num_virtual_tokens,
        init_seconds=state.init_seconds,
    )
