"""Imports run one way: a room imports what stands above it in its list, and no two files import each other."""

import ast
import re
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOMS = {  # a room is a file or a folder; a new one gets its place here and in docs/architecture.md
    "apt_kernels": "_triton tiles reference autocast operands eager selection loads lowrank products statistics passes "
    "activation kurtosis norms masked_lora masked_lora_group ops",
    "apt": "version files process records families layers pruning repair methods distillation apt_config surgery "
    "training export deploy runs efficient_finetuning doctor cli checkpoint __main__",
}
STRANGERS = [("methods", "pruning"), ("export", "training")]  # the first never imports the second
ROOT = Path(__file__).parent.parent
PATHS = sorted(path for top in (*ROOMS, "bench") for path in (ROOT / top).rglob("*.py"))
FILES = {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in PATHS}


def imports(module: str) -> set[str]:
    """What of ours a module imports, wherever in the file that is."""
    names = set()
    for node in ast.walk(ast.parse(FILES[module].read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return {name if name in FILES else name.rpartition(".")[0] for name in names} & FILES.keys() - {module}


@pytest.mark.parametrize("module", [name for name in FILES if "." in name and not name.startswith("bench")])
def test_a_room_imports_only_rooms_above_it(module: str) -> None:
    top, room = module.split(".")[:2]
    rooms = ROOMS[top].split()
    above = [name for name in rooms[: rooms.index(room) + 1] if (room, name) not in STRANGERS]
    allowed = tuple(f"{top}.{name}." for name in above) + ("apt_kernels.",) * (top == "apt")
    wrong = [name for name in imports(module) if not f"{name}.".startswith(allowed)]
    assert not wrong, f"{module} reaches down or sideways to {wrong}"


def test_no_two_files_import_each_other_by_whatever_way_round() -> None:
    assert list(TopologicalSorter({module: imports(module) for module in FILES}).static_order())


@pytest.mark.parametrize("top", ROOMS)
def test_the_page_of_the_architecture_shows_these_rooms(top: str) -> None:
    tree = (ROOT / "docs/architecture.md").read_text(encoding="utf-8").partition(f"\n{top}/")[2].partition("\n")[2]
    assert re.findall(r"(?m)^  (\w+)(?:/|\.py) ", re.split(r"(?m)^\S", tree)[0]) == ROOMS[top].split()


@pytest.mark.parametrize("package", ROOMS)
def test_import_is_light_and_finds_ours(package: str) -> None:
    code = f"import sys, {package}; print(*{package}.__path__); print(*sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert Path(run.stdout.splitlines()[0]) == ROOT / package
    assert not re.findall(r"(?:^| )(transformers\.models\.(?!auto\b)\w+|triton|datasets|matplotlib)(?= |$)", run.stdout)
