"""Scores of a model: metrics, perplexity, answers, benchmark tasks, and its efficiency."""

from apt.runs.evaluation.config import EvaluationConfig

__all__ = ["EvaluationConfig"]
