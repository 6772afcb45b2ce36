"""A whole run: from a config to a folder that holds the small model, its metrics and its events."""

import json
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import utils as hub
from torch import nn
from transformers import AutoTokenizer, ProgressCallback, TrainerCallback
from transformers.integrations.integration_utils import TensorBoardCallback

from apt.export import CARD, load_model
from apt.export.model_card import README, CardFacts, model_card
from apt.export.remote import remote_class
from apt.files.telling import tell
from apt.files.whole import check_writable, write_json, writing
from apt.process.stopping import Stopped, StopRequest, signals
from apt.runs.arguments import choose_device, optimizer_class, training_arguments
from apt.runs.config import RunConfig
from apt.runs.data import Loader
from apt.runs.evaluation.evaluate import Evaluator
from apt.runs.lock import locked
from apt.runs.measure import measure_run, score_model
from apt.runs.models import build_model, build_tokenizer, check_lengths, check_shape
from apt.runs.report import print_report
from apt.runs.run_folder import (
    CHECKPOINTS,
    EFFICIENCY,
    EVENTS,
    METRICS,
    MODEL,
    begin_folder,
    check_folders,
    find_checkpoint,
    is_done,
    is_whole,
    partial_of,
    publish_run,
    tidy_named,
)
from apt.runs.tasks import TASKS, DataRequest
from apt.surgery import patch_model, patch_state, summary
from apt.training.checkpoint import RandomState, random_state_kept
from apt.training.trainer import APTrainer

ADVICE = (
    "free space there or make it writable, and go on with --resume, from the last checkpoint if there is one; or give "
    "another output_dir"
)


def train(config: RunConfig, *, overwrite: bool = False, resume: bool = False, command: str | None = None) -> Path:
    """A whole run: train, export, load the export again, measure it, report. Returns the run's folder.

    Everything is written to ``<output_dir>.partial``, which gets its name only at the end: a finished run of that name
    stays until a new one has succeeded. With `resume` a finished run is left as it is, and an unfinished one goes on
    from its last checkpoint, or from the start where it has none. The model card tells `command` as what began the run.

    Raises:
        ValueError: the output folder holds something, or a setting, the data or the model is not what it must be.
        OSError: the folder cannot be written, or its disk is full; what is there lies under the temporary name.
        FloatingPointError: the loss became NaN or infinite; the last good state is saved as a checkpoint.
    """
    output = Path(config.output_dir).expanduser()
    partial = partial_of(output)
    check_folders(output)
    if is_done(output, config, overwrite=overwrite, resume=resume):
        tidy_named(output)
        return output
    check_writable(partial, "train")
    with locked(partial):
        # Another process may have finished it until this one came.
        if is_done(output, config, overwrite=overwrite, resume=resume):
            return output
        if not is_whole(partial, config, resume=resume):
            _fill_folder(config, partial, overwrite=overwrite, resume=resume, command=command)
        publish_run(partial, output)
    print_report(output)
    tell(f"python -m apt report {output} draws a page of this run")
    return output


def _fill_folder(config: RunConfig, partial: Path, *, overwrite: bool, resume: bool, command: str | None) -> None:
    """Train and measure in the folder of an unfinished run; afterwards it is whole."""
    checkpoint = find_checkpoint(partial, config, overwrite=overwrite, resume=resume)
    prepare_process(config)
    tokenizer = build_tokenizer(config)
    data = load_data(config, tokenizer)
    tell(f"{len(data.train):,} {data.unit} to train on, {len(data.test):,} to test on")
    model = build_model(config, data.num_labels, tokenizer, data.label_names)
    check_shape(config, model)
    check_lengths(data, model)
    with writing(partial, "train", ADVICE):
        if checkpoint is None:
            begin_folder(partial, config)
        trainer, seconds = _train_model(config, model, tokenizer, data, partial, checkpoint)
        with _checkpoint_kept(trainer):
            metrics, times = measure_run(config, tokenizer, data, partial, trainer)
        efficiency = {"train_seconds": seconds, **trainer.throughput(), **times}
        if checkpoint is not None:
            # The clock of a resumed run has seen its last part only, so it cannot tell the rates of the whole.
            step = int(Path(checkpoint).name.rpartition("-")[2])
            efficiency |= {"resumed_from_step": step, "tokens_per_s_before": None, "tokens_per_s_after": None}
        assert trainer.model is not None
        write_card(config, trainer.model, partial / MODEL, metrics | efficiency, command)
        write_json(partial / EFFICIENCY, efficiency)
        # The last of all: it marks the run as whole.
        write_json(partial / METRICS, metrics)


@contextmanager
def _checkpoint_kept(trainer: APTrainer) -> Iterator[None]:
    """Where the user stops what comes after the last step, what was trained is saved first."""
    state = RandomState()
    try:
        yield
    except KeyboardInterrupt as stopped:
        step = trainer.state.global_step
        state.restore()
        trainer.save_now()
        number = stopped.number if isinstance(stopped, Stopped) else signal.SIGINT
        raise Stopped(number, _stopped_at(step, trainer.state.max_steps)) from None


def _stopped_at(step: int, steps: int) -> str:
    return (
        f"stopped after step {step} of {steps}, of which checkpoint-{step} is saved; the same command with --resume "
        f"goes on"
    )


def load_data(config: RunConfig, tokenizer: Any, *, num_labels: int | None = None) -> Loader:
    """The data of a run, as its task reads it; `num_labels` classes, or as many as `config` or the data says."""
    asked = DataRequest(
        data=config.data,
        evaluation=config.evaluation,
        tokenizer=tokenizer,
        seed=config.training.seed,
        num_labels=num_labels or config.model.num_labels,
    )
    return TASKS[config.model.task].load(asked)


def write_card(
    config: RunConfig,
    model: nn.Module,
    folder: Path,
    metrics: dict[str, Any],
    command: str | None,
    *,
    trained: bool = True,
) -> None:
    """The model card of the export once more, with what the run knows of it."""
    method = config.model.method if trained else None
    said = json.loads((folder / CARD).read_text(encoding="utf-8"))
    repaired = patch_state(model).num_repaired
    remote = remote_class(folder)
    facts = CardFacts(config.model.name, said["class"], method, said["stock"], summary(model), remote, repaired)
    card = model_card(facts, metrics, TASKS[config.model.task].hub_tag, command)
    (folder / README).write_text(card, encoding="utf-8")


def prepare_process(config: RunConfig) -> None:
    """Seeds, threads, and quiet libraries; this is the process of a command, so it may set them."""
    if config.hardware.num_threads is not None:
        torch.set_num_threads(config.hardware.num_threads)
    transformers.set_seed(config.training.seed)
    logging: Any = transformers.logging
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    # Where the hub cannot be reached, its retries are told one by one; our error says it once.
    hub_logging: Any = hub.logging
    hub_logging.set_verbosity_error()


# On the progress bar, beside what remains of the time: what is logged, its name there, how it is written.
SHOWN: tuple[tuple[str, str, Callable[[Any], str]], ...] = (
    *((name, name, lambda value: f"{float(value):.3f}") for name in ("loss", "task_loss", "distill_loss", "mu")),
    ("sparsity", "sparsity", "{:.1%}".format),
    ("adapter_params", "budget", "{:,} parameters".format),
    ("tokens_per_s", "tokens/s", "{:,.0f}".format),
)


class _Bar(ProgressCallback):
    """The progress bar with the loss on it, instead of a line for each."""

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if self.training_bar is not None and logs and "loss" in logs:
            self.training_bar.set_postfix({name: write(logs[key]) for key, name, write in SHOWN if key in logs})

    def close(self) -> None:
        """End its line, also where training failed: what is printed next starts on a line of its own."""
        if self.training_bar is not None:
            self.training_bar.close()


class _Stop(TrainerCallback):
    """Ends the training with a checkpoint after the step in which a signal came."""

    def __init__(self) -> None:
        self.request = StopRequest("stopping after this step, with a checkpoint; once more stops at once")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.request.number is not None:
            control.should_save = control.should_training_stop = True


class _Curve(TrainerCallback):
    """Scores the model on its way, every `score_steps`; the run is the one without, and nothing is chosen by them."""

    def __init__(self, trainer: APTrainer, steps: int, evaluate: Callable[[nn.Module], dict[str, float]]) -> None:
        self.trainer, self.steps, self.evaluate = trainer, steps, evaluate

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if state.global_step % self.steps == 0:
            with random_state_kept():
                scores = self.evaluate(model)
            self.trainer.log_aside({f"eval_{name}": value for name, value in scores.items()})


def _train_model(
    config: RunConfig,
    model: nn.Module,
    tokenizer: Any,
    data: Loader,
    partial: Path,
    checkpoint: str | None,
) -> tuple[APTrainer, float]:
    """Patch and train the model; returns the trainer and the seconds of training."""
    trainer = APTrainer(
        model=patch_model(model, config.apt_config()),
        args=training_arguments(config, partial / CHECKPOINTS),
        train_dataset=data.train,
        data_collator=data.collator,
        processing_class=tokenizer,
        event_log=partial / EVENTS,
        record_to=partial,
        optimizer_cls_and_kwargs=optimizer_class(config.training),
    )
    trainer.remove_callback(ProgressCallback)
    bar = _Bar()
    trainer.add_callback(bar)
    if config.evaluation.score_steps:
        evaluator = Evaluator(tokenizer, config.evaluation)
        steps = config.evaluation.score_steps
        trainer.add_callback(_Curve(trainer, steps, lambda model: score_model(config, evaluator, model, data)))
    # By default TensorBoard's files would go with the checkpoints.
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, TensorBoardCallback):
            callback.logging_dir = callback.logging_dir or str(partial / "tensorboard")
    stop = _Stop()
    trainer.add_callback(stop)
    started = time.perf_counter()
    try:
        with signals(stop.request):
            trainer.train(resume_from_checkpoint=checkpoint)
    finally:
        bar.close()
    seconds = time.perf_counter() - started
    if stop.request.number is not None:
        raise Stopped(stop.request.number, _stopped_at(trainer.state.global_step, trainer.state.max_steps))
    return trainer, seconds


def evaluate(folder: Path, config: RunConfig) -> dict[str, Any]:
    """Scores of an export, with the tokenizer beside it, on the test split of a config.

    Raises:
        ValueError: the folder is no export, or the data does not fit it.
    """
    prepare_process(config)
    model = load_model(folder).to(choose_device(config.hardware))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    hf_config: Any = model.config
    data = load_data(config, tokenizer, num_labels=hf_config.num_labels)
    check_lengths(data, model)
    return {
        **score_model(config, Evaluator(tokenizer, config.evaluation), model, data),
        "test_size": len(data.test),
        "folder": str(folder),
        "data": config.data.datasets,
    }
