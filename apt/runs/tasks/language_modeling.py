"""Language modeling: every token of plain text is predicted from those before it."""

from torch import Tensor, nn

from apt.runs.data import DataConfig, Loader, TextLoader
from apt.runs.evaluation.evaluate import Evaluator
from apt.runs.evaluation.language import perplexity
from apt.runs.tasks.task import DataRequest, Task


def load_text(asked: DataRequest) -> Loader:
    """Documents, packed into blocks."""
    return TextLoader(asked.data, asked.tokenizer, asked.seed)


def same_tokens(ids: Tensor, data: DataConfig) -> dict[str, Tensor]:
    """The tokens themselves; the model shifts them by one."""
    return {"labels": ids.clone()}


def score_perplexity(evaluator: Evaluator, model: nn.Module, data: Loader) -> dict[str, float]:
    """`perplexity` of what is held out, its `loss` and `test_tokens`."""
    return perplexity(model, data.test, evaluator.batch_size)


LANGUAGE_MODELING = Task(
    metrics=("perplexity",),
    head="AutoModelForCausalLM",
    hub_tag="text-generation",
    load=load_text,
    targets=same_tokens,
    score=score_perplexity,
    new_head=False,
    packed=True,
    writes=True,
)
