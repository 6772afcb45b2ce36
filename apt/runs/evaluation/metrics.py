"""Scores of predictions against what they should be, by scikit-learn, scipy and rouge-score. Pure functions."""

import re
import string
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np


def classification_metrics(prediction: Iterable[Any]) -> dict[str, float]:
    """`accuracy` and `f1` in [0, 1], and `matthews`, the correlation of Matthews, in [-1, 1].

    With two classes F1 is that of class 1, with more the mean over the classes. What has nothing to count is 0.

    Args:
        prediction: logits ``[N, C]`` and labels ``[N]``, as arrays; a Trainer's `EvalPrediction` is such a pair.
    """
    from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

    logits, labels = map(np.asarray, prediction)
    classes = logits.argmax(axis=-1)
    average = "binary" if logits.shape[-1] == 2 else "macro"
    return {
        "accuracy": float(accuracy_score(labels, classes)),
        "f1": float(f1_score(labels, classes, average=average, zero_division=0.0)),
        "matthews": float(matthews_corrcoef(labels, classes)) if len({*labels, *classes}) > 1 else 0.0,
    }


def regression_metrics(prediction: Iterable[Any]) -> dict[str, float]:
    """`pearson` and `spearman`, correlations in [-1, 1], and `mse`, the mean squared error in squared units of a label.

    Where the predictions or the labels are all the same, nothing goes along with them: both correlations are 0.

    Args:
        prediction: predicted numbers ``[N]`` or ``[N, 1]`` and labels ``[N]``, as arrays.
    """
    from scipy.stats import pearsonr, spearmanr

    values, labels = (np.asarray(each, dtype=np.float64).reshape(-1) for each in prediction)
    error = float(np.square(values - labels).mean())
    if np.ptp(values) == 0.0 or np.ptp(labels) == 0.0:
        return {"pearson": 0.0, "spearman": 0.0, "mse": error}
    correlations = float(pearsonr(values, labels).statistic), float(spearmanr(values, labels).statistic)
    return {"pearson": correlations[0], "spearman": correlations[1], "mse": error}


def rouge_metrics(texts: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """`rouge1`, `rouge2` and `rougeL`: the mean F-measures of words, pairs of words and longest common runs, in [0, 1].

    Words are lower-cased and stemmed, as in the reports of CNN/DailyMail and XSum.

    Raises:
        ImportError: rouge-score is not installed.
    """
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError:
        raise ImportError('metrics: ROUGE needs rouge-score; pip install "apt-lm[train]"') from None
    names = ("rouge1", "rouge2", "rougeL")
    scorer = RougeScorer(names, use_stemmer=True)
    rows = [scorer.score(reference, text) for text, reference in zip(texts, references, strict=True)]
    return {name: float(np.mean([row[name].fmeasure for row in rows])) for name in names}


def squad_metrics(texts: Sequence[str], answers: Sequence[Sequence[str]]) -> dict[str, float]:
    """`f1` and `exact_match` in [0, 1], as SQuAD v2 counts them: means over questions of the best over their answers.

    Args:
        texts: what was said to each question, "" for no answer.
        answers: all that count as right; none where there is no answer, which only "" then is.
    """
    exact = [
        max(float(plain(text) == plain(gold)) for gold in golds or [""])
        for text, golds in zip(texts, answers, strict=True)
    ]
    return {
        "f1": float(np.mean([span_f1(text, golds) for text, golds in zip(texts, answers, strict=True)])),
        "exact_match": float(np.mean(exact)),
    }


def span_f1(text: str, answers: Sequence[str]) -> float:
    """F1 of the words of a text against the answer that it is most like; no answer is like "" alone."""
    return max(_words_f1(plain(text).split(), plain(gold).split()) for gold in answers or [""])


def _words_f1(said: list[str], gold: list[str]) -> float:
    if not said or not gold:
        return float(said == gold)
    hits = (Counter(said) & Counter(gold)).total()
    return 2.0 * hits / (len(said) + len(gold))


def plain(text: str) -> str:
    """A text as SQuAD compares it: lower case, without punctuation and articles, one blank between words."""
    kept = "".join(character for character in text.lower() if character not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", kept).split())
