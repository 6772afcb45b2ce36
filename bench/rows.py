"""The one row format: a measured number with all it depends on, appended to a CSV file."""

import csv
import importlib.metadata
import os
import platform
import shutil
import subprocess
from pathlib import Path
from typing import Any

import torch

from apt.files.whole import write_file_aside


def environment() -> dict[str, Any]:
    """Machine, versions and commit, as columns of every row."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"cpu x{torch.get_num_threads()}"
    return {
        "device": device,
        "torch": torch.__version__,
        "triton": _version("triton"),
        "transformers": _version("transformers"),
        "python": platform.python_version(),
        "commit": os.environ.get("COMMIT") or _commit(),
    }


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _commit() -> str:
    """Empty where the source tree was copied without its history; COMMIT names it there."""
    if shutil.which("git") is None:
        return ""
    command = ["git", "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


def read_rows(path: Path) -> list[dict[str, str]]:
    """The rows of a result file, none where it does not exist yet."""
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def append_row(path: Path, row: dict[str, Any]) -> None:
    """Add one row; see `append_rows`."""
    append_rows(path, [row])


def append_rows(path: Path, new: list[dict[str, Any]]) -> None:
    """Add rows by writing the whole file under a temporary name: a run that is killed leaves the old file."""
    rows = [*read_rows(path), *({key: str(value) for key, value in row.items()} for row in new)]
    with write_file_aside(path) as partial, partial.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(dict.fromkeys(key for r in rows for key in r)))
        writer.writeheader()
        writer.writerows(rows)


def quantiles(values: list[float]) -> tuple[float, float, float]:
    """p20, p50 and p80."""
    p20, p50, p80 = torch.quantile(torch.tensor(values, dtype=torch.float64), torch.tensor([0.2, 0.5, 0.8]).double())
    return float(p20), float(p50), float(p80)
