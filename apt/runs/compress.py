"""``python -m apt compress``: a model made smaller in minutes, without training, with its scores before and after."""

import itertools
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from apt.export import CARD, export_model, load_model
from apt.files.telling import tell
from apt.files.whole import check_replaceable, check_writable, find_whole, mark, write_folder_aside, write_json
from apt.records import Event
from apt.runs.arguments import choose_device
from apt.runs.config import RunConfig, load_config
from apt.runs.data import DatasetLoader, Loader, has_labels
from apt.runs.evaluation.evaluate import Evaluator
from apt.runs.measure import score_model
from apt.runs.models import build_model, build_tokenizer, check_lengths
from apt.runs.run import load_data, prepare_process, write_card
from apt.runs.tasks import TASKS
from apt.surgery import patch_state
from apt.training.compress import check_asks, chosen_for, compress

RECORD = "apt_compress.json"  # beside the export: scores, seconds, and the error of every projection


def compress_config(model: str, data: str | None, folder: Path, sparsity: float, overrides: list[str]) -> RunConfig:
    """The settings of a compression.

    Args:
        model: its name, as `model.name` takes it, or a config file that names model and data.
        data: as `data.datasets` takes it; None with a config file.
        folder: that is written.
        sparsity: fraction of the block parameters that goes.
        overrides: ``key=value``, on top.

    Raises:
        ValueError: there is no data, or a setting is wrong.
    """
    is_file = model.endswith((".yaml", ".yml"))
    if data is None and not is_file:
        raise ValueError("compress: give a model and its data, or a config file that names both")
    named = [f"output_dir={folder}"] if is_file else [f"output_dir={folder}", f"model={model}"]
    named += [] if data is None else [f"dataset={data}"]
    path = Path(model) if is_file else None
    asked = load_config(path, [*named, "pruning.repair=weights", *overrides]).pruning
    chosen = chosen_for(asked.unit_types, asked.repair)
    named += [f"pruning.{name}={value}" for name, value in chosen.items()]
    named += ["pruning.target_speedup=null", f"target_sparsity={sparsity}"]  # of a file, which is for a run
    config = load_config(path, [*named, *overrides])
    check_asks(config.apt_config())
    return config


def compress_to(config: RunConfig, folder: Path, *, overwrite: bool = False, command: str | None = None) -> Path:
    """Load, calibrate, choose, repair, cut, export and score, as a config says it. Returns the folder.

    Args:
        config: model, task, data; `pruning` with how much goes and how it is chosen.
        folder: gets the export, the tokenizer, the model card and `RECORD`.
        overwrite: replace one that exists.
        command: that the model card tells.

    Raises:
        ValueError: the folder exists, or a setting, the data or the model is not what it must be.
        OSError: the folder cannot be written.
    """
    folder = folder.expanduser()
    if not overwrite and (found := find_whole(folder)).exists():
        raise ValueError(f"compress: {found} exists; give another folder or --overwrite")
    check_writable(folder, "compress", "--out")
    check_replaceable(folder, CARD)
    prepare_process(config)
    tokenizer = build_tokenizer(config)
    labelled = not TASKS[config.model.task].counts_classes or has_labels(config.data)
    if labelled:
        data = load_data(config, tokenizer)
    else:
        data = DatasetLoader(config.data, tokenizer, config.training.seed, labelled=False)
    tell(f"{len(data.train):,} {data.unit} to calibrate on, {len(data.test):,} to test on")
    device = choose_device(config.hardware)
    model = build_model(config, data.num_labels, tokenizer, data.label_names, tuned=True).to(device)
    check_lengths(data, model)
    evaluator = Evaluator(tokenizer, config.evaluation)
    answers = None
    if not labelled:
        tell(f"they have no column {config.data.label_column!r}: the model is compared with what it was before")
        answers = evaluator.answers(model, data.test)
    before = _scores(config, evaluator, model, data, answers)
    started, cpu = time.perf_counter(), time.process_time()
    asked = {name: getattr(config.pruning, name) for name in ("target_sparsity", "target_speedup")}
    compress(model, _batches(config, data), config=config.apt_config(), **asked)
    taken = {"seconds": time.perf_counter() - started, "cpu_seconds": time.process_time() - cpu}
    with write_folder_aside(folder, holds=CARD) as partial:
        export_model(model, partial, overwrite=True)
        mark(partial)
        tokenizer.save_pretrained(partial)
        after = _scores(config, evaluator, load_model(partial).to(device), data, answers)
        event = patch_state(model).past[-1]
        write_json(partial / RECORD, {"before": before, "after": after, **taken, "event": event.to_json()})
        figures = after | {"test_size": len(data.test), "unit": data.unit}
        write_card(config, model, partial, figures, command, trained=False)
    tell(_told(before, after, event, taken["seconds"]))
    return folder


def _scores(
    config: RunConfig, evaluator: Evaluator, model: nn.Module, data: Loader, answers: list[int] | None
) -> dict[str, float]:
    """The scores of the task, the first one in front; without labels the share of answers that are those given."""
    if answers is None:
        return score_model(config, evaluator, model, data)
    pairs = zip(evaluator.answers(model, data.test), answers, strict=True)
    return {"agreement": sum(now == before for now, before in pairs) / len(answers)}


def _batches(config: RunConfig, data: Loader) -> Iterator[dict[str, Any]]:
    """Batches of the training data, in an order drawn with the run's seed."""
    draw = torch.Generator().manual_seed(config.training.seed)
    rows = iter(torch.randperm(len(data.train), generator=draw).tolist())
    while chosen := list(itertools.islice(rows, config.training.batch_size)):
        yield data.collator([data.train[row] for row in chosen])


def _told(before: dict[str, float], after: dict[str, float], event: Event, seconds: float) -> str:
    """One line of what came out."""
    metric = next(iter(before))
    notes = list(event.prune.errors.values()) if event.prune is not None else []
    told = (
        f"{metric} {before[metric]:.4g} before, {after[metric]:.4g} after: {event.sparsity:.1%} of the block "
        f"parameters are gone, in {seconds:.0f} s"
    )
    if not notes:
        return told
    cut, repaired = (sum(getattr(note, side) for note in notes) / len(notes) for side in ("before", "after"))
    return f"{told}; mean error of {len(notes)} projections {cut:.3f}, repaired {repaired:.3f}"
