"""Instructions with responses, as Alpaca has them: one row a conversation, of which the response alone is learnt."""

import warnings
from typing import Any

from apt.families import IGNORED
from apt.runs.data.cache import Columns, kept
from apt.runs.data.config import DataConfig
from apt.runs.data.examples import Examples, Loader
from apt.runs.data.rows import chosen_rows, optional_text, role_columns, sample, split, unseen
from apt.runs.data.sources import Table, read_tables
from apt.runs.data.text import collate_blocks

INSTRUCTIONS = ("instruction", "prompt", "question")
INPUTS = ("input", "context")
RESPONSES = ("output", "response", "completion", "answer")
# Stanford Alpaca's, with and without an input.
WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
    "response that appropriately completes the request.\n\n### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n"
    "### Response:\n"
)
WITHOUT_INPUT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)


class InstructionLoader(Loader):
    """Reads instructions and responses; the tokens of an instruction are no target of the loss.

    A row is the instruction in the tokenizer's chat template, or in Alpaca's words where it has none, and the response
    with the end of its turn. It is cut after `config.max_length` tokens; where nothing of the response is left, it is
    left out, with a warning that counts such rows. An instruction that is held out is never trained on.

    Args:
        config: which data; `text_columns` names the instruction and, if there is one, its input, `target_column` the
            response. Null: instruction, input and output, or names like them.
        tokenizer: of the model.
        seed: draws the rows where `config.max_train_samples` asks for fewer than there are.

    Attributes: `train` and `test` (`Examples`, with `labels` that are -100 outside the response), and `collator`.

    Raises:
        ValueError: a row or a column is not what it must be, no response fits, or the tokenizer has no end of text.
        FileNotFoundError, ImportError: as `DatasetLoader`.
    """

    unit = "responses"

    def __init__(self, config: DataConfig, tokenizer: Any, seed: int = 0) -> None:
        if tokenizer.eos_token_id is None:
            raise ValueError("data: a response needs an end-of-text token, and the tokenizer has none")
        self.config, self.tokenizer = config, tokenizer
        tables = {name: self._conversations(table) for name, table in read_tables(config.datasets).items()}
        train, test = split(tables, config)
        train = unseen(train, train.columns["prompt"], test.columns["prompt"])
        self.train = self._tokenise(sample(train, config.max_train_samples, seed))
        self.test = self._tokenise(sample(test, config.max_test_samples, config.split_seed))
        self.collator = collate_blocks

    def _conversations(self, table: Table) -> Table:
        """The rows as they are read by a model: a prompt and a response."""
        names, target = role_columns(table, self.config, (INSTRUCTIONS, INPUTS), RESPONSES)
        table = chosen_rows(table, self.config, [names[0], target])
        inputs = optional_text(table, names[1]) if len(names) > 1 else [""] * len(table)
        turns = zip(table.columns[names[0]], inputs, table.columns[target], strict=True)
        parts = [self._turn(instruction, given, response) for instruction, given, response in turns]
        columns = {"prompt": [prompt for prompt, _ in parts], "response": [response for _, response in parts]}
        return Table(table.source, columns, table.lines)

    def _turn(self, instruction: str, given: str, response: str) -> tuple[str, str]:
        if not self.tokenizer.chat_template:
            form = WITH_INPUT if given.strip() else WITHOUT_INPUT
            return form.format(instruction=instruction, input=given), response
        asked = {"role": "user", "content": f"{instruction}\n\n{given}" if given.strip() else instruction}
        template = self.tokenizer.apply_chat_template
        prompt: str = template([asked], tokenize=False, add_generation_prompt=True)
        whole: str = template([asked, {"role": "assistant", "content": response}], tokenize=False)
        if not whole.startswith(prompt):  # it opens an answer in other words than it records one
            return prompt, response
        return prompt, whole[len(prompt) :].rstrip("\n")

    def _tokenise(self, table: Table) -> Examples:
        longest = self.config.max_length
        texts = [table.columns["prompt"], table.columns["response"]]
        asks = {"loader": "instructions", "max_length": longest, "end": self.tokenizer.eos_token_id}
        tokens = kept(self.config, self.tokenizer, asks, texts, lambda: self._tokens(table))
        if not tokens["input_ids"]:
            raise ValueError(
                f"data: of no row of {table.source} a response fits into {longest} tokens; raise data.max_length"
            )
        if lost := len(table) - len(tokens["input_ids"]):
            warnings.warn(
                f"data: {lost} of {len(table)} rows of {table.source} are left out, as their instruction alone has "
                f"{longest} tokens or more; data.max_length sets how many are read",
                stacklevel=4,
            )
        return Examples(tokens)

    def _tokens(self, table: Table) -> Columns:
        end = self.tokenizer.eos_token_id
        longest = self.config.max_length
        templated = bool(self.tokenizer.chat_template)
        rows: list[list[int]] = []
        targets: list[list[int]] = []
        for prompt, response in zip(table.columns["prompt"], table.columns["response"], strict=True):
            # A template writes the special tokens itself.
            asked = self.tokenizer(prompt, add_special_tokens=not templated, verbose=False)["input_ids"]
            asked = asked[:-1] if asked[-1:] == [end] and not templated else asked
            said = self.tokenizer(response, add_special_tokens=False, verbose=False)["input_ids"]
            said = said if templated and response.endswith(self._turn_ends) else [*said, end]
            if len(asked) >= longest:
                continue
            ids = [*asked, *said][:longest]
            rows.append(ids)
            learnt = ids[len(asked) :]
            targets.append([IGNORED] * len(asked) + learnt)
        return {"input_ids": rows, "labels": targets}

    @property
    def _turn_ends(self) -> tuple[str, ...]:
        """The special tokens of the tokenizer: a template ends a turn with one of them."""
        return tuple(self.tokenizer.all_special_tokens)
