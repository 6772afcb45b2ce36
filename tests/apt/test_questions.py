"""Questions about a context: windows and spans, the likeliest answer, when there is none, SQuAD's scores by hand."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_tasks import DATA, rows_of, tiny_reader, word_tokenizer
from transformers import DataCollatorWithPadding

from apt.runs.config import DataConfig
from apt.runs.data import QuestionLoader, Questions
from apt.runs.evaluation.answers import Answer, answer_metrics, best_span, best_threshold, find_answers
from apt.runs.evaluation.metrics import plain, squad_metrics

SAMPLE = "questions.jsonl"


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return word_tokenizer()


def load(tokenizer: Any, path: Path = DATA / SAMPLE, **settings: Any) -> QuestionLoader:
    return QuestionLoader(DataConfig(datasets=str(path), **({"test_size": 4} | settings)), tokenizer)


def spelled(data: Questions, i: int) -> str:
    """The span that window i teaches, as text; "" where it teaches that there is none."""
    window, start, end = data.windows[i], data.columns["start_positions"][i], data.columns["end_positions"][i]
    if start == end == window.no_answer:
        return ""
    first, last = window.offsets[start], window.offsets[end]
    assert first is not None
    assert last is not None
    return data.questions[window.question].context[first[0] : last[1]]


@pytest.mark.parametrize("max_length", [24, 200])
def test_windows_cover_the_context_and_teach_the_answer(tokenizer: Any, max_length: int) -> None:
    data = load(tokenizer, max_length=max_length)
    assert data.validation is not None
    parts = [data.train, data.validation, data.test]
    assert sum(len(part.questions) for part in parts) == 24
    assert (len(data.validation.questions), len(data.test.questions)) == (2, 4)
    for part in parts:
        taught: dict[int, set[str]] = {}
        seen: dict[int, set[int]] = {}
        for i, window in enumerate(part.windows):
            assert len(part.columns["input_ids"][i]) <= max_length
            taught.setdefault(window.question, set()).add(spelled(part, i).strip())
            for span in window.offsets:
                seen.setdefault(window.question, set()).update(range(*span) if span else ())
        for number, question in enumerate(part.questions):
            assert seen[number] == set(range(len(question.context)))
            assert taught[number] - {""} == set(question.answers)
    assert (len(data.train) == len(data.train.questions)) == (max_length == 200)


def test_a_set_threshold_or_answers_everywhere_hold_nothing_out(tmp_path: Path, tokenizer: Any) -> None:
    config = DataConfig(datasets=str(DATA / SAMPLE), test_size=4)
    assert QuestionLoader(config, tokenizer, hold_out=False).validation is None
    path = tmp_path / "a.jsonl"
    rows = [row for row in rows_of(SAMPLE) if row["answers"]["text"]]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    assert load(tokenizer, path).validation is None


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"answers": "Anna"}, "line 2, column 'answers': must be {'text'.*got 'Anna'"),
        ({"answers": {"text": ["Anna"], "answer_start": [0]}}, "'Anna' does not stand at character 0 of the context"),
        ({"context": None}, "line 2, column 'context': the text is missing"),
        ({"question": "word " * 90}, "line 2: the question leaves -?[0-9]+ of 128 tokens to its context"),
    ],
)
def test_broken_rows(tmp_path: Path, tokenizer: Any, change: dict[str, Any], words: str) -> None:
    rows = rows_of(SAMPLE)
    rows[1] |= change
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    with pytest.raises(ValueError, match=words):
        load(tokenizer, path)


def test_the_likeliest_span() -> None:
    draw = np.random.RandomState(0)
    for _ in range(20):
        start, end = draw.randn(9), draw.randn(9)
        allowed = [False, False, True, True, True, True, False, True, True]
        tokens = [i for i in range(9) if allowed[i]]
        pairs = [(i, j) for i in tokens for j in tokens if 0 <= j - i < 3]
        best = max(pairs, key=lambda pair: start[pair[0]] + end[pair[1]])
        found = best_span(start, end, allowed, 3)
        assert found is not None
        assert found[:2] == best
        assert found[2] == pytest.approx(start[best[0]] + end[best[1]])
    assert best_span(start, end, [False] * 9, 3) is None


def test_answers_are_the_best_over_all_windows(tokenizer: Any) -> None:
    model, data = tiny_reader().double(), load(tokenizer, max_length=24).test
    found = find_answers(model, data, DataCollatorWithPadding(tokenizer), 3, 5)
    for number, question in enumerate(data.questions):
        best, nothing = ("", -np.inf), np.inf
        for i, window in enumerate(data.windows):
            if window.question != number:
                continue
            with torch.no_grad():
                output = model(input_ids=torch.tensor([data.columns["input_ids"][i]]))
            start, end = output.start_logits[0].numpy(), output.end_logits[0].numpy()
            nothing = min(nothing, start[0] + end[0])
            for a, first in enumerate(window.offsets):
                for b, last in enumerate(window.offsets[: a + 5]):
                    if first and last and b >= a and start[a] + end[b] > best[1]:
                        best = question.context[first[0] : last[1]], start[a] + end[b]
        assert found[number].text == best[0]
        assert found[number].margin == pytest.approx(nothing - best[1])


def test_the_threshold_is_the_best_there_is() -> None:
    draw = np.random.RandomState(1)
    for _ in range(20):
        margins = draw.randint(-3, 4, size=8).astype(float)
        golds = [["a dog"] if draw.rand() < 0.5 else [] for _ in range(8)]
        answers = [Answer("dog" if draw.rand() < 0.7 else "cat", float(margin)) for margin in margins]
        data = Questions({"input_ids": []}, [], [])

        def score(threshold: float) -> float:
            said = ["" if answer.margin > threshold else answer.text for answer in answers]  # noqa: B023
            return squad_metrics(said, golds)["f1"]  # noqa: B023

        best = max(score(threshold) for threshold in np.arange(-4.5, 5.0, 0.5))
        assert score(best_threshold(answers, golds)) == pytest.approx(best)
        assert len(data) == 0


def test_no_answer_above_the_threshold(tokenizer: Any) -> None:
    data = load(tokenizer).test
    answers = [Answer(question.answers[0] if question.answers else "x", 1.0) for question in data.questions]
    answered = sum(bool(question.answers) for question in data.questions) / len(data.questions)
    assert answer_metrics(answers, data, 1.0)["exact_match"] == answered
    assert answer_metrics(answers, data, 0.9)["exact_match"] == pytest.approx(1.0 - answered)
    assert "no_answer_threshold" not in answer_metrics(answers, data, None)


def test_scores() -> None:
    assert plain("The  cat, an Owl!") == "cat owl"
    texts = ["the big Dog", "cat", "", "x"]
    answers = [["dog", "a big brown dog"], ["Cat."], [], []]
    # Two words of two and of three; the same; rightly silent; not.
    assert squad_metrics(texts, answers) == {
        "f1": pytest.approx((4 / 5 + 1.0 + 1.0 + 0.0) / 4),
        "exact_match": pytest.approx(0.5),
    }
