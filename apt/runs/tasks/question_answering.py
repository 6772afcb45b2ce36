"""Question answering: the answer stands in a context, or nowhere."""

import torch
from torch import Tensor, nn

from apt.runs.data import DataConfig, Loader, QuestionLoader, Questions
from apt.runs.evaluation.answers import Answer, answer_metrics, best_threshold, find_answers
from apt.runs.evaluation.evaluate import Evaluator
from apt.runs.tasks.task import DataRequest, Task


def load_questions(asked: DataRequest) -> Loader:
    """Questions with their contexts; some are held out where the threshold for no answer is to be chosen."""
    hold_out = asked.evaluation.no_answer_threshold is None
    return QuestionLoader(asked.data, asked.tokenizer, asked.seed, hold_out=hold_out)


def one_span_each(ids: Tensor, data: DataConfig) -> dict[str, Tensor]:
    """The first and the last token of an answer, for each row."""
    return {name: torch.ones(len(ids), dtype=torch.long) for name in ("start_positions", "end_positions")}


def score_answers(evaluator: Evaluator, model: nn.Module, data: Loader) -> dict[str, float]:
    """How much of the answers is found.

    The threshold for no answer, where none is set, is chosen on training questions that were held out.
    """
    assert isinstance(data, QuestionLoader)

    def answers_to(questions: Questions) -> list[Answer]:
        longest = evaluator.settings.max_answer_length
        return find_answers(model, questions, evaluator.collator, evaluator.batch_size, longest)

    threshold = evaluator.settings.no_answer_threshold
    if threshold is None and data.validation is not None:
        golds = [question.answers for question in data.validation.questions]
        threshold = best_threshold(answers_to(data.validation), golds)
    return answer_metrics(answers_to(data.test), data.test, threshold)


QUESTION_ANSWERING = Task(
    metrics=("f1", "exact_match"),
    head="AutoModelForQuestionAnswering",
    hub_tag="question-answering",
    load=load_questions,
    targets=one_span_each,
    score=score_answers,
)
