"""What a run is scored by, and what of it is timed."""

from dataclasses import dataclass

from apt.runs.checks import check_at_least


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """What is measured at the end."""

    metrics: list[str] | None = None  # of the task's, the one a report shows first in front; null: all of the task
    inference_batch_size: int = 32  # sentences, blocks, at least 1; of the latency and of the scores
    inference_length: int = 64  # tokens of each sentence in the latency, at least 1
    no_answer_threshold: float | None = None  # logits above the best span; null: chosen on training questions held out
    max_answer_length: int = 30  # tokens, at least 1
    num_beams: int = 1  # of the texts that are scored by ROUGE, at least 1; 1 is greedy
    generated_tokens: int = 32  # of each prompt in the timing of generation (language models), at least 2
    inference_repeats: int = 20  # forward passes of each model, of which the median is the latency, at least 1
    score_steps: int = 0  # optimizer steps between two test scores on the way, which choose nothing; 0: none
    event_timing_steps: int = 10  # forward and backward passes before and after each event; 0: events are not timed

    def __post_init__(self) -> None:
        ones = ("inference_batch_size", "inference_length", "inference_repeats", "num_beams", "max_answer_length")
        bounds = dict.fromkeys(ones, 1) | {"event_timing_steps": 0, "score_steps": 0, "generated_tokens": 2}
        check_at_least("evaluation", self, bounds)
        if self.metrics == []:
            raise ValueError("config: evaluation.metrics must name a metric at least; null is all of the task")
