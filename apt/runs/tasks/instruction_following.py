"""Instruction following: a language model learns the responses to instructions, and of a row nothing else."""

from apt.runs.data import InstructionLoader, Loader
from apt.runs.tasks.language_modeling import same_tokens, score_perplexity
from apt.runs.tasks.task import DataRequest, Task


def load_instructions(asked: DataRequest) -> Loader:
    """Instructions with their responses."""
    return InstructionLoader(asked.data, asked.tokenizer, asked.seed)


INSTRUCTION_FOLLOWING = Task(
    metrics=("perplexity",),
    head="AutoModelForCausalLM",
    hub_tag="text-generation",
    load=load_instructions,
    targets=same_tokens,
    score=score_perplexity,
    new_head=False,
    writes=True,
)
