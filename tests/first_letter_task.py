"""A task that this package does not have: with which letter each word of a sentence begins."""

from string import ascii_lowercase

import torch
from torch import Tensor, nn
from transformers import DataCollatorForTokenClassification

from apt.families import IGNORED
from apt.runs.data import DataConfig, Examples, Loader
from apt.runs.data.rows import chosen_rows, split
from apt.runs.data.sources import Table, read_tables
from apt.runs.evaluation.evaluate import Evaluator
from apt.runs.tasks import DataRequest, Task

LETTERS = {letter: number for number, letter in enumerate(ascii_lowercase)}


class LetterLoader(Loader):
    """Sentences of a column `text`; what is right follows from the words, so no other column is read."""

    unit = "sentences"

    def __init__(self, asked: DataRequest) -> None:
        self.asked = asked
        found = read_tables(asked.data.datasets)
        tables = {name: chosen_rows(table, asked.data, ["text"]) for name, table in found.items()}
        train, test = split(tables, asked.data)
        self.train = self._tokenise(train)
        self.test = self._tokenise(test)
        self.collator = DataCollatorForTokenClassification(asked.tokenizer)

    def _tokenise(self, table: Table) -> Examples:
        tokens = self.asked.tokenizer(table.columns["text"], truncation=True, max_length=self.asked.data.max_length)
        words = [tokens.tokens(row) for row in range(len(table))]
        labels = [[LETTERS.get(word[0], IGNORED) for word in row] for row in words]
        return Examples({**tokens, "labels": labels})


def one_letter_a_token(ids: Tensor, data: DataConfig) -> dict[str, Tensor]:
    """A letter for each token."""
    return {"labels": torch.ones_like(ids)}


@torch.inference_mode()
def score_letters(evaluator: Evaluator, model: nn.Module, data: Loader) -> dict[str, float]:
    """`letters_right`, the share of words whose letter is found, and `test_words`."""
    device = next(model.parameters()).device
    right = 0
    count = 0
    for start in range(0, len(data.test), evaluator.batch_size):
        rows = [data.test[i] for i in range(start, min(start + evaluator.batch_size, len(data.test)))]
        batch = data.collator(rows).to(device)
        labels = batch.pop("labels")
        found = model(**batch).logits.argmax(-1)
        right += int((found == labels).sum())
        count += int((labels != IGNORED).sum())
    return {"letters_right": right / count, "test_words": count}


FIRST_LETTER = Task(
    metrics=("letters_right",),
    head="AutoModelForTokenClassification",
    hub_tag="token-classification",
    load=LetterLoader,
    targets=one_letter_a_token,
    score=score_letters,
    head_settings={"num_labels": len(LETTERS)},
)
