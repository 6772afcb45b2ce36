"""Answers out of texts: from the logits of windows to spans, and when to say that there is none."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from apt.process.progress import progress
from apt.runs.data import Questions
from apt.runs.evaluation.metrics import span_f1, squad_metrics


@dataclass(frozen=True)
class Answer:
    """The likeliest span of a question, and by how much saying nothing beats it."""

    text: str
    margin: float  # logits: the score of no answer less that of the span


@torch.inference_mode()
def find_answers(model: nn.Module, data: Questions, collator: Any, batch_size: int, longest: int) -> list[Answer]:
    """The likeliest answer of each question: the best span over its windows, of at most `longest` tokens.

    A span scores the logit of its start plus that of its end. No answer scores what the windows' first tokens do,
    the lowest over the windows of a question: each of them must find none.

    Args:
        model: for questions, in evaluation mode.
        data: windows, as `QuestionLoader` makes them.
        collator: pads them.
        batch_size: windows of one forward pass.
        longest: tokens of an answer, at least 1.
    """
    device = next(model.parameters()).device
    order = sorted(range(len(data)), key=lambda i: -len(data.columns["input_ids"][i]))
    spans = [("", -np.inf)] * len(data.questions)
    nothing = [np.inf] * len(data.questions)
    for begin in progress(range(0, len(order), batch_size), "answers"):
        chosen = order[begin : begin + batch_size]
        batch = {name: value.to(device) for name, value in collator([data[i] for i in chosen]).items()}
        output = model(**{name: value for name, value in batch.items() if not name.endswith("_positions")})
        starts, ends = (output[name].double().cpu().numpy() for name in ("start_logits", "end_logits"))
        for row, i in enumerate(chosen):
            window = data.windows[i]
            question = window.question
            nothing[question] = min(nothing[question], starts[row][window.no_answer] + ends[row][window.no_answer])
            found = best_span(starts[row], ends[row], [span is not None for span in window.offsets], longest)
            if found is not None and found[2] > spans[question][1]:
                first, last = window.offsets[found[0]], window.offsets[found[1]]
                assert first is not None
                assert last is not None
                spans[question] = data.questions[question].context[first[0] : last[1]], found[2]
    return [Answer(text, float(none - score)) for (text, score), none in zip(spans, nothing, strict=True)]


def best_span(
    start: NDArray[np.float64], end: NDArray[np.float64], allowed: Sequence[bool], longest: int
) -> tuple[int, int, float] | None:
    """First and last token of the likeliest span of allowed tokens, and its score; None where no token is allowed."""
    tokens = np.flatnonzero(allowed)
    if not len(tokens):
        return None
    scores = start[tokens][:, None] + end[tokens][None, :]
    length = tokens[None, :] - tokens[:, None] + 1
    scores[(length < 1) | (length > longest)] = -np.inf
    i, j = np.unravel_index(int(scores.argmax()), scores.shape)
    return int(tokens[i]), int(tokens[j]), float(scores[i, j])


def best_threshold(answers: Sequence[Answer], golds: Sequence[Sequence[str]]) -> float:
    """The margin above which to say nothing, so that F1 is highest on these questions."""
    order = np.argsort([answer.margin for answer in answers], kind="stable")
    margins = np.array([answers[i].margin for i in order])
    said = np.array([span_f1(answers[i].text, golds[i]) for i in order])
    silent = np.array([span_f1("", golds[i]) for i in order])
    # The first k of the order are answered, the others are not.
    totals = np.concatenate([[0.0], said.cumsum()]) + silent.sum() - np.concatenate([[0.0], silent.cumsum()])
    totals[1:-1][margins[1:] == margins[:-1]] = -np.inf  # what is equal cannot be told apart
    k = int(totals.argmax())
    edges = np.concatenate([[margins[0] - 1.0], (margins[1:] + margins[:-1]) / 2.0, [margins[-1] + 1.0]])
    return float(edges[k])


def answer_metrics(answers: Sequence[Answer], data: Questions, threshold: float | None) -> dict[str, float]:
    """`f1` and `exact_match` of what is said; above the threshold nothing is. None: there is always an answer."""
    said = ["" if threshold is not None and answer.margin > threshold else answer.text for answer in answers]
    scores = squad_metrics(said, [question.answers for question in data.questions])
    scores["test_questions"] = len(said)
    return scores if threshold is None else scores | {"no_answer_threshold": threshold}
