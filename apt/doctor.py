"""Whether a run could work here, and what would keep it from that. Loads torch late: it may be what is broken."""

import importlib.metadata
import importlib.util
import os
import platform
import re
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

from apt.version import __version__

PYTHON = "3.10"
NEEDED = {  # distribution -> the oldest version that works; "" is any
    "torch": "2.6",
    "transformers": "5.15",
    "accelerate": "1.10",
    "safetensors": "",
    "numpy": "",
    "pyyaml": "",
    "rich": "",
    "tqdm": "",
    "psutil": "",
}
OPTIONAL = {  # distribution -> what it is for, and what installs it
    "triton": ("kernels on a GPU", "pip install triton"),
    "datasets": ("data from the hub", 'pip install "apt-lm[train]"'),
    "pandas": ("csv and parquet files", 'pip install "apt-lm[train]"'),
    "scikit-learn": ("scores of classes", 'pip install "apt-lm[train]"'),
    "scipy": ("scores of numbers", 'pip install "apt-lm[train]"'),
    "rouge-score": ("scores of texts", 'pip install "apt-lm[train]"'),
    "peft": ("baselines, adapters of PEFT", 'pip install "apt-lm[peft]"'),
    "trl": ("SFT, DPO and other trainers with pruning", 'pip install "apt-lm[trainers]"'),
    "sentence-transformers": ("their trainer with pruning", 'pip install "apt-lm[trainers]"'),
    "gguf": ("GGUF files, read and written", 'pip install "apt-lm[gguf]"'),
    "cyllama": ("llama.cpp: K-quants, checks of GGUF files", 'pip install "apt-lm[llamacpp]"'),
    "onnxruntime": ("export for ONNX Runtime", 'pip install "apt-lm[onnx]"'),
    "openvino": ("export for OpenVINO", 'pip install "apt-lm[openvino]"'),
    "mlx-lm": ("checks of exports for mlx-lm", 'pip install "apt-lm[mlx]"'),
    "vllm": ("checks of exports for vLLM", 'pip install "apt-lm[vllm]"'),
    "lm_eval": ("scores on benchmark tasks", 'pip install "apt-lm[harness]"'),
}
WIDTH = 100  # columns, where the output is no terminal


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at."""

    subject: str
    found: str
    advice: str | None = None  # what to do about it; None: it is as it should be
    broken: bool = False  # no run can work as long as it is so


def diagnose() -> list[Finding]:
    """Everything that is looked at, in the order in which it is shown. Nothing is changed."""
    findings = [Finding("apt-lm", __version__), *versions(), *import_name(sys.path)]
    if importlib.util.find_spec("torch") is None:
        return findings  # it is among what is missing
    try:
        import torch
    except (ImportError, OSError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        return [*findings, Finding("import torch", reason, "install torch again: https://pytorch.org", broken=True)]
    gpus = [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    findings += [processor(torch.get_num_threads()), *map(gpu, gpus)]
    if not gpus:
        findings.append(Finding("GPU", "torch finds none; runs use the CPU"))
    default = gpus[0] if gpus else torch.device("cpu")
    for device in [torch.device("cpu"), *gpus]:
        findings.append(backend(device, default=device == default))
    if os.environ.get("TRITON_INTERPRET") == "1":
        findings.append(
            Finding("TRITON_INTERPRET", "1: kernels are interpreted, thousands of times slower", "unset it to train")
        )
    return findings


def versions(installed: dict[str, str] | None = None, python: str | None = None) -> list[Finding]:
    """Python and the packages that a run needs, then those that only some runs do.

    Args:
        installed: version by distribution; None looks.
        python: its version; None is that of this process.
    """
    python = python or platform.python_version()
    old = _older(python, PYTHON)
    findings = [Finding("python", python, f"use Python {PYTHON} or later" if old else None, broken=old)]
    if installed is None:
        installed = {name: found for name in (*NEEDED, *OPTIONAL) if (found := _version(name)) is not None}
    for name, least in NEEDED.items():
        version = installed.get(name)
        wrong = version is None or _older(version, least)
        asked = f"'{name}>={least}'" if least else name
        findings.append(Finding(name, version or "missing", f"pip install {asked}" if wrong else None, broken=wrong))
    for name, (purpose, command) in OPTIONAL.items():
        version = installed.get(name)
        findings.append(
            Finding(name, version or f"missing ({purpose})", None if version else f"{command}, if you need it")
        )
    return findings


def import_name(paths: Sequence[str]) -> list[Finding]:
    """Which packages of the name `apt` lie on a module path: ours, and what clashes with it.

    Debian's python3-apt has that name too. The first entry is that of this process alone (the present folder with
    ``python -m``, else that of the script), so what follows it decides for everybody else.
    """
    ours = Path(__file__).resolve().parent
    everywhere = packages(paths[1:])
    findings = [Finding("import apt", str(ours))]
    if ours not in everywhere:
        alone = "is found from the present folder alone"
        findings.append(Finding("import apt", f"{ours} {alone}", "pip install -e . for scripts that lie elsewhere"))
    for folder in packages(paths):
        if folder != ours:
            clash = "hides ours from scripts that lie elsewhere" if everywhere[:1] == [folder] else "is hidden by ours"
            advice = "use a virtual environment without the system's packages, so that neither hides the other"
            findings.append(Finding("import apt", f"{folder} {clash}", advice))
    return findings


def packages(paths: Iterable[str]) -> list[Path]:
    """Folders of packages named `apt`, in the order of a module path."""
    specs = [PathFinder.find_spec("apt", [entry or os.getcwd()]) for entry in paths]
    origins = [Path(spec.origin).resolve() for spec in specs if spec is not None and spec.origin is not None]
    return list(dict.fromkeys(origin.parent for origin in origins))


def processor(threads: int) -> Finding:
    """Cores, threads of torch, memory."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    memory = ""
    if "SC_PHYS_PAGES" in os.sysconf_names:
        memory = f", {os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') / 1e9:.1f} GB"
    advice = f"set OMP_NUM_THREADS or hardware.num_threads to at most {cores}" if threads > cores else None
    return Finding("CPU", f"{cores} cores, {threads} threads of torch{memory}", advice)


def gpu(device: Any) -> Finding:
    """Name, memory and compute capability, and whether the kernels were measured on it."""
    import torch

    from apt_kernels.selection import has_table

    found = torch.cuda.get_device_properties(device)
    table = "measured table" if has_table(device) else "no measured table"
    return Finding(
        f"GPU {device.index}",
        f"{found.name}, {found.total_memory / 1e9:.1f} GB, sm_{found.major}{found.minor}, {table}",
    )


def backend(device: Any, *, default: bool) -> Finding:
    """What would run on a device, and why.

    Args:
        device: of torch.
        default: whether a run takes it unasked, so that it must work.
    """
    from apt_kernels import backend_of
    from apt_kernels.selection import has_table

    subject = f"backend on {device}"
    try:
        name, reason = backend_of(device)
    except ValueError as error:
        return Finding(subject, str(error), "unset APT_BACKEND", broken=default)
    unmeasured = device.type == "cuda" and "APT_BACKEND" not in os.environ and not has_table(device)
    advice = "python -m bench.kernels --tune measures it, and kernels then run where they win" if unmeasured else None
    return Finding(subject, f"{name}: {reason}", advice)


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _older(version: str, least: str) -> bool:
    def numbers(text: str) -> list[int]:
        return [int(part) for part in re.findall(r"\d+", text.partition("+")[0])[:3]]

    return numbers(version) < numbers(least)


def print_findings(findings: Sequence[Finding]) -> None:
    """A table of all that was found, then a line of advice for each problem, what is broken first."""
    problems = sorted((f for f in findings if f.advice is not None), key=lambda finding: not finding.broken)
    lines = [f"{'broken' if f.broken else 'note'}: {f.subject}: {f.found}: {f.advice}" for f in problems]
    lines.append("a run cannot work here" if any(f.broken for f in findings) else "a run can work here")
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:  # it is among what is looked for
        print("\n".join([*(f"{f.subject}: {f.found}" for f in findings), *lines]))
        return
    console = Console()
    if not console.is_terminal:
        console = Console(width=WIDTH)
    table = Table(show_header=False)
    for finding in findings:
        color = "yellow" if finding.advice else None
        table.add_row(finding.subject, finding.found, style="red" if finding.broken else color)
    console.print(table)
    for line in lines:
        console.print(line, markup=False, highlight=False, soft_wrap=True)
