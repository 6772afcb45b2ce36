"""Scores of a model: metrics, perplexity, answers, benchmark tasks, and its efficiency."""
