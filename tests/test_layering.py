"""Imports run one way. A new file in `apt/` is given its place in ROOMS in the commit that adds it."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOMS = [  # a room (a file, or a folder of files) imports apt_kernels and the rooms above it
    "files",
    "version",
    "doctor",
    "records",
    "clock",
    "modes",
    "memory",
    "schedule",
    "families",
    "gates",
    "linears",
    "adapters",
    "fused",
    "activations",
    "hidden",
    "units",  # a unit group names the gate and the linears it cuts
    "dimensions",
    "prices",
    "times",
    "methods",
    "prompts",
    "salience",
    "pruner",
    "tuner",
    "distiller",
    "moments",
    "surgery",
    "latency",
    "controller",
    "peft_fusion",
    "task_head",
    "patch",
    "gate_files",
    "document_keys",
    "presets",
    "config",
    "data",
    "tasks",
    "metrics",
    "answers",
    "dry_run",
    "footprint",
    "simulation",
    "estimate",
    "language",
    "evaluate",
    "checkpoint",
    "batches",
    "recorder",
    "whole_checkpoints",
    "trainer",
    "stock",
    "model_card",
    "export",
    "fusion",
    "peft_files",
    "report",
    "harness",
    "run_folder",
    "measure",
    "run",
    "experiment",
    "efficient_finetuning",
    "cli",
    "__main__",
]
THIN_CALLS = {("pruner", "surgery"), ("tuner", "surgery")}  # inside a function only: apply_mask, adjust_ranks

ROOT = Path(__file__).parent.parent
APT = sorted(p for p in (ROOT / "apt").rglob("*.py") if p != ROOT / "apt/__init__.py")
KERNELS = sorted((ROOT / "apt_kernels").rglob("*.py"))


def imports(path: Path) -> Iterator[tuple[str, bool]]:
    """Every name a file imports, in full (``apt.units.UnitGroup``), and whether it stands inside a function."""

    def walk(node: ast.AST, inside: bool) -> Iterator[tuple[str, bool]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                yield from ((alias.name, inside) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                package = path.relative_to(ROOT).parent.parts
                base = package[: len(package) - child.level + 1] if child.level else ()
                source = ".".join((*base, *filter(None, [child.module])))
                yield from ((f"{source}.{alias.name}", inside) for alias in child.names)
            yield from walk(child, inside or isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef))

    yield from walk(ast.parse(path.read_text(encoding="utf-8")), False)


def room_of(path: Path) -> str:
    return Path(path.relative_to(ROOT / "apt").parts[0]).stem


@pytest.mark.parametrize("path", APT, ids=lambda p: str(p.relative_to(ROOT)))
def test_a_room_imports_only_rooms_above_it(path: Path) -> None:
    room = room_of(path)
    assert room in ROOMS, f"{path.name} has no place in ROOMS"
    allowed = set(ROOMS[: ROOMS.index(room)])
    if path.parent != ROOT / "apt":
        allowed.add(room)  # files of one folder are one room
    wrong = []
    for name, inside in imports(path):
        package, _, rest = name.partition(".")
        target = rest.partition(".")[0]
        if package == "apt" and target not in allowed and not (inside and (room, target) in THIN_CALLS):
            wrong.append(name)
    assert not wrong, f"{room} reaches down or sideways to {wrong}"


@pytest.mark.parametrize("path", KERNELS, ids=lambda p: p.name)
def test_kernels_know_tensors_only(path: Path) -> None:
    wrong = [name for name, _ in imports(path) if name.split(".")[0] in ("apt", "transformers", "peft")]
    assert not wrong, f"apt_kernels/{path.name} imports {wrong}"


BELOW_OPS = [p for p in KERNELS if p.parent.name != "ops" and p != ROOT / "apt_kernels/__init__.py"]


@pytest.mark.parametrize("path", BELOW_OPS, ids=lambda p: str(p.relative_to(ROOT)))
def test_no_kernel_imports_the_public_ops(path: Path) -> None:
    rooms = {p.relative_to(ROOT / "apt_kernels").parts[0].removesuffix(".py") for p in BELOW_OPS}
    names = [name.split(".") for name, _ in imports(path)]
    wrong = [".".join(parts) for parts in names if parts[0] == "apt_kernels" and not rooms.intersection(parts[1:2])]
    assert not wrong, f"{path.name} imports {wrong}, which are made of it"


@pytest.mark.parametrize("package", ["apt", "apt_kernels"])
def test_import_is_light_and_finds_ours(package: str) -> None:
    code = f"import sys, {package}; print(*{package}.__path__); print(*sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    found, modules = run.stdout.splitlines()
    assert Path(found) == ROOT / package
    heavy = re.compile(r"transformers\.models\.(?!auto\b)\w+|triton|datasets|matplotlib")  # `auto` is a table of names
    drawn_in = [name for name in modules.split() if heavy.fullmatch(name)]
    assert not drawn_in, f"importing {package} imports {drawn_in}"
