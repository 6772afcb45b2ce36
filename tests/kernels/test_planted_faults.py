"""The oracle sees a fault: six are planted in the kernels' source, one at a time, and each must be caught.

A fault that no longer fits the source fails its test as well: then plant it anew.
"""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch
from lora_cases import EVERYTHING, against_reference, make_inputs

from apt_kernels import selection

FAULTS = {  # what is wrong: (file, the line as it is, the line with the fault)
    "a mask off by one": (
        "lowrank",
        "tile *= load_vector(col_by, j, cols)",
        "tile *= load_vector(col_by, j + 1, cols)",
    ),
    "a rank tail cut": (
        "lowrank",
        "mask=(cols[:, None] < P) & (k[None, :] < I)",
        "mask=(cols[:, None] < P - 16) & (k[None, :] < I)",
    ),
    "a scale dropped": ("lowrank", "j, inside) * scale\n", "j, inside)\n"),
    "a store cut short": (
        "products",
        "kept = (row[:, None] < left_T) & (i[None, :] < I)",
        "kept = (row[:, None] < left_T - 1) & (i[None, :] < I)",
    ),
    "rows flipped": ("lowrank", "z_place = rows[:, None]", "z_place = (begin + end - 1 - rows[:, None])"),
    "a partial sum lost": (
        "lowrank",
        "for part in range(num_parts):\n        place = (part * part_rows",
        "for part in range(num_parts - 1):\n        place = (part * part_rows",
    ),
}


def with_fault(source: Path, line: str, fault: str, folder: Path) -> ModuleType:
    """The kernels of a file with one fault in them."""
    text = source.read_text(encoding="utf-8")
    assert text.count(line) == 1, f"{line!r} stands {text.count(line)} times in {source.name}"
    path = folder / f"{source.stem}_with_fault.py"
    path.write_text(text.replace(line, fault), encoding="utf-8")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def oracle(device: str) -> None:
    """What the tests of the op ask of every shape, on one that has tails everywhere and several slices of tokens."""
    inputs = make_inputs((100,), 37, 41, 24, device, **{**EVERYTHING, "gate": "rank"})
    against_reference(inputs, torch.float32, backend="split_triton")


def test_without_a_fault_the_oracle_is_content(device: str) -> None:
    assert "split_triton" in selection.KERNELS["masked_lora_linear"]
    oracle(device)


@pytest.mark.interpreted
@pytest.mark.parametrize("name", FAULTS)
def test_fault_is_caught(name: str, device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from apt_kernels import masked_lora, passes

    file, line, fault = FAULTS[name]
    source = Path(passes.__file__).with_name(f"{file}.py")
    monkeypatch.setattr(passes if file == "lowrank" else masked_lora, file, with_fault(source, line, fault, tmp_path))
    with pytest.raises(AssertionError, match=r"beyond eager's own error|non-finite"):
        oracle(device)
