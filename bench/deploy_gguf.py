"""A pruned decoder beside the dense one in llama.cpp: bytes, perplexity, tokens a second, by number type.

``python -m bench.deploy_gguf NAME=FOLDER ... [--config examples/smollm2.yaml] [--types f16 q8_0 q4_0]``

FOLDER is an export of a model that was pruned from that of the config. Every model is written in every type by
`apt.deploy`. Perplexity is that of held-out blocks of the config's text; a prompt, and tokens one by one behind it, are
timed with one thread, models and types in turns. One row each in bench/results/cpu/deploy_gguf.csv; the table beside it
is drawn from them.
"""

import argparse
import math
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from apt.deploy.export import export_source
from apt.deploy.gguf import FILE
from apt.deploy.gguf_run import LlamaCpp
from apt.runs.config import RunConfig, load_config
from apt.runs.data import TextLoader
from apt.runs.models import build_model, build_tokenizer
from bench.plan import results
from bench.rows import append_rows, environment, quantiles, read_rows
from bench.timing import Clock, Times

DENSE = "dense"
NEW_TOKENS = 32  # that are timed one by one
PHASES = ("prompt", "generation")


def files(config: RunConfig, pruned: dict[str, Path], types: list[str], folder: Path) -> dict[tuple[str, str], Path]:
    """Every model in every type, by both names."""
    tokenizer = build_tokenizer(config)
    build_model(config, None, tokenizer).save_pretrained(folder / DENSE)
    tokenizer.save_pretrained(folder / DENSE)
    found = {}
    for kind in types:
        for name, source in {DENSE: folder / DENSE, **pruned}.items():
            written = export_source(source, "gguf", folder / f"{name}-{kind}", quantise=kind)
            found[name, kind] = written / FILE
    return found


def perplexity(model: LlamaCpp, blocks: list[list[int]]) -> float:
    """Of blocks of text, each on its own."""
    total, tokens = 0.0, 0
    for ids in blocks:
        model.fresh()
        logits, wanted = model.logits(ids)[:-1], torch.tensor(ids[1:])
        total += float(cross_entropy(logits, wanted, reduction="sum"))
        tokens += len(wanted)
    return math.exp(total / tokens)


def times_of(models: dict[tuple[str, str], LlamaCpp], prompt: list[int], runs: int) -> dict[str, dict[Any, Times]]:
    """Times by phase and model, all models in turns."""

    def reads(model: LlamaCpp) -> None:
        model.fresh()
        model.feed(prompt)

    def writes(model: LlamaCpp) -> None:
        model.fresh()
        for token in prompt[:NEW_TOKENS]:
            model.feed([token])

    clock = Clock(torch.device("cpu"), runs=runs, seconds=600.0, warmup=1)
    works = dict(zip(PHASES, (reads, writes), strict=True))
    return {
        phase: clock.interleaved({key: [lambda w=work, m=model: w(m)] for key, model in models.items()})  # type: ignore[misc]
        for phase, work in works.items()
    }


def measure(config: RunConfig, pruned: dict[str, Path], types: list[str], blocks: int, runs: int) -> list[Any]:
    """Rows of every model and type."""
    data = TextLoader(config.data, build_tokenizer(config), config.training.seed)
    texts = [[int(token) for token in ids] for ids in data.test.columns["input_ids"][:blocks]]
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        paths = files(config, pruned, types, Path(folder))
        models = {key: LlamaCpp(path, max(map(len, texts))) for key, path in paths.items()}
        times = times_of(models, texts[0], runs)
        for (name, kind), model in models.items():
            row = {"what": "deploy_gguf", "config": config.model.name, "model": name, "type": kind}
            row |= {"mib": round(paths[name, kind].stat().st_size / 2**20, 1)}
            row |= {"perplexity": round(perplexity(model, texts), 3), "test_tokens": sum(len(t) - 1 for t in texts)}
            for phase, tokens in zip(PHASES, (len(texts[0]), min(NEW_TOKENS, len(texts[0]))), strict=True):
                mine = times[phase][name, kind]
                p20, p50, p80 = (1e3 * tokens / ms for ms in reversed(quantiles(mine.device_ms)))
                row |= {f"{phase}_tokens_per_s_{q}": round(v, 2) for q, v in (("p20", p20), ("p50", p50), ("p80", p80))}
                row |= {f"{phase}_speedup": times[phase][DENSE, kind].over(mine)}
            row |= {"runs": runs, "load": round(os.getloadavg()[0], 1), "program": model.program}
            rows.append(row | environment())
    return rows


def table(rows: list[dict[str, str]]) -> str:
    """The latest row of each model and type."""
    latest = {(row["config"], row["device"], row["type"], row["model"]): row for row in rows}
    lines = [
        "| type | model | MiB | perplexity | prompt, tokens/s | times dense | generation, tokens/s | times dense |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in latest.values():
        speeds = [row[f"{phase}_{name}"] for phase in PHASES for name in ("tokens_per_s_p50", "speedup")]
        cells = [row["type"], row["model"], row["mib"], row["perplexity"], *speeds]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("pruned", nargs="+", metavar="NAME=FOLDER", help="an export")
    parser.add_argument("--config", type=Path, default=Path("examples/smollm2.yaml"))
    parser.add_argument("--types", nargs="+", default=["f16", "q8_0", "q4_0"])
    parser.add_argument("--blocks", type=int, default=8, help="of held-out text")
    parser.add_argument("--runs", type=int, default=15)
    parser.add_argument("--out", type=Path, default=results("deploy_gguf"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    pruned = {name: Path(folder) for name, _, folder in (given.partition("=") for given in arguments.pruned)}
    config = load_config(arguments.config)
    append_rows(arguments.out, measure(config, pruned, arguments.types, arguments.blocks, arguments.runs))
    text = table(read_rows(arguments.out))
    arguments.out.with_suffix(".md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
