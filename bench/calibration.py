"""A decoder right after pruning, before any tuning: held-out perplexity by salience, kurtosis, balance and layout.

``python -m bench.calibration [--config examples/smollm2.yaml] [--seeds 0 1] [--blocks 16] [--test-blocks 8]``

The statistics of a seed are summed over its own blocks of the training text (those of two seeds share none), once for
all variants; masks stand for the cut, which computes the same. One CSV row a variant and seed; rows that are there
already are skipped. The Markdown table beside the CSV is drawn from the CSV alone.
"""

import argparse
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import apt
from apt.families import anatomy_of
from apt.pruning import PruningConfig, UnitSearch
from apt.pruning.salience import SALIENCES, OutlierTerm, unit_scores
from apt.pruning.units import UnitGroup, block_params, find_units
from apt.runs.config import RunConfig, load_config
from apt.runs.data import Examples, TextLoader
from apt.runs.evaluation.language import perplexity
from apt.runs.models import build_model, build_tokenizer
from bench.plan import results
from bench.rows import append_row, environment, read_rows

KURTOSES = ("off", "paper", "normalized")
BALANCES = ("type", "none")
KEYS = ("seed", "salience", "kurtosis", "balance", "layout")
Scores = dict[str, Tensor]


def variants(seed: int) -> Iterator[dict[str, Any]]:
    """What is compared; the uniform layout once a salience, as balance hardly moves it."""
    for salience, kurtosis, balance in itertools.product(SALIENCES, KURTOSES, BALANCES):
        if salience != "magnitude" or kurtosis == "off":
            yield dict(zip(KEYS, (seed, salience, kurtosis, balance, "free"), strict=True))
    for salience in SALIENCES:
        yield dict(zip(KEYS, (seed, salience, "off", "type", "uniform"), strict=True))


def static_scores(
    model: nn.Module, groups: list[UnitGroup], blocks: Examples, batch_size: int
) -> dict[tuple[str, str], Scores]:
    """Scores summed over batches, for every kurtosis and every salience that reads data."""
    terms = {kurtosis: OutlierTerm(kurtosis) for kurtosis in KURTOSES}
    sums: dict[tuple[str, str], Scores] = {}
    for start in range(0, len(blocks), batch_size):
        ids = torch.tensor(blocks.columns["input_ids"][start : start + batch_size])
        for products in (False, True):
            for group in groups:
                group.mask.collecting, group.mask.products, group.mask.totals = True, products, group.kind == "head"
                group.mask.reset_sums()
            out: Any = model(input_ids=ids, labels=ids)
            out.loss.backward()
            model.zero_grad(set_to_none=True)
            for salience in ("sum_of_products", "gate_taylor") if products else ("product_of_sums",):
                scores = {group.name: unit_scores(group, 1.0, salience) for group in groups}
                for kurtosis, term in terms.items():
                    table = sums.setdefault((salience, kurtosis), {})
                    for name, value in term.add(groups, scores).items():
                        table[name] = table.get(name, 0.0) + value
    for group in groups:
        group.mask.collecting = group.mask.products = group.mask.totals = False
    return sums


def shut(groups: list[UnitGroup], kept: dict[str, list[int]]) -> None:
    for group in groups:
        mask = torch.zeros(group.num_units)
        mask[kept[group.name]] = 1.0
        group.mask.set_mask(mask)


def counts(groups: list[UnitGroup], kind: str) -> str:
    return " ".join(str(int(group.mask.values.sum())) for group in groups if group.kind == kind)


def study(config: RunConfig, seeds: list[int], num_blocks: int, test_blocks: int, out: Path) -> None:
    """Measure every variant that has no row yet."""
    tokenizer = build_tokenizer(config)
    data = TextLoader(config.data, tokenizer, config.training.seed)
    test = Examples({name: column[:test_blocks] for name, column in data.test.columns.items()})
    plain = build_model(config, None, tokenizer).eval()
    dense = perplexity(plain, test, config.evaluation.inference_batch_size)["perplexity"]
    model = apt.patch_model(plain, config.apt_config()).eval()
    anatomy = anatomy_of(model)
    groups, total = find_units(anatomy), block_params(anatomy)
    order = torch.randperm(len(data.train), generator=torch.Generator().manual_seed(0)).tolist()
    setting = {"config": config.output_dir, "blocks": num_blocks, "block_length": config.data.block_length}
    for seed in seeds:
        todo = [v for v in variants(seed) if not _measured(out, v, num_blocks)]
        if not todo:
            continue
        chosen = order[seed * num_blocks : (seed + 1) * num_blocks]
        blocks = Examples({name: [column[i] for i in chosen] for name, column in data.train.columns.items()})
        shut(groups, {group.name: list(range(group.num_units)) for group in groups})
        sums = {("magnitude", "off"): {group.name: unit_scores(group, 1.0, "magnitude") for group in groups}}
        if any(variant["salience"] != "magnitude" for variant in todo):
            sums |= static_scores(model, groups, blocks, config.training.batch_size)
        for variant in todo:
            options = {key: variant[key] for key in ("salience", "balance", "layout")}
            settings = PruningConfig(target_sparsity=config.pruning.target_sparsity, **options)
            pruner = UnitSearch(total, settings)
            scores = sums[variant["salience"], variant["kurtosis"]]
            shut(groups, pruner.plan(groups, scores, total, 0, settings.target_sparsity).kept)
            scored = perplexity(model, test, config.evaluation.inference_batch_size)
            row = variant | {"perplexity": round(scored["perplexity"], 3), "dense": round(dense, 3)}
            row |= {"heads": counts(groups, "head"), "neurons": counts(groups, "neuron")}
            append_row(out, row | setting | {"test_tokens": scored["test_tokens"]} | environment())
            print({key: row[key] for key in (*KEYS, "perplexity")}, flush=True)


def _measured(out: Path, variant: dict[str, Any], num_blocks: int) -> bool:
    wanted = {key: str(value) for key, value in variant.items()} | {"blocks": str(num_blocks)}
    return any(all(row[key] == value for key, value in wanted.items()) for row in read_rows(out))


def table(rows: list[dict[str, str]]) -> str:
    """Perplexity of each variant by calibration seed, and how heads and neurons were spent."""
    seeds = sorted({row["seed"] for row in rows})
    lines = [
        f"| salience | kurtosis | balance | layout | {' | '.join(f'seed {s}' for s in seeds)} | heads | neurons |",
        "|" + "---|" * (6 + len(seeds)),
    ]
    for key in dict.fromkeys(tuple(row[name] for name in KEYS[1:]) for row in rows):
        mine = {row["seed"]: row for row in rows if tuple(row[name] for name in KEYS[1:]) == key}
        first = next(iter(mine.values()))
        cells = [_readable(mine[seed]["perplexity"]) if seed in mine else "" for seed in seeds]
        sums = [f"{sum(map(int, first[name].split())):,}" for name in ("heads", "neurons")]
        lines.append("| " + " | ".join([*key, *cells, *sums]) + " |")
    return "\n".join(lines) + "\n"


def _readable(number: str) -> str:
    value = float(number)
    return f"{value:,.1f}" if value < 1e6 else f"{value:.0e}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", type=Path, default=Path("examples/smollm2.yaml"))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--blocks", type=int, default=16, help="of training text, for the statistics of a seed")
    parser.add_argument("--test-blocks", type=int, default=8, help="of held-out text")
    parser.add_argument("--out", type=Path, default=results("calibration"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    study(load_config(arguments.config), arguments.seeds, arguments.blocks, arguments.test_blocks, arguments.out)
    text = table(read_rows(arguments.out))
    arguments.out.with_suffix(".md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
