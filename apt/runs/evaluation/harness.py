"""Scores of a decoder on benchmark tasks by lm-evaluation-harness, which gets the model object: free layouts too.

The library and `datasets` are imported when a task runs, so that nothing else asks for them.
"""

import difflib
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from torch import nn

from apt.export import CARD, load_model
from apt.files.whole import write_json
from apt.layers.modes import evaluating
from apt.runs.arguments import choose_device
from apt.runs.config import HardwareConfig
from apt.runs.report.tables import Sheet
from apt.runs.report.terminal import print_sheets
from apt.version import versions_used

ALL_OF_PAPER = "paper"
PAPER = {"arc_challenge": 25, "hellaswag": 10, "mmlu": 5, "truthfulqa_mc2": 0}  # task -> examples in the prompt
HEADERS = ("task", "examples", "rows", "metric", "value", "stderr")
Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class HarnessConfig:
    """What is scored, and on what."""

    tasks: tuple[str, ...]  # names of the library's tasks, groups and tags, or "paper" alone: those of `PAPER`
    num_fewshot: int | None = None  # solved examples in each prompt, >= 0; None: what the task's file says
    include: Path | None = None  # folder of task files (YAML) beside those of the library
    limit: int | None = None  # rows of each task, >= 1; None: all
    batch_size: int = 8  # sequences of one forward pass, >= 1

    def __post_init__(self) -> None:
        for name, least in (("num_fewshot", 0), ("limit", 1), ("batch_size", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"harness: {name} is {value}; give {least} or more")
        if not self.tasks or not all(self.tasks):
            raise ValueError("harness: no task is named; give names with commas between, or 'paper'")
        if ALL_OF_PAPER in self.tasks and (len(self.tasks) > 1 or self.num_fewshot is not None):
            raise ValueError("harness: 'paper' stands alone: it names its tasks, and the examples of each")
        if self.include is not None and not self.include.is_dir():
            raise ValueError(f"harness: {self.include} is no folder of task files")

    def examples(self) -> dict[str, int | None]:
        """The examples in each prompt, by the name of a task, group or tag."""
        return {**PAPER} if ALL_OF_PAPER in self.tasks else dict.fromkeys(self.tasks, self.num_fewshot)


def harness(folder: Path, config: HarnessConfig, out: Path | None = None) -> list[Row]:
    """Score the decoder in a folder, print a table of what was asked for, and write all rows as JSON.

    Args:
        folder: an export, or a model folder of transformers, with the tokenizer in it.
        config: tasks and how they are asked.
        out: a JSON file: rows with task, num_fewshot, samples, metric, filter, value, stderr; and versions.

    Returns:
        The rows, those of a group's members too.

    Raises:
        ValueError: no decoder or tokenizer is in the folder, or a task is unknown.
        ImportError: the library is missing.
    """
    kind = _decoder_class(folder)
    if out is not None and not out.parent.is_dir():
        raise ValueError(f"harness: {out.parent} is no folder, so {out.name} cannot be written there")
    tasks = _load_tasks(config)
    model, tokenizer = _load(folder)
    rows, top = _evaluate(model.to(choose_device(HardwareConfig())), tokenizer, tasks, config)
    shown = [_cells(row) for row in rows if row["task"] in top]
    print_sheets([Sheet(f"{folder}: lm-evaluation-harness", HEADERS, shown)])
    if out is not None:
        facts = {"folder": str(folder), "class": kind, "limit": config.limit, "batch_size": config.batch_size}
        write_json(out, {**facts, "rows": rows, "versions": versions_used("lm_eval")})
    return rows


def score(model: nn.Module, tokenizer: Any, config: HarnessConfig) -> list[Row]:
    """Score a decoder that is in memory, on the device that it is on; its mode is as it was afterwards.

    Args:
        model: a causal language model of transformers, as `apt.load_model` gives it.
        tokenizer: of the model; one without a token for padding gets one.
        config: tasks and how they are asked.

    Returns:
        One row for each task, or group, and metric: task, num_fewshot, samples, metric, filter (what the library did
        to the answers before), value and stderr (None where there is none).

    Raises:
        ValueError: a task is unknown, or its number of examples is fixed.
        ImportError: the library is missing.
    """
    return _evaluate(model, tokenizer, _load_tasks(config), config)[0]


def _decoder_class(folder: Path) -> str:
    """The class that the config of a folder names, which must be a decoder."""
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    if not (folder / "config.json").is_file():
        raise ValueError(f"harness: {folder} is no model folder; it has no config.json")
    config = AutoConfig.from_pretrained(folder)
    name = (config.architectures or ["model of an unnamed class"])[0]
    if MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type) != name:
        raise ValueError(f"harness: {folder} holds a {name}; the tasks are for causal language models")
    return str(name)


def _load(folder: Path) -> tuple[nn.Module, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError):
        raise ValueError(f"harness: {folder} has no tokenizer; tokenizer.save_pretrained puts it there") from None
    if (folder / CARD).exists():
        return load_model(folder), tokenizer
    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto"), tokenizer


@cache
def _index(include: Path | None, *, everything: bool) -> Any:
    """What tasks there are. Those of the library are 14,000 files: they are read once, and only where asked for."""
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise ImportError(
            f'harness: lm-evaluation-harness is missing ({error}); pip install "apt-lm[harness]"'
        ) from None
    return TaskManager(include_path=include, include_defaults=everything)


def _load_tasks(config: HarnessConfig) -> Any:
    """Tasks with their rows, and groups, as the library's `evaluate` takes them."""
    examples = config.examples()
    index = _index(config.include, everything=False)
    if not set(examples) <= set(index.all_subtasks):  # a group of ours may have members of theirs
        index = _index(config.include, everything=True)
    for name in examples:
        if name not in index.task_index:
            near = difflib.get_close_matches(name, index.all_tasks, 3)
            hint = f"did you mean {' or '.join(near)}?" if near else "`lm-eval ls tasks` lists those of the library"
            raise ValueError(f"harness: there is no task {name!r}; {hint}")
    loaded = index.load(list(examples))
    for name, count in examples.items():
        members = loaded["groups"][name].get_all_tasks() if name in loaded["groups"] else loaded["tasks"].values()
        for task in [loaded["tasks"][name]] if name in loaded["tasks"] else members:
            _set_examples(task, count)
    return loaded


def _set_examples(task: Any, count: int | None) -> None:
    from lm_eval.defaults import DEFAULT_OTHER_SEED

    written = task.get_config("num_fewshot")
    if written == 0 and count:  # such a task has its examples in the text of its prompt
        raise ValueError(f"harness: {task.task_name} has no room for {count} examples: its file fixes num_fewshot at 0")
    task.set_config(key="num_fewshot", value=count if count is not None else written or 0)
    task.set_fewshot_seed(seed=DEFAULT_OTHER_SEED)  # the library's own, so that its command draws the same


def _evaluate(model: nn.Module, tokenizer: Any, tasks: Any, config: HarnessConfig) -> tuple[list[Row], set[str]]:
    """Rows, and the names of what is no member of a group."""
    import lm_eval
    from lm_eval.defaults import DEFAULT_OTHER_SEED
    from lm_eval.models.huggingface import HFLM
    from transformers import set_seed

    set_seed(DEFAULT_OTHER_SEED)
    with evaluating(model):
        with _quiet():  # it warns that it was given a model
            lm = HFLM(pretrained=model, backend="causal", tokenizer=tokenizer, batch_size=config.batch_size)
        found = lm_eval.evaluate(lm=lm, task_dict=tasks, limit=config.limit, log_samples=False)
    members = {member for children in found["group_subtasks"].values() for member in children}
    return list(_rows(found)), set(found["results"]) - members


@contextmanager
def _quiet() -> Iterator[None]:
    logger = logging.getLogger("lm_eval")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


def _rows(found: Any) -> Iterator[Row]:
    for task, entries in found["results"].items():
        for key, value in entries.items():
            metric, _, kind = key.partition(",")
            if not kind or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            error = entries.get(f"{metric}_stderr,{kind}")
            yield {
                "task": task,
                "num_fewshot": found["n-shot"].get(task),
                "samples": entries.get("sample_len"),
                "metric": metric,
                "filter": kind,
                "value": float(value),
                "stderr": float(error) if isinstance(error, int | float) else None,
            }


def _cells(row: Row) -> tuple[str, ...]:
    metric = row["metric"] if row["filter"] == "none" else f"{row['metric']} ({row['filter']})"
    values = (row["task"], row["num_fewshot"], row["samples"], metric, row["value"], row["stderr"])
    return tuple(map(_cell, values))


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.4f}" if isinstance(value, float) else str(value)
