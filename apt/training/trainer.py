"""APTrainer: a `transformers.Trainer` that drives the controller. It takes no decision of its own."""

import itertools
from collections.abc import Iterator, Mapping, Sized
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Seq2SeqTrainer, Trainer
from transformers.trainer_pt_utils import LengthGroupedSampler

from apt.apt_config import APTConfig
from apt.distillation import place_transform
from apt.files.whole import write_jsonl
from apt.layers import TRANSFORM, LayerTransform
from apt.pruning.ranks import adapter_sizes, total_params
from apt.surgery import bare_model, patch_state, uncompiled
from apt.surgery.moments import bare_optimizer
from apt.training.any_trainer import arguments_by_name, beside, known_arguments
from apt.training.batches import EpochOrder, count_tokens, hold_out, micro_batch_weights
from apt.training.checkpoint import (
    RandomState,
    load_controller,
    load_live,
    random_state_kept,
    restore_shapes,
    save_controller,
)
from apt.training.clock import StepClock
from apt.training.controller import Calibration, Controller, adopt
from apt.training.controller.built import check_one_device
from apt.training.drive import Drive
from apt.training.recorder import Recorder, event_scalars, planned_sparsity
from apt.training.whole_checkpoints import WholeCheckpoints
from apt.training.whole_loss import StepLoss, knowing_labels, loss_is_scaled, loss_with


class APTrainer(WholeCheckpoints):
    """Trains a patched model and prunes it on the way; every argument of `transformers.Trainer` works.

    It stands before any other trainer too (`trainer_class`), and takes the arguments of all classes of its own.

    Args:
        model: patched by `apt.patch_model`; or ``model_init=``, a function that returns such a model for each run.
        args: the ``TrainingArguments``. With ``predict_with_generate`` it is a ``Seq2SeqTrainer`` as well.
        config: None means the one `patch_model` stored.
        event_log: a JSON-lines file that gets each event.
        record_to: a folder that gets what a report draws: `steps.jsonl` and `shapes.jsonl`.
        train_dataset: with `teacher_refresh` a share of it, `held_out_share`, drawn with the seed of the arguments, is
            not trained on: there it is seen whether a student beats its teacher.
        overrides: leaves of the config by name, e.g. ``target_sparsity=0.6``.

    Raises:
        ValueError: the model is not patched, or a setting is unknown or out of range, or several devices are asked for.
    """

    controller: Controller

    def __new__(cls, *args: Any, **kwargs: Any) -> "APTrainer":
        settings = kwargs.get("args", args[1] if len(args) > 1 else None)
        kind: Any = cls
        # The Trainer itself passes over that setting.
        if getattr(settings, "predict_with_generate", False) and not issubclass(cls, Seq2SeqTrainer):
            kind = beside(cls, Seq2SeqTrainer)
        return super().__new__(kind)

    def __init__(
        self,
        *args: Any,
        config: APTConfig | None = None,
        event_log: Path | None = None,
        record_to: Path | None = None,
        **kwargs: Any,
    ) -> None:
        given = arguments_by_name(type(self), APTrainer, args, kwargs)
        names = known_arguments(type(self))
        self._asked = config
        self._overrides = {name: given.pop(name) for name in list(given) if name not in names}
        self.event_log = event_log
        self._recorder = None if record_to is None else Recorder(Path(record_to))
        self._resume_from: Path | None = None
        self._num_resumed = 0  # events of the run before it was resumed
        self._random = RandomState()  # at the end of the latest step, where a checkpoint would save it
        self._step_loss = StepLoss(self)
        self._took_gradients = False  # of the step in the making
        self._clock = StepClock()
        self._held_out: Any = None
        if given.get("model_init") is None:
            self._read_config(given.get("model"))
            given = self._hold_out(given)
        super().__init__(**given)
        check_one_device(self.args.n_gpu)
        self._place_transform(self._module())
        # The mean of each micro-batch, weighed here, but where the trainer says that it divides by the step's labels.
        self.model_accepts_loss_kwargs = self.model_accepts_loss_kwargs and loss_is_scaled(self)
        self.add_callback(Drive(self))

    def _read_config(self, model: Any) -> None:
        """Find the config of a run of this model.

        Raises:
            ValueError: the model is not patched, or compiled, or a setting is unknown or out of range.
        """
        if isinstance(model, str):
            raise ValueError(f"trainer: give a model that apt.patch_model has patched, not its name {model!r}")
        if uncompiled(model) is not model:
            raise ValueError(
                "trainer: give the model itself, and torch_compile=True in the arguments, which compile it"
            )
        self.apt_config = (self._asked or patch_state(bare_model(model)).config).with_overrides(**self._overrides)

    def _hold_out(self, given: dict[str, Any]) -> dict[str, Any]:
        """The arguments with part of the training data taken out, where a teacher is to be compared on it."""
        settings = self.apt_config.distillation
        if not settings.teacher_refresh:
            return given
        seed = getattr(given.get("args"), "seed", 0)
        rows, self._held_out = hold_out(given.get("train_dataset"), settings.held_out_share, seed)
        return {**given, "train_dataset": rows}

    def _place_transform(self, model: nn.Module) -> None:
        """Put Tr into a model before there is an optimizer, which is to have it."""
        if self.apt_config.distillation.use_self_distillation:
            place_transform(bare_model(model), self.apt_config.distillation, torch.initial_seed())

    def call_model_init(self, trial: Any = None) -> nn.Module:
        """Make the model of a run, which begins anew: a search for settings calls it before each trial."""
        model: nn.Module = super().call_model_init(trial)
        self._read_config(model)
        if self.apt_config.distillation.teacher_refresh:
            raise ValueError("trainer: teacher_refresh holds out data for one model; give model=, no model_init")
        if hasattr(self, "controller"):  # the model of the run before is gone, and with it what was on it
            del self.controller
        if getattr(self, "is_in_train", False):
            self._place_transform(model)
        return model

    def start_controller(self, total_steps: int) -> None:
        """Make the controller once the optimizer exists and the length of the run is known."""
        assert self.optimizer is not None
        self._end_run()
        self.controller = Controller(
            self._patched(),
            self.optimizer,
            total_steps,
            self.apt_config,
            scaler=getattr(self.accelerator, "scaler", None),
            event_log=self.event_log,
            held_out=self._batches_of(self._held_out) if self._held_out is not None else None,
            calibration=Calibration(self._calibration_batches, self._plain_loss),
        )
        if self._resume_from is not None:
            load_controller(self.controller, self._resume_from)
            self._num_resumed = len(self.controller.events)
            if self.event_log is not None:  # what came after the checkpoint will come again
                write_jsonl(self.event_log, [event.to_json() for event in self.controller.events])
        if self._recorder is not None:
            self._recorder.begin(self.controller)
        self.controller.prepare()
        if self.controller.awaits_calibration:
            self.controller.prune_before_tuning(self._calibration_batches(), self._plain_loss)
            self._log_events(0)

    def _plain_loss(self, _: nn.Module, batch: Mapping[str, Any]) -> Tensor:
        with knowing_labels(self._module(), batch):
            loss: Any = self.compute_loss(self._module(), dict(batch))
        assert isinstance(loss, Tensor)
        return loss

    def _end_run(self) -> None:
        """Take back what an earlier run of this trainer has put on the model: it may have been broken off."""
        if not hasattr(self, "controller"):
            return
        taught = self.controller.distillation is not None and not self.controller.distillation.over
        if self._resume_from is not None and (taught or len(self.controller.events) > self._num_resumed):
            raise ValueError(
                f"trainer: memory ran out in a run that was resumed, whose model has changed since; resume from "
                f"{self._resume_from} in a new process with per_device_train_batch_size={self._train_batch_size}"
            )
        self.controller.leave()
        del self.controller
        self._clock = StepClock()

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """Make the optimizer, and add Tr's parameters where there is a Tr, before a saved optimizer state is loaded."""
        optimizer: Any = super().create_optimizer(*args, **kwargs)
        transform = getattr(self._patched(), TRANSFORM, None)
        if isinstance(transform, LayerTransform):
            adopt(transform, self._patched(), getattr(optimizer, "optimizer", optimizer))
        return optimizer

    def _batches_of(self, dataset: Any) -> list[dict[str, Any]]:
        """A held-out data set in batches; no random state moves."""
        collate = self._get_collator_with_removed_columns(self.data_collator, "held out")
        size = self.args.per_device_eval_batch_size
        with torch.random.fork_rng(devices=[]):
            chunks = [range(start, min(start + size, len(dataset))) for start in range(0, len(dataset), size)]
            return [dict(self._prepare_inputs(collate([dataset[i] for i in chunk]))) for chunk in chunks]

    def _calibration_batches(self, step: int = 0) -> Iterator[dict[str, Any]]:
        """Batches of the training data for the event of a step, drawn with the run's seed.

        The trainer's own loader and random state stay as they are.
        """
        dataset = self.train_dataset
        size = self.args.per_device_train_batch_size
        if isinstance(dataset, Sized):
            seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
            order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(seed + step)).tolist()
            rows: Iterator[Any] = (dataset[index] for index in order)  # type: ignore[index]
        else:
            rows = iter(dataset)  # type: ignore[arg-type]
        collate = self._get_collator_with_removed_columns(self.data_collator, "calibration")
        while chosen := list(itertools.islice(rows, size)):
            yield self._prepare_inputs(collate(chosen))

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train. On a NaN or infinite loss or gradient the last good state is saved as a checkpoint first.

        Raises:
            FloatingPointError: names the step and the checkpoint.
        """
        self._resume_from = None
        try:
            return super().train(*args, **kwargs)
        except FloatingPointError as error:
            self._module().zero_grad(set_to_none=True)
            self._random.restore()  # the forward pass that failed has drawn from it
            self._save_checkpoint(self._module(), trial=None)
            saved = Path(self.args.output_dir or "") / f"checkpoint-{self.state.global_step}"
            raise FloatingPointError(f"{error}; saved as {saved}") from None

    def _module(self) -> nn.Module:
        assert self.model is not None
        return self.model

    def _patched(self) -> nn.Module:
        """The patched model, out of what is around it."""
        return bare_model(self._module())

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        self._clock.tokens += count_tokens(inputs)
        # Without a number of items a loss is the mean of its micro-batch, which the weights are made for.
        items = num_items_in_batch if loss_is_scaled(self) else None
        with loss_with(self, self._step_loss.whole):
            loss: Tensor = super().training_step(model, inputs, items)
        if self.accelerator.sync_gradients:
            self.controller.after_backward()
            self._took_gradients = True
        return loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log beside the loss sparsity, adapter parameters and tokens/s, with a teacher task_loss, distill_loss and mu.

        What is logged at an event begins with ``event_``.
        """
        if any(name.startswith("event_") for name in logs):
            # A trainer beside this one would add its means since the last log, and forget them.
            Trainer.log(self, logs)
            return
        if not hasattr(self, "controller") or "loss" not in logs:
            super().log(logs, *args, **kwargs)
            if self._recorder is not None and any(name.startswith("eval_") for name in logs):
                self._recorder.score(self.state.global_step, logs)
            return
        events = self.controller.events
        distillation = self.controller.distillation
        tokens, seconds, steps = self._clock.since_log()
        logs = {
            **logs,
            "sparsity": events[-1].sparsity if events else 0.0,
            "adapter_params": self._adapter_params(),
            **({"tokens_per_s": tokens / seconds} if tokens and seconds else {}),
            **({} if distillation is None else distillation.report()),
        }
        super().log(logs, *args, **kwargs)
        if self._recorder is not None:
            more = {
                "seconds": seconds,
                "tokens": tokens,
                "steps": steps,
                "planned_sparsity": planned_sparsity(self.controller),
            }
            self._recorder.log(self.state.global_step, logs, self.args.device, **more)

    def _adapter_params(self) -> int:
        return total_params(adapter_sizes(self._patched(), {}))

    def _log_events(self, seen: int) -> None:
        """Scalars of the events beyond the first `seen`, by the Trainer's own way: `report_to` gets them."""
        if self._recorder is not None:
            self._recorder.after_step(self.controller)
        for event in self.controller.events[seen:]:
            self.log_aside(event_scalars(event, self._adapter_params()))

    def log_aside(self, logs: dict[str, float]) -> None:
        """Log in the middle of a step; what the Trainer itself logs at its end still comes."""
        due = self.control.should_log
        self.log(logs)
        self.control.should_log = due

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> Any:
        # Resumed behind the last step: the Trainer would do one more.
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return [], None
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        self._step_loss.weights = micro_batch_weights(batches, self._loss_shifts_labels)
        return batches, num_items

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
        sampler = super()._get_train_sampler(*args, **kwargs)
        if not isinstance(sampler, LengthGroupedSampler):  # accelerate seeds the random one by epoch
            return sampler
        return EpochOrder(sampler, self.args.seed if self.args.data_seed is None else self.args.data_seed)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Evaluate as the Trainer does; a run that is evaluated on its way is the run that is not."""
        with random_state_kept():
            scores: dict[str, float] = super().evaluate(*args, **kwargs)
        return scores

    def prediction_step(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        with knowing_labels(model, inputs):
            return super().prediction_step(model, inputs, *args, **kwargs)

    def throughput(self) -> dict[str, float | None]:
        """Tokens per second, padding included, before units first go and after they last do; the same where none go.

        None where this process did no such step.
        """
        steps = [event.step for event in self.controller.events if event.prune is not None]
        first, last = (steps[0], steps[-1]) if steps else (self._clock.last, 0)
        return {
            "tokens_per_s_before": self._clock.rate(0, first),
            "tokens_per_s_after": self._clock.rate(last, self._clock.last),
        }

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        """Only a model of the final size may be the best: as long as a plan is to come there is none."""
        return self.controller.settled and super()._determine_best_metric(metrics, trial)

    def _load_best_model(self) -> None:
        folder = Path(str(self.state.best_model_checkpoint))
        if not load_live(self._module(), folder):
            super()._load_best_model()

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        self._random = RandomState()
        super()._maybe_log_save_evaluate(*args, **kwargs)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        if self._patched() is self._module():
            super()._save(output_dir, state_dict)
        else:  # what is around the model would read its own folder as a stock model
            Trainer._save(self, output_dir, state_dict)
        if hasattr(self, "controller"):
            save_controller(self.controller, Path(output_dir or self.args.output_dir or ""))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        self._end_run()
        self._resume_from = Path(resume_from_checkpoint)
        optimizer = self.optimizer  # where the user gave one, it has the parameters of the model as it came
        restore_shapes(self._patched(), self._resume_from, None if optimizer is None else bare_optimizer(optimizer))
        if self._patched() is self._module():
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            Trainer._load_from_checkpoint(self, resume_from_checkpoint, model)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        super()._load_rng_state(checkpoint)
        self._random = RandomState()


def trainer_class(trainer: type[Trainer]) -> type[Any]:
    """The class of a trainer that prunes the model it trains.

    It is the given one with `APTrainer` before it: ``apt.trainer_class(SFTTrainer)(model, args, target_sparsity=0.5,
    ...)`` takes the arguments of both. Its loss stays its own, an overridden ``compute_loss`` included; what the method
    adds is put around it.

    Args:
        trainer: any subclass of `transformers.Trainer`: of transformers, TRL, sentence-transformers or yours.

    Returns:
        A subclass of both, the same at every call.

    Raises:
        ValueError: it is no such class.
    """
    return beside(APTrainer, trainer)
