"""How far half precision moves the scores that the first plan is made from: ``python -m bench.half_scores``.

The same batches of one model, at random weights, in float64, in float32, and under autocast in bfloat16 and float16.
The difference of the scores is that of the activations and gradients: the sums over tokens are float32 in all of them.
One CSV row a dtype.
"""

import argparse
import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import apt
from apt.families import anatomy_of
from apt.pruning import PruningConfig, UnitSearch
from apt.pruning.salience import unit_scores
from apt.pruning.units import UnitGroup, block_params, find_units
from bench import plan
from bench.rows import append_row, environment
from bench.shapes import SHAPES, Shape

TARGET = 0.6
LOSS_SCALE = 2.0**16  # under float16, with which torch.amp.GradScaler starts
Scores = dict[str, Tensor]


def scored(model: Any, shape: Shape, batches: int, half: torch.dtype | None) -> tuple[list[UnitGroup], Scores]:
    """The unit groups of a patched model, and their scores summed over batches that are the same in every call."""
    anatomy = anatomy_of(model)
    groups = find_units(anatomy)
    scale = LOSS_SCALE if half == torch.float16 else 1.0
    for group in groups:
        group.mask.collecting = True
    for seed in range(batches):
        torch.manual_seed(seed)
        batch: Any = shape.inputs(model, "cpu")
        batch["input_ids"] = torch.randint_like(batch["input_ids"], 5, model.config.vocab_size)
        batch["attention_mask"] = (torch.rand(batch["input_ids"].shape) > 0.2).long()  # a fifth is padding
        batch["attention_mask"][:, 0] = 1
        with torch.autocast("cpu", dtype=half or torch.bfloat16, enabled=half is not None):
            loss = model(**batch).loss
        (loss * scale).backward()
        model.zero_grad(set_to_none=True)
    return groups, {group.name: unit_scores(group, scale, "product_of_sums").double() for group in groups}


def rows(name: str, batches: int) -> list[dict[str, Any]]:
    """What each precision gives beside float64: the error of the scores, and the units that its first plan drops."""
    shape = SHAPES[name]
    torch.manual_seed(0)
    model = apt.patch_model(shape.model(None), target_modules=shape.targets).eval()
    total = block_params(anatomy_of(model))
    found = {
        "float64": scored(copy.deepcopy(model).double(), shape, batches, None),
        "float32": scored(copy.deepcopy(model), shape, batches, None),
        "bfloat16": scored(copy.deepcopy(model), shape, batches, torch.bfloat16),
        "float16": scored(copy.deepcopy(model), shape, batches, torch.float16),
    }
    truth = found.pop("float64")[1]
    kept = {dtype: _kept(groups, scores, total) for dtype, (groups, scores) in found.items()}
    table = []
    for dtype, (_, scores) in found.items():
        apart = torch.cat([(scores[group] / truth[group] - 1.0).abs() for group in truth])
        union, both = kept["float32"] | kept[dtype], kept["float32"] & kept[dtype]
        row = {"shape": name, "precision": dtype, "batches": batches, "units": apart.numel()}
        row |= {"error_p50": f"{apart.median():.2e}", "error_max": f"{apart.max():.2e}"}
        table.append(row | {"kept_alike": round(len(both) / len(union), 4)} | environment())
    return table


def _kept(groups: list[UnitGroup], scores: Scores, total: int) -> set[tuple[str, int]]:
    planned = UnitSearch(total, PruningConfig(target_sparsity=TARGET)).plan(groups, scores, total, 0, TARGET)
    return {(name, unit) for name, units in planned.kept.items() for unit in units}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=list(SHAPES), default="minilm")
    parser.add_argument("--batches", type=int, default=8)
    parser.add_argument("--out", type=Path, default=plan.results("half_scores"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for row in rows(arguments.shape, arguments.batches):
        append_row(arguments.out, row)
        print({key: row[key] for key in ("precision", "error_p50", "error_max", "kept_alike")}, flush=True)


if __name__ == "__main__":
    main()
