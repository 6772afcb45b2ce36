"""The tasks by name, one line each: what every room asks of a task stands in its file and nowhere else."""

from apt.runs.tasks.classification import CLASSIFICATION
from apt.runs.tasks.instruction_following import INSTRUCTION_FOLLOWING
from apt.runs.tasks.language_modeling import LANGUAGE_MODELING
from apt.runs.tasks.question_answering import QUESTION_ANSWERING
from apt.runs.tasks.regression import REGRESSION
from apt.runs.tasks.summarization import SUMMARIZATION
from apt.runs.tasks.task import DataRequest, Task

__all__ = ["TASKS", "DataRequest", "Task"]

TASKS: dict[str, Task] = {
    "classification": CLASSIFICATION,
    "regression": REGRESSION,
    "language_modeling": LANGUAGE_MODELING,
    "instruction_following": INSTRUCTION_FOLLOWING,
    "summarization": SUMMARIZATION,
    "question_answering": QUESTION_ANSWERING,
}
