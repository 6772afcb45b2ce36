"""APTConfig: everything about the method, the overriding of a leaf by its name, and the paper's ablations."""

import difflib
import math
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any

from apt.distillation import DistillationConfig
from apt.methods import METHODS, MethodConfig
from apt.methods.prompts import PromptConfig
from apt.pruning import PruningConfig
from apt.pruning.ranks import TuningConfig

Changes = dict[str, dict[str, Any]]  # section of the config -> leaf -> value

ABLATIONS: dict[str, Changes] = {
    "full": {},
    "w/o_Ap": {
        "pruning": {
            "target_sparsity": 0.0,
            "target_speedup": None,
            "num_events": 0,
            "update_frequency": None,
            "prune_before_tuning": False,
        },
        "distillation": {"use_self_distillation": False},
    },  # ranks grow all the same: see `changes_of`
    "w/o_AT": {"tuning": {"adaptive_rank_update": False}},
    "w/o_Ds": {"distillation": {"use_self_distillation": False}},
    "w/o_kurtosis": {"pruning": {"kurtosis": "off"}},
    "uniform_growth": {"tuning": {"rank_increase_strategy": "uniform"}},
}


def changes_of(ablation: str, pruning: PruningConfig, tuning: TuningConfig) -> Changes:
    """The leaves that an ablation sets, by section. Applying them twice is applying them once.

    Raises:
        ValueError: there is no such ablation; the nearest is named.
    """
    if ablation not in ABLATIONS:
        lower = {name.lower(): name for name in ABLATIONS}
        near = [lower[name] for name in difflib.get_close_matches(str(ablation).lower(), lower, n=1, cutoff=0.3)]
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ValueError(f"config: unknown ablation {ablation!r}; {hint}there are {', '.join(ABLATIONS)}")
    changes = {section: dict(leaves) for section, leaves in ABLATIONS[ablation].items()}
    if ablation == "w/o_Ap" and tuning.num_tuning_events is None and tuning.growth_frequency is None:
        often = pruning.update_frequency  # ranks grow when they would have grown with pruning
        changes["tuning"] = {"num_tuning_events": pruning.num_events} if often is None else {"growth_frequency": often}
    return changes


ALIASES = {  # PEFT's words, and others, for leaves of ours
    "r": "rank",
    "init_r": "rank",
    "prefix_length": "num_virtual_tokens",
    "encoder_hidden_size": "hidden_dimension",
    "encoder_dropout": "dropout_probability",
}


@dataclass(frozen=True, kw_only=True)
class APTConfig:
    """Everything about the method. A leaf's name is enough to override it: ``target_sparsity=0.6``."""

    method: str = "apt"  # a name of `METHODS`
    prune: bool | None = None  # whether units go; null: as the method does it ("apt" prunes, the others do not)
    rank: int = 8  # of every adapter at the start, at least 1
    scale: float = 2.0  # unitless, s in W + s B A (LoRA's alpha / r)
    # names, endings of names, or roles (q, v, up, ...); one text: a regular expression or "all-linear"; None: defaults
    target_modules: tuple[str, ...] | str | None = None
    momentum_salience: float = 0.85  # of the moving averages of salience and importance, [0, 1)
    ablation: str = "full"  # a part of the method left out, whatever its own settings say: "w/o_Ap", "w/o_AT", ...
    verify_events: bool = False  # check after each event that the logits on the latest batch did not move
    adapter: MethodConfig = field(default_factory=MethodConfig)
    prompt: PromptConfig = field(default_factory=PromptConfig)
    pruning: PruningConfig = field(default_factory=PruningConfig)
    tuning: TuningConfig = field(default_factory=TuningConfig)
    distillation: DistillationConfig = field(default_factory=DistillationConfig)

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"config: method must be one of {list(METHODS)}, got {self.method!r}")
        if self.prune is False and METHODS[self.method].prunes:
            raise ValueError(
                f"config: method {self.method!r} prunes; for adapters alone choose 'lora' or another, and "
                f"for ranks that grow alone target_sparsity=0"
            )
        if not METHODS[self.method].adapts and (self.prune or self.target_modules is not None):
            raise ValueError(
                f"config: method {self.method!r} has no adapters: leave out prune and target_modules; a model that is "
                f"pruned already can be trained so"
            )
        if self.prunes and METHODS[self.method].per_example and any(kind.holds_units for kind in self.pruning.kinds):
            raise ValueError(
                f"config: gates of method {self.method!r} count layers from the one that they read, so none can go; "
                f"leave 'layer' out of unit_types, or take another method"
            )
        if self.rank < 1:
            raise ValueError(f"config: rank must be at least 1, got {self.rank}")
        _check_finite(self)
        if self.scale == 0.0:
            raise ValueError("config: scale must not be 0, as no adapter would learn anything")
        if not 0.0 <= self.momentum_salience < 1.0:
            raise ValueError(f"config: momentum_salience must be in [0, 1), got {self.momentum_salience}")
        if self.target_modules is not None:
            if not isinstance(self.target_modules, str):
                object.__setattr__(self, "target_modules", tuple(self.target_modules))
            if not self.target_modules:
                raise ValueError("config: target_modules is empty; name linear layers, or leave it out")
        for section, leaves in changes_of(self.ablation, self.pruning, self.tuning).items():
            object.__setattr__(self, section, replace(getattr(self, section), **leaves))

    @property
    def prunes(self) -> bool:
        """Whether units go, so that every linear of a layer is adapted and its gates are in place."""
        return METHODS[self.method].prunes if self.prune is None else self.prune

    @property
    def prompts(self) -> bool:
        """Whether a prompt trains, and no adapter."""
        return METHODS[self.method].prompt

    @property
    def grows(self) -> bool:
        """Whether ranks grow."""
        return METHODS[self.method].grows and self.tuning.adaptive_rank_update

    def with_overrides(self, **overrides: Any) -> "APTConfig":
        """A copy with leaves replaced by name.

        Raises:
            ValueError: no leaf has that name (the nearest ones are given), or a value is out of range.
        """
        changes: dict[str, dict[str, Any]] = {}
        is_ablated = self.ablation != "full"
        becomes_another = overrides.get("ablation", self.ablation) != self.ablation
        if is_ablated and becomes_another:
            raise ValueError(
                f"config: ablation {self.ablation!r} has replaced settings already, so it cannot become "
                f"{overrides['ablation']!r}; begin with a config that has none"
            )
        twice = [alias for alias, name in ALIASES.items() if alias in overrides and name in overrides]
        if twice:
            raise ValueError(f"config: {twice[0]} and {ALIASES[twice[0]]} are one setting; give one of them")
        for given, value in overrides.items():
            name = ALIASES.get(given, given)
            section = _section_of(self, name)
            changes.setdefault(section, {})[name] = value
        top = changes.pop("", {})
        nested = {section: replace(getattr(self, section), **leaves) for section, leaves in changes.items()}
        return replace(self, **top, **nested)


def _check_finite(config: Any) -> None:
    """Raise ValueError for the first number of a config or its sections that is NaN or infinite."""
    for entry in fields(config):
        value = getattr(config, entry.name)
        if is_dataclass(value):
            _check_finite(value)
            continue
        numbers = value.values() if isinstance(value, dict) else (value,)
        wrong = next((number for number in numbers if isinstance(number, float) and not math.isfinite(number)), None)
        if wrong is not None:
            raise ValueError(f"config: {entry.name} must be a finite number, got {wrong}")


def _section_of(config: APTConfig, name: str) -> str:
    """The section that holds a leaf, "" for the top level."""
    known: dict[str, str] = {}
    for entry in fields(config):
        value = getattr(config, entry.name)
        if is_dataclass(value):
            known.update({leaf.name: entry.name for leaf in fields(value)})
        else:
            known[entry.name] = ""
    if name not in known:
        near = difflib.get_close_matches(name, known, n=3) or sorted(known)
        raise ValueError(f"config: unknown setting {name!r}; did you mean {', '.join(near)}?")
    return known[name]
