"""Sentences with labels, or plain text, from the hub, from files or from inside an installed package, as tokens."""

from apt.families.locate import resolve_model
from apt.runs.data.examples import Examples
from apt.runs.data.instructions import InstructionLoader
from apt.runs.data.pairs import PairLoader, TextPairs
from apt.runs.data.questions import Question, QuestionLoader, Questions, Window
from apt.runs.data.sentences import DatasetLoader
from apt.runs.data.text import NOT_A_TARGET, TextLoader, collate_blocks

__all__ = [
    "NOT_A_TARGET",
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
    "resolve_model",
]


Loader = (
    DatasetLoader | InstructionLoader | PairLoader | QuestionLoader | TextLoader
)  # whatever reads the data of a task
