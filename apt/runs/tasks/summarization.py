"""Summarization: an encoder-decoder writes a text of a text; a translation is one too."""

import torch
from torch import Tensor, nn

from apt.runs.data import DataConfig, Loader, PairLoader
from apt.runs.evaluation.evaluate import Evaluator
from apt.runs.evaluation.language import generate
from apt.runs.evaluation.metrics import rouge_metrics
from apt.runs.tasks.task import DataRequest, Task


def load_pairs(asked: DataRequest) -> Loader:
    """Texts, and what is to be written of them."""
    return PairLoader(asked.data, asked.tokenizer, asked.seed)


def written_tokens(ids: Tensor, data: DataConfig) -> dict[str, Tensor]:
    """A target as long as one may be, for each row."""
    written = torch.ones(len(ids), data.max_target_length, dtype=torch.long)
    return {"labels": written, "decoder_input_ids": written.clone()}


def score_texts(evaluator: Evaluator, model: nn.Module, data: Loader) -> dict[str, float]:
    """How much of the held-out targets stands in what the model writes."""
    assert isinstance(data, PairLoader)
    longest = data.config.max_target_length
    num_beams = evaluator.settings.num_beams
    ids = generate(model, data.test, evaluator.collator, evaluator.batch_size, longest, num_beams)
    texts = evaluator.tokenizer.batch_decode(ids, skip_special_tokens=True)
    return rouge_metrics(texts, data.test.references)


SUMMARIZATION = Task(
    metrics=("rouge1", "rouge2", "rougeL"),
    head="AutoModelForSeq2SeqLM",
    hub_tag="summarization",
    load=load_pairs,
    targets=written_tokens,
    score=score_texts,
    new_head=False,
    writes=True,
)
