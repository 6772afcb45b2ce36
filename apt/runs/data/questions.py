"""Questions about a text whose answer stands in it, or does not, as SQuAD v2 has them: windows of tokens with spans."""

from dataclasses import dataclass
from typing import Any

from apt.files.reading import shown
from apt.runs.data.cache import Columns, kept
from apt.runs.data.config import DataConfig
from apt.runs.data.examples import Examples, Loader
from apt.runs.data.rows import chosen_rows, permutation, role_columns, sample, split, unseen
from apt.runs.data.sources import Table, read_tables

MOST_HELD_OUT = 1000  # questions of the training data on which the threshold for no answer is chosen
Span = tuple[int, int]  # characters of a context, the end not in it
NOWHERE = -1, -1  # stands for no span where only numbers are kept
WINDOW = ("window.question", "window.offsets", "window.no_answer")  # columns of a window's fields


@dataclass(frozen=True)
class Question:
    """What is asked for, as text: every answer that counts, and none where the context has none."""

    context: str
    answers: list[str]


@dataclass(frozen=True)
class Window:
    """A piece of the context of a question: the characters of each token, None for those that are not of it."""

    question: int  # position in `Questions.questions`
    offsets: list[Span | None]
    no_answer: int  # the token whose choice says that there is none


class Questions(Examples):
    """Windows of tokens with `start_positions` and `end_positions`, and the `questions` that they are of."""

    def __init__(self, columns: dict[str, list[Any]], questions: list[Question], windows: list[Window]) -> None:
        super().__init__(columns)
        self.questions, self.windows = questions, windows


class QuestionLoader(Loader):
    """Reads questions, contexts and answers. A question that is held out is never trained on.

    A long context is read in windows of `config.max_length` tokens, question included; two that follow each other share
    `config.doc_stride` of them. Where an answer does not lie in a window, that window has none.

    Args:
        config: which data; `text_columns` names question and context, `target_column` the answers, which are
            ``{"text": [...], "answer_start": [...]}``, both empty where there is none.
        tokenizer: of the model, a fast one.
        seed: draws the rows where `config.max_train_samples` asks for fewer than there are.
        hold_out: keep a tenth of the training questions apart, at most 1,000, as `validation`, where some have no
            answer: there the threshold for no answer is chosen, never on what is reported.

    Attributes: `train`, `test`, `validation` (`Questions`, the last may be None), and `collator`.

    Raises:
        ValueError: a row or a column is not what it must be, or a question leaves no room for its context.
        FileNotFoundError, ImportError: as `DatasetLoader`.
    """

    unit = "windows"
    train: Questions
    test: Questions

    def __init__(self, config: DataConfig, tokenizer: Any, seed: int = 0, *, hold_out: bool = True) -> None:
        from transformers import DataCollatorWithPadding

        if not tokenizer.is_fast:
            raise ValueError("data: answers are found by the characters of tokens, which only a fast tokenizer tells")
        self.config, self.tokenizer = config, tokenizer
        tables = {name: self._rows(table) for name, table in read_tables(config.datasets).items()}
        train, test = split(tables, config)
        asked, tested = (zip(t.columns["question"], t.columns["context"], strict=True) for t in (train, test))
        train = unseen(train, asked, tested)
        train = sample(train, config.max_train_samples, seed)
        self.validation = None
        size = min(MOST_HELD_OUT, len(train) // 10)
        if hold_out and size and not all(answers["text"] for answers in train.columns["answers"]):
            order = permutation(len(train), config.split_seed)
            self.validation = self._tokenise(train.take(sorted(order[:size])))
            train = train.take(sorted(order[size:]))
        self.train = self._tokenise(train)
        self.test = self._tokenise(sample(test, config.max_test_samples, config.split_seed))
        self.collator = DataCollatorWithPadding(tokenizer)

    def _rows(self, table: Table) -> Table:
        names, target = role_columns(table, self.config, (("question",), ("context",)), ("answers",))
        if len(names) != 2:
            raise ValueError(
                f"data: {table.source} must have a question and a context; data.text_columns names both, got {names}"
            )
        table = chosen_rows(table, self.config, names)
        for row, answers in enumerate(table.columns[target]):
            place = f"data: {table.source}, line {table.lines[row]}, column {target!r}:"
            _check(answers, table.columns[names[1]][row], place)
        columns = dict(zip(("question", "context"), (table.columns[name] for name in names), strict=True))
        return Table(table.source, {**columns, "answers": table.columns[target]}, table.lines)

    def _tokenise(self, table: Table) -> Questions:
        longest = self.config.max_length
        stride = longest // 3 if self.config.doc_stride is None else self.config.doc_stride
        questions, contexts, answers = (table.columns[name] for name in ("question", "context", "answers"))
        asks = {"loader": "questions", "max_length": longest, "doc_stride": stride, "answers": answers}
        texts = [questions, contexts]
        columns = kept(self.config, self.tokenizer, asks, texts, lambda: self._tokens(table, longest, stride))
        told = [columns.pop(name) for name in WINDOW]
        windows = [Window(*row) for row in zip(told[0], map(_spans, told[1]), told[2], strict=True)]
        pairs = zip(contexts, answers, strict=True)
        return Questions(columns, [Question(context, list(of["text"])) for context, of in pairs], windows)

    def _tokens(self, table: Table, longest: int, stride: int) -> Columns:
        """What a model is given, and the fields of each `Window`, as numbers: the characters -1, -1 for None."""
        columns: Columns = {}
        told = [table.columns[name] for name in ("question", "context", "answers")]
        rows = zip(table.lines, *told, strict=True)
        for number, (line, question, context, answers) in enumerate(rows):
            # A question may begin with blanks by which it alone would fill a window.
            used = len(self.tokenizer(question.strip(), add_special_tokens=False, verbose=False)["input_ids"])
            room = longest - used - self.tokenizer.num_special_tokens_to_add(pair=True)
            if room <= stride:
                raise ValueError(
                    f"data: {table.source}, line {line}: the question leaves {room} of {longest} tokens to its "
                    f"context, which must be more than the {stride} that windows share; raise data.max_length or lower "
                    f"data.doc_stride"
                )
            batch = self.tokenizer(
                question.strip(),
                context,
                truncation="only_second",
                max_length=longest,
                stride=stride,
                return_overflowing_tokens=True,
                return_offsets_mapping=True,
            )
            for i, ids in enumerate(batch["input_ids"]):
                of_context = [part == 1 for part in batch.sequence_ids(i)]
                pairs = zip(batch["offset_mapping"][i], of_context, strict=True)
                offsets = [tuple(span) if inside else None for span, inside in pairs]
                cls = self.tokenizer.cls_token_id
                window = Window(number, offsets, ids.index(cls) if cls in ids else 0)
                start, end = _tokens_of(window, answers)
                found = {name: batch[name][i] for name in self.tokenizer.model_input_names if name in batch}
                flat = [place for span in offsets for place in (NOWHERE if span is None else span)]
                placed = dict(zip(WINDOW, (number, flat, window.no_answer), strict=True))
                for name, value in {**found, "start_positions": start, "end_positions": end, **placed}.items():
                    columns.setdefault(name, []).append(value)
        return columns


def _spans(flat: list[int]) -> list[Span | None]:
    """The offsets of a window out of a row of numbers."""
    pairs = zip(flat[::2], flat[1::2], strict=True)
    return [None if pair == NOWHERE else pair for pair in pairs]


def _check(answers: Any, context: str, place: str) -> None:
    texts, starts = (answers.get(name) if isinstance(answers, dict) else None for name in ("text", "answer_start"))
    if not isinstance(texts, list) or not isinstance(starts, list) or len(texts) != len(starts):
        raise ValueError(
            f"{place} must be {{'text': [...], 'answer_start': [...]}} of one length, got {shown(answers)}"
        )
    for text, start in zip(texts, starts, strict=True):
        if not isinstance(text, str) or type(start) is not int or start < 0:
            told = f"{shown(text)} at {shown(start)}"
            raise ValueError(f"{place} an answer is a text and the number of its first character, got {told}")
        if not text or context[start : start + len(text)] != text:
            raise ValueError(f"{place} the answer {text!r:.40} does not stand at character {start} of the context")


def _tokens_of(window: Window, answers: dict[str, list[Any]]) -> Span:
    """The first and last token of the first answer; the token for no answer where the window has not all of it."""
    nothing = window.no_answer, window.no_answer
    if not answers["text"]:
        return nothing
    start = answers["answer_start"][0]
    end = start + len(answers["text"][0])
    spans = [(i, span) for i, span in enumerate(window.offsets) if span is not None]
    if not spans or spans[0][1][0] > start or spans[-1][1][1] < end:
        return nothing
    first = max(i for i, span in spans if span[0] <= start)
    return first, min(i for i, span in spans if span[1] >= end and i >= first)
