"""The settings of self-distillation."""

from dataclasses import dataclass

from apt.pruning.schedule import Point, check_point

MAPPINGS = ("nearest", "cofi")
RAMPS = ("window", "distill")
TEACHER_DTYPES = ("bf16", "fp16")


@dataclass(frozen=True, kw_only=True)
class DistillationConfig:
    """Self-distillation: the dense model as it stood before the first mask fell teaches the one that shrinks."""

    use_self_distillation: bool = False  # whether there is a teacher
    teacher_layer_mapping: str = "nearest"  # who learns from an emptied layer: "nearest" alive one; "cofi": any alive
    num_teacher_layers: int = 4  # blocks of layers, of each of which one is drawn at random for every batch; at least 1
    distill_loss_weight_start: float = 0.0  # mu where its ramp begins, [0, 1]; the task's loss weighs 1 - mu
    distill_loss_weight_end: float = 1.0  # mu where it ends and from there on, [0, 1]
    mu_ramp: str = "window"  # over the pruning window, or "distill": from the first event that prunes to its end
    distill_end: Point = 0.5  # float: fraction of the run; int: optimizer step; from there on the task's loss alone
    w_pred: float | None = None  # weight of the predictions, at least 0; null: 1 in classifiers, 0.1 for tokens, spans
    w_layer: float = 0.9  # weight of the layers, at least 0
    tau: float = 2.0 / 3.0  # temperature of the predictions, unitless, above 0
    normalize_layers: bool | None = None  # hidden states over their root mean square; null: where there is a decoder
    transform_rank: int = 8  # of the trainable part of Tr, at least 1
    distill_every: int = 1  # optimizer steps from one with a teacher to the next, at least 1
    teacher_dtype: str | None = None  # "bf16" or "fp16": the teacher under autocast; null: as the student runs
    teacher_refresh: bool = False  # a student that beats its teacher on held-out training data takes its place
    held_out_share: float = 0.02  # of the training data, in (0, 0.5]; APTrainer holds it out where that is asked for

    def __post_init__(self) -> None:
        choices = {
            "teacher_layer_mapping": MAPPINGS,
            "mu_ramp": RAMPS,
            "teacher_dtype": (None, *TEACHER_DTYPES),
        }
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise ValueError(f"distillation: {name} must be one of {list(known)}, got {getattr(self, name)!r}")
        for name in ("num_teacher_layers", "transform_rank", "distill_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"distillation: {name} must be at least 1, got {getattr(self, name)}")
        for name in ("distill_loss_weight_start", "distill_loss_weight_end"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"distillation: {name} must be in [0, 1], got {getattr(self, name)}")
        if (self.w_pred or 0.0) < 0.0 or self.w_layer < 0.0 or not self.tau > 0.0:
            raise ValueError(
                f"distillation: w_pred and w_layer must be at least 0 and tau above 0, got {self.w_pred}, "
                f"{self.w_layer} and {self.tau}"
            )
        check_point("distillation", "distill_end", self.distill_end)
        if not 0.0 < self.held_out_share <= 0.5:
            raise ValueError(f"distillation: held_out_share must be in (0, 0.5], got {self.held_out_share}")
