"""Sentences with labels, or plain text, from the hub, from files or from inside an installed package, as tokens."""

from apt.runs.data.config import DataConfig
from apt.runs.data.examples import Examples, Loader
from apt.runs.data.instructions import InstructionLoader
from apt.runs.data.pairs import PairLoader, TextPairs
from apt.runs.data.questions import Question, QuestionLoader, Questions, Window
from apt.runs.data.sentences import DatasetLoader, has_labels
from apt.runs.data.text import TextLoader, collate_blocks

__all__ = [
    "DataConfig",
    "DatasetLoader",
    "Examples",
    "InstructionLoader",
    "Loader",
    "PairLoader",
    "Question",
    "QuestionLoader",
    "Questions",
    "TextLoader",
    "TextPairs",
    "Window",
    "collate_blocks",
    "has_labels",
]
