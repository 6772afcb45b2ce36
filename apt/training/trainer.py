"""APTrainer: a `transformers.Trainer` that drives the controller. It takes no decision of its own."""

import itertools
from collections.abc import Iterator, Mapping, Sized
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback
from transformers.trainer_pt_utils import LengthGroupedSampler

from apt.apt_config import APTConfig
from apt.distillation import place_transform
from apt.files import write_jsonl
from apt.layers import TRANSFORM, LayerTransform
from apt.pruning.ranks import adapter_sizes, total_params
from apt.surgery import patch_state, uncompiled
from apt.surgery.moments import bare_optimizer
from apt.training.batches import EpochOrder, hold_out, micro_batch_weights
from apt.training.checkpoint import RandomState, load_controller, random_state_kept, restore_shapes, save_controller
from apt.training.clock import StepClock
from apt.training.controller import Controller, adopt
from apt.training.recorder import Recorder, event_scalars
from apt.training.whole_checkpoints import WholeCheckpoints


class APTrainer(WholeCheckpoints):
    """Trains a patched model and prunes it on the way; every argument of `transformers.Trainer` works.

    Args:
        model: patched by `apt.patch_model`.
        args: the ``TrainingArguments``.
        config: None means the one `patch_model` stored.
        event_log: a JSON-lines file that gets each event.
        record_to: a folder that gets what a report draws: `steps.jsonl` and `shapes.jsonl`.
        train_dataset: with `teacher_refresh` a share of it, `held_out_share`, drawn with the seed of the arguments, is
            not trained on: there it is seen whether a student beats its teacher.
        overrides: leaves of the config by name, e.g. ``target_sparsity=0.6``.

    Raises:
        ValueError: the model is not patched, or a setting is unknown or out of range.
    """

    controller: Controller

    def __init__(
        self,
        model: nn.Module,
        args: Any = None,
        *,
        config: APTConfig | None = None,
        event_log: Path | None = None,
        record_to: Path | None = None,
        **kwargs: Any,
    ) -> None:
        if uncompiled(model) is not model:
            raise ValueError(
                "trainer: give the model itself, and torch_compile=True in the arguments, which compile it"
            )
        names = _trainer_arguments()
        overrides = {name: kwargs.pop(name) for name in list(kwargs) if name not in names}
        self.apt_config = (config or patch_state(model).config).with_overrides(**overrides)
        self.event_log = event_log
        self._recorder = None if record_to is None else Recorder(Path(record_to))
        self._resume_from: Path | None = None
        self._random = RandomState()  # at the end of the latest step, where a checkpoint would save it
        self._weights: list[float] = []  # of the micro-batches of this step that are still to come
        self._clock = StepClock()
        self._held_out: Any = None
        if self.apt_config.distillation.teacher_refresh:
            share = self.apt_config.distillation.held_out_share
            seed = getattr(args, "seed", 0)
            kwargs["train_dataset"], self._held_out = hold_out(kwargs.get("train_dataset"), share, seed)
        super().__init__(model=model, args=args, **kwargs)
        if self.apt_config.distillation.use_self_distillation:  # before the optimizer, which is to have it
            place_transform(model, self.apt_config.distillation, torch.initial_seed())
        # The controller adds per-batch means to the loss, so accumulation weighs the whole of it alike.
        self.model_accepts_loss_kwargs = False
        self.add_callback(_Drive(self))

    def start_controller(self, total_steps: int) -> None:
        """Make the controller once the optimizer exists and the length of the run is known."""
        assert self.optimizer is not None
        self.controller = Controller(
            self._module(),
            self.optimizer,
            total_steps,
            self.apt_config,
            scaler=getattr(self.accelerator, "scaler", None),
            event_log=self.event_log,
            held_out=self._batches_of(self._held_out) if self._held_out is not None else None,
        )
        if self._resume_from is not None:
            load_controller(self.controller, self._resume_from)
            if self.event_log is not None:  # what came after the checkpoint will come again
                write_jsonl(self.event_log, [event.to_json() for event in self.controller.events])
        if self._recorder is not None:
            self._recorder.begin(self.controller)
        self.controller.prepare()
        if self.controller.awaits_calibration:
            self.controller.prune_before_tuning(
                self._calibration_batches(), lambda model, batch: self.compute_loss(model, dict(batch))
            )
            self._log_events(0)

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """Make the optimizer, and add Tr's parameters where there is a Tr, before a saved optimizer state is loaded."""
        optimizer: Any = super().create_optimizer(*args, **kwargs)
        transform = getattr(self._module(), TRANSFORM, None)
        if isinstance(transform, LayerTransform):
            adopt(transform, self._module(), getattr(optimizer, "optimizer", optimizer))
        return optimizer

    def _batches_of(self, dataset: Any) -> list[dict[str, Any]]:
        """A held-out data set in batches; no random state moves."""
        collate = self._get_collator_with_removed_columns(self.data_collator, "held out")
        size = self.args.per_device_eval_batch_size
        with torch.random.fork_rng(devices=[]):
            chunks = [range(start, min(start + size, len(dataset))) for start in range(0, len(dataset), size)]
            return [dict(self._prepare_inputs(collate([dataset[i] for i in chunk]))) for chunk in chunks]

    def _calibration_batches(self) -> Iterator[dict[str, Any]]:
        """Batches of the training data, drawn with the run's seed; its own loader and random state stay as they are."""
        dataset = self.train_dataset
        size = self.args.per_device_train_batch_size
        if isinstance(dataset, Sized):
            seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
            order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(seed)).tolist()
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

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        batch = dict(inputs)  # label smoothing takes the labels out
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch)
        if model.training and not self.controller.awaits_calibration:
            named = {**outputs, "loss": loss} if isinstance(outputs, Mapping) else loss
            loss = self.controller.loss(named, batch)
            if self._weights:
                loss = loss * self._weights.pop(0)
        return (loss, outputs) if return_outputs else loss

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        tokens = inputs.get("input_ids", inputs.get("inputs_embeds"))
        self._clock.tokens += 0 if tokens is None else tokens.shape[0] * tokens.shape[1]
        loss: Tensor = super().training_step(model, inputs, num_items_in_batch)
        if self.accelerator.sync_gradients:
            self.controller.after_backward()
        return loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log beside the loss sparsity, adapter parameters and tokens/s, with a teacher task_loss, distill_loss and mu.

        What is logged at an event begins with ``event_``.
        """
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
            **({"tokens_per_s": tokens / seconds} if seconds else {}),
            **({} if distillation is None else distillation.report()),
        }
        super().log(logs, *args, **kwargs)
        if self._recorder is not None:
            more = {"seconds": seconds, "tokens": tokens, "steps": steps, "planned_sparsity": self._planned_sparsity()}
            self._recorder.log(self.state.global_step, logs, self.args.device, **more)

    def _adapter_params(self) -> int:
        return total_params(adapter_sizes(self._module(), {}))

    def _planned_sparsity(self) -> float | None:
        """The sparsity that the schedule asks for now; None where nothing is pruned, or time is the goal."""
        config = self.controller.config
        pruning = self.controller.config.pruning
        if not config.prunes or pruning.target_speedup is not None:
            return None
        if pruning.prune_before_tuning:
            return pruning.target_sparsity
        return pruning.schedule(self.controller.total_steps).get_current_sparsity(self.state.global_step)

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
        # A loss function of the user's own is given the number of items, and divides by it.
        own = self.compute_loss_func is not None
        self._weights = [] if own else micro_batch_weights(batches, self._loss_shifts_labels)
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
        """Only a model of the final size may be the best: before the last event there is none."""
        return not self.controller.active and super()._determine_best_metric(metrics, trial)

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        self._random = RandomState()
        super()._maybe_log_save_evaluate(*args, **kwargs)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        super()._save(output_dir, state_dict)
        if hasattr(self, "controller"):
            save_controller(self.controller, Path(output_dir or self.args.output_dir or ""))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        self._resume_from = Path(resume_from_checkpoint)
        optimizer = self.optimizer  # where the user gave one, it has the parameters of the model as it came
        restore_shapes(self._module(), self._resume_from, None if optimizer is None else bare_optimizer(optimizer))
        super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        super()._load_rng_state(checkpoint)
        self._random = RandomState()


class _Drive(TrainerCallback):
    """Calls the controller where the Trainer has its hooks."""

    def __init__(self, trainer: APTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.start_controller(state.max_steps)
        self.trainer._random = RandomState()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer._clock.begin()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        trainer = self.trainer
        trainer._clock.end(state.global_step)
        seen = len(trainer.controller.events)
        if trainer._recorder is not None:
            trainer._recorder.before_step(trainer.controller)
        trainer.controller.after_step()
        if len(trainer.controller.events) > seen:
            trainer._log_events(seen)


def _trainer_arguments() -> set[str]:
    import inspect

    return set(inspect.signature(Trainer.__init__).parameters)
