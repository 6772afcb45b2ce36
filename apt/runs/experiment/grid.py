"""What a grid asks for: the file, and the runs it stands for."""

import difflib
import itertools
import json
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from apt.apt_config import ABLATIONS
from apt.files.reading import shown
from apt.methods import METHODS
from apt.runs.config import RunConfig, load_config, read_table

UNPRUNED = "w/o_Ap"  # the ablation that has no sparsity
REQUIRED = ("output_dir", "config")
SET_BY = {  # setting of a run -> what in the grid says it
    "method": "methods",
    "target_sparsity": "sparsities",
    "ablation": "ablations",
    "seed": "seeds",
    "output_dir": "output_dir",
}


@dataclass(frozen=True, kw_only=True)
class Grid:
    """The settings of an experiment. Every method meets every seed; those that prune, every sparsity too."""

    output_dir: str  # one folder a run, and the tables and pages of all
    config: str  # YAML file of a run, which all runs begin with; relative to the file of the grid, or to where one is
    methods: dict[str, dict[str, Any]] = field(default_factory=lambda: {"lora": {}, "apt": {}})  # each: key -> setting
    sparsities: list[float] = field(default_factory=lambda: [0.6])  # of the methods that prune, [0, 1)
    ablations: list[str] = field(default_factory=lambda: ["full"])  # of method apt, at every sparsity; "full": none
    seeds: list[int] = field(default_factory=lambda: [0])
    settings: dict[str, Any] = field(default_factory=dict)  # of all runs: key -> setting, none that the grid sets
    # one run at a time on each, by accelerate launch; []: one after the other
    gpus: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        _check_list("sparsities", self.sparsities, (int, float), "a list of numbers")
        _check_list("ablations", self.ablations, (str,), "a list of names")
        _check_list("seeds", self.seeds, (int,), "a list of whole numbers")
        _check_list("gpus", self.gpus, (int,), "a list of whole numbers", least=0)
        methods = {name: {} for name in self.methods} if isinstance(self.methods, list) else self.methods
        if not isinstance(methods, dict) or not all(isinstance(own, dict | None) for own in methods.values()):
            raise ValueError(f"experiment: methods must be a list of names, or a table of tables, got {shown(methods)}")
        if not isinstance(self.settings, dict):
            raise ValueError(f"experiment: settings must be a table of key: value, got {shown(self.settings)}")
        object.__setattr__(self, "methods", {name: own or {} for name, own in methods.items()})
        _check_names("methods", self.methods, METHODS)
        _check_names("ablations", self.ablations, ABLATIONS)
        if not self.methods:
            raise ValueError("experiment: methods is empty; name at least one, or leave it out")
        for where, settings in (
            ("settings", self.settings),
            *((f"methods.{n}", own) for n, own in self.methods.items()),
        ):
            _check_settings(where, settings)


def _check_settings(where: str, settings: dict[str, Any]) -> None:
    """Refuse what the grid itself sets in every run: it would be dropped, or be dropped by it, without a word."""
    for key in settings:
        leaf = str(key).rpartition(".")[2]
        if leaf in SET_BY:
            raise ValueError(f"experiment: {where} has {key!r}, which {SET_BY[leaf]} of the grid sets; leave it out")


def _check_list(key: str, values: Any, kinds: tuple[type, ...], words: str, least: int = 1) -> None:
    right = isinstance(values, list) and all(isinstance(v, kinds) and not isinstance(v, bool) for v in values)
    if not right or len(values) < least:
        raise ValueError(f"experiment: {key} must be {words}, got {shown(values)}")


def _check_names(key: str, names: Iterable[str], known: Iterable[str]) -> None:
    for name in names:
        if name not in known:
            raise ValueError(f"experiment: {key} has {shown(name)}; there are {', '.join(known)}")


@dataclass(frozen=True)
class Cell:
    """One run of a grid."""

    name: str  # of its folder
    overrides: list[str]  # key=value, on top of the grid's config
    config: RunConfig  # what comes of that


def load_grid(path: Path) -> Grid:
    """Read the file of a grid.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: broken YAML, an unknown key, a value that is not what it must be.
    """
    known = [entry.name for entry in fields(Grid)]
    document = read_table(path, "experiment", f"the keys {', '.join(known)}")
    for key in document:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1) or known
            raise ValueError(f"experiment: unknown key {shown(key)}; did you mean {' or '.join(near)}?")
    for key in REQUIRED:
        if not isinstance(document.get(key), str):
            raise ValueError(f"experiment: {key} is missing in {path}; it must be text")
    beside = path.parent / document["config"]
    return Grid(**{**document, "config": str(beside if beside.exists() else document["config"])})


def cells(grid: Grid) -> list[Cell]:
    """The runs, seed by seed, so that a grid stopped early compares all methods on the seeds it had.

    Raises:
        ValueError: a setting of a run is unknown or out of range; no run has begun then.
    """
    found = []
    for seed, (method, own) in itertools.product(grid.seeds, grid.methods.items()):
        for name, overrides in _variants(grid, method):
            settings = {**grid.settings, **overrides, **own}
            pairs = [f"{key}={_text(value)}" for key, value in settings.items()]
            folder = Path(grid.output_dir) / f"{name}-seed{seed}"
            pairs += [f"model.method={method}", f"training.seed={seed}", f"output_dir={folder}"]
            found.append(Cell(folder.name, pairs, load_config(grid.config, pairs)))
    names = [cell.name for cell in found]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ValueError(f"experiment: two runs would be {twice}; seeds, sparsities and ablations must differ")
    return found


def _variants(grid: Grid, method: str) -> list[tuple[str, dict[str, Any]]]:
    """Name and settings of each way a method runs: by sparsity and ablation where it has them."""
    if not _prunes(grid, method):
        return [(method, {} if METHODS[method].adapts else {"model.target_modules": None})]
    found: list[tuple[str, dict[str, Any]]] = []
    unpruned = False
    for sparsity, ablation in itertools.product(grid.sparsities, grid.ablations if method == "apt" else ["full"]):
        if ablation == UNPRUNED:
            if not unpruned:  # once, whatever the sparsities
                found.append((f"{method}-{ablation.replace('/', '')}", {"ablation": ablation}))
            unpruned = True
        else:
            name = f"{method}-{100 * sparsity:g}" + ("" if ablation == "full" else f"-{ablation.replace('/', '')}")
            found.append((name, {"pruning.target_sparsity": sparsity, "ablation": ablation}))
    return found


def _prunes(grid: Grid, method: str) -> bool:
    own = grid.methods[method]
    return METHODS[method].prunes or bool(own.get("prune", own.get("model.prune")))


def _text(value: Any) -> str:
    """A value as an override gives it; JSON is YAML."""
    return value if isinstance(value, str) else json.dumps(value)
