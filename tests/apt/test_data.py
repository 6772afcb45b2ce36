"""DatasetLoader: sources, splits, labels, and an error with file, line and column for every broken row."""

import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest
from tiny_run import sentences, tiny_tokenizer, write_csv
from tiny_tasks import DATA, word_tokenizer

from apt.families.locate import resolve_model
from apt.runs.config import DataConfig
from apt.runs.data import DatasetLoader, InstructionLoader, PairLoader, QuestionLoader, TextLoader


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return tiny_tokenizer()


def load(path: Path | str, tokenizer: Any, *, num_labels: int | None = None, **settings: Any) -> DatasetLoader:
    settings = {"test_size": 2} | settings
    return DatasetLoader(DataConfig(datasets=str(path), **settings), tokenizer, num_labels=num_labels)


def test_rows_become_tokens(tmp_path: Path, tokenizer: Any) -> None:
    path = write_csv(tmp_path / "a.csv", [("good word1 word2 word3", "1"), ("bad", "0"), ("good", "1")])
    data = load(path, tokenizer, test_size=1, max_length=4)
    rows = [data.train[i] for i in range(len(data.train))] + [data.test[i] for i in range(len(data.test))]
    assert (len(data.train), len(data.test), data.num_labels, data.label_names) == (2, 1, 2, None)
    by_length = sorted(rows, key=lambda row: -len(row["input_ids"]))
    start, end = tokenizer.cls_token_id, tokenizer.sep_token_id
    words = tokenizer.convert_tokens_to_ids(["good", "word1"])
    # Cut to max_length, never padded here.
    assert by_length[0]["input_ids"] == [start, *words, end]
    assert by_length[0]["labels"] == 1
    assert [len(row["input_ids"]) for row in by_length] == [4, 3, 3]
    batch = data.collator(rows)
    assert batch["input_ids"].shape == (3, 4)
    assert batch["attention_mask"].sum().item() == 10
    assert sorted(batch["labels"].tolist()) == [0, 1, 1]


def test_split_is_fixed_and_its_own(tmp_path: Path, tokenizer: Any) -> None:
    path = write_csv(tmp_path / "a.csv", sentences(50))
    config = DataConfig(datasets=str(path), test_size=10)
    first, second = DatasetLoader(config, tokenizer, seed=0), DatasetLoader(config, tokenizer, seed=1)
    assert (len(first.train), len(first.test)) == (40, 10)
    assert first.test.columns == second.test.columns
    assert first.train.columns == second.train.columns
    other = load(path, tokenizer, test_size=10, split_seed=1)
    assert other.test.columns != first.test.columns
    texts = [tuple(ids) for part in (first.train, first.test) for ids in part.columns["input_ids"]]
    assert len(set(texts)) == 50


def test_fewer_samples(tmp_path: Path, tokenizer: Any) -> None:
    path = write_csv(tmp_path / "a.csv", sentences(50))
    config = DataConfig(datasets=str(path), test_size=10, max_train_samples=6, max_test_samples=4)
    first, second = DatasetLoader(config, tokenizer, seed=0), DatasetLoader(config, tokenizer, seed=1)
    assert (len(first.train), len(first.test)) == (6, 4)
    assert first.test.columns == second.test.columns
    assert first.train.columns != second.train.columns


def test_filter_and_duplicates(tmp_path: Path, tokenizer: Any) -> None:
    rows = [("good", "1", "x"), ("good", "0", "x"), ("bad", "0", "x"), ("word1", "1", "x"), ("", "9", "y")]
    path = write_csv(tmp_path / "a.csv", rows, ("text", "label", "source"))
    data = load(path, tokenizer, filter={"source": "x"}, drop_duplicates=True, test_size=1)
    assert len(data.train) + len(data.test) == 3
    with pytest.raises(ValueError, match=r"no row of .*a.csv has source = 'z'; there are 'x', 'y'"):
        load(path, tokenizer, filter={"source": "z"})


def test_named_labels_count_in_sorted_order(tmp_path: Path, tokenizer: Any) -> None:
    path = write_csv(tmp_path / "a.csv", [("good", "pos"), ("bad", "neg"), ("word1", "neg"), ("word2", "pos")])
    data = load(path, tokenizer)
    assert (data.label_names, data.num_labels) == (["neg", "pos"], 2)
    assert sorted(data.train.columns["labels"] + data.test.columns["labels"]) == [0, 0, 1, 1]


@pytest.mark.parametrize("ending", ["tsv", "jsonl"])
def test_other_files(tmp_path: Path, tokenizer: Any, ending: str) -> None:
    path = tmp_path / f"a.{ending}"
    rows = [('good "word1', 1), ("bad", 0), ("word1", 1), ("word2", 0)]
    lines = ["text\tlabel", *(f"{text}\t{label}" for text, label in rows)]
    if ending == "jsonl":
        lines = [json.dumps({"text": text, "label": label}) for text, label in rows]
    path.write_text("\n".join(lines) + "\n\n", encoding="utf-8")
    data = load(path, tokenizer)
    assert sorted(data.train.columns["labels"] + data.test.columns["labels"]) == [0, 0, 1, 1]


def test_parquet_where_pandas_can_read_it(tmp_path: Path, tokenizer: Any) -> None:
    pandas = pytest.importorskip("pandas")
    path = tmp_path / "a.parquet"
    try:
        frame = pandas.DataFrame({"text": ["good", "bad", "word1", None], "label": [1, 0, 1, 0]})
        frame.to_parquet(path)
    except ImportError:
        path.write_bytes(b"PAR1")
        with pytest.raises(ImportError, match=r'a.parquet needs pandas and pyarrow; pip install "apt-lm\[train\]"'):
            load(path, tokenizer)
        return
    with pytest.raises(ValueError, match=r"a.parquet, line 4, column 'text': the text is missing"):
        load(path, tokenizer)


def test_a_folder_with_its_own_test_split(tmp_path: Path, tokenizer: Any) -> None:
    write_csv(tmp_path / "train.csv", sentences(6))
    write_csv(tmp_path / "validation.csv", sentences(3))
    data = load(tmp_path, tokenizer, test_size=None)
    assert (len(data.train), len(data.test)) == (6, 3)
    with pytest.warns(UserWarning, match=r"test_size is ignored"):
        load(tmp_path, tokenizer, test_size=2)


def test_a_pair_of_sentences(tmp_path: Path, tokenizer: Any) -> None:
    rows = [("good", "word1", "1"), ("bad", "word2", "0"), ("bad", "word3", "0")]
    path = write_csv(tmp_path / "a.csv", rows, ("premise", "hypothesis", "label"))
    data = load(path, tokenizer, test_size=1)
    assert len(data.train[0]["input_ids"]) == 5
    assert load(path, tokenizer, test_size=1, text_columns=["hypothesis"]).train.columns["input_ids"][0][2:] == [
        tokenizer.sep_token_id
    ]


BROKEN = {
    "fields": ("text,label\ngood,1\nbad,0,extra\n", "line 3 has 3 fields, but the header has 2"),
    "few_fields": ('text,label\n"two\nlines",1\nbad\n', "line 4 has 1 fields"),
    "quote": ('text,label\ngood,1\n"bad,0\nword1,1\n', "starts on line 3 is not valid csv"),
    "text": ("text,label\ngood,1\n,0\n", "line 3, column 'text': the text is missing"),
    "label_missing": ("text,label\ngood,1\nbad,0\nword1,\n", "line 4, column 'label': the label is missing"),
    "label_word": ("text,label\ngood,1\nbad,0\nword1,x\n", "line 4, column 'label': label 'x' is not a whole number"),
    "label_half": ("text,label\ngood,1\nbad,0.5\n", "line 3, column 'label': label '0.5' is not a whole number"),
    "label_high": ("text,label\ngood,1\nbad,0\nword1,7\n", "line 4, column 'label': label 7 is out of range.*0 to 2"),
    "label_low": ("text,label\ngood,1\nbad,-1\n", "line 3, column 'label': label -1 is out of range"),
    "label_one": ("text,label\ngood,0\nbad,0\n", "one label only"),
    "label_number": ("text,label\ngood,pos\nbad,neg\nword1,neg\nword2,3\n", None),
    "no_label": ("text,class\ngood,1\n", "no column 'label'; there are text, class"),
    "no_text": ("words,label\ngood,1\n", "no text column is known.*data.text_columns.*words, label"),
    "twice": ("text,text\ngood,1\n", "names a column twice"),
    "header_only": ("text,label\n", "is empty"),
    "empty": ("", "is empty"),
    "latin": ("text,label\nd\xe9j\xe0,1\n".encode("latin-1"), "is not UTF-8"),
}


@pytest.mark.parametrize("name", [name for name, (_, words) in BROKEN.items() if words])
def test_broken_csv(tmp_path: Path, tokenizer: Any, name: str) -> None:
    content, words = BROKEN[name]
    path = tmp_path / "rows.csv"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=words) as caught:
        load(path, tokenizer, test_size=1)
    assert "rows.csv" in str(caught.value)


def test_a_number_among_names_is_a_name(tmp_path: Path, tokenizer: Any) -> None:
    path = tmp_path / "rows.csv"
    path.write_text(str(BROKEN["label_number"][0]), encoding="utf-8")
    assert load(path, tokenizer, test_size=1).label_names == ["3", "neg", "pos"]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"text": "bad", "label"', "line 2 is not JSON"),
        ('["bad", 0]', "line 2 must be an object"),
        ('{"label": 0}', "line 2, column 'text': the text is missing"),
        ('{"text": 5, "label": 0}', "line 2, column 'text': the text must be text, got 5"),
        ('{"text": "bad"}', "line 2, column 'label': the label is missing"),
    ],
)
def test_broken_jsonl(tmp_path: Path, tokenizer: Any, line: str, words: str) -> None:
    path = tmp_path / "rows.jsonl"
    rest = [json.dumps({"text": text, "label": int(label)}) for text, label in sentences(4)]
    path.write_text("\n".join([rest[0], line, *rest[1:]]), encoding="utf-8")
    with pytest.raises(ValueError, match=words):
        load(path, tokenizer)


def test_labels_of_the_test_split_and_the_number_of_labels(tmp_path: Path, tokenizer: Any) -> None:
    write_csv(tmp_path / "train.csv", [("good", "1"), ("bad", "0")])
    write_csv(tmp_path / "test.csv", [("good", "1"), ("bad", "2")])
    with pytest.raises(ValueError, match=r"test.csv, line 3, column 'label': label 2 is out of range; with 2 labels"):
        load(tmp_path, tokenizer, test_size=None)
    assert load(tmp_path, tokenizer, test_size=None, num_labels=3).num_labels == 3
    write_csv(tmp_path / "train.csv", [("good", "a"), ("bad", "b"), ("bad", "c")])
    with pytest.raises(ValueError, match=r"has 3 labels, but model.num_labels is 2"):
        load(tmp_path, tokenizer, test_size=None, num_labels=2)
    with pytest.raises(ValueError, match=r"test.csv, line 2, column 'label': label '1' is not one of a, b, c"):
        load(tmp_path, tokenizer, test_size=None)


def test_numbers_as_labels(tmp_path: Path, tokenizer: Any) -> None:
    path = write_csv(tmp_path / "a.csv", [("good", "0.5"), ("bad", "-1.25"), ("word1", "3")])
    config = DataConfig(datasets=str(path), test_size=1)
    data = DatasetLoader(config, tokenizer, regression=True)
    assert (data.num_labels, data.label_names) == (1, None)
    assert sorted(data.train.columns["labels"] + data.test.columns["labels"]) == [-1.25, 0.5, 3.0]
    batch = data.collator([data.train[0], data.train[1]])
    assert batch["labels"].is_floating_point()
    for cell, words in (("", "the label is missing"), ("x", "'x' is no number"), ("nan", "'nan' is no number")):
        write_csv(path, [("good", "0.5"), ("bad", cell), ("word1", "3")])
        with pytest.raises(ValueError, match=rf"a.csv, line 3, column 'label'.*{words}"):
            DatasetLoader(config, tokenizer, regression=True)
    with pytest.raises(ValueError, match=r"no column 'score'; there are text, label"):
        DatasetLoader(DataConfig(datasets=str(path), test_size=1, label_column="score"), tokenizer, regression=True)


def test_sizes_that_cannot_be(tmp_path: Path, tokenizer: Any) -> None:
    path = write_csv(tmp_path / "a.csv", sentences(5))
    with pytest.raises(ValueError, match=r"no test split; set data.test_size"):
        load(path, tokenizer, test_size=None)
    with pytest.raises(ValueError, match=r"test_size 5 leaves nothing to train on"):
        load(path, tokenizer, test_size=5)


@pytest.mark.parametrize("name", ["nothing.csv", "./nothing", "~/nothing.jsonl"])
def test_missing_files(tokenizer: Any, name: str) -> None:
    with pytest.raises(FileNotFoundError, match=r"no file or folder .*nothing"):
        load(name, tokenizer)


def test_other_places_that_are_wrong(tmp_path: Path, tokenizer: Any) -> None:
    with pytest.raises(FileNotFoundError, match=r"holds no train file, of .csv, .tsv"):
        load(tmp_path, tokenizer)
    (tmp_path / "a.xlsx").write_text("x", encoding="utf-8")
    with pytest.raises(ValueError, match=r"a.xlsx must be one of .csv, .tsv, .jsonl, .parquet, .txt, got .xlsx"):
        load(tmp_path / "a.xlsx", tokenizer)


def test_files_inside_a_package(tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    inside = tmp_path / "some_package" / "data"
    inside.mkdir(parents=True)
    # Importing it would fail: it is only looked for.
    (tmp_path / "some_package" / "__init__.py").write_text("raise RuntimeError", encoding="utf-8")
    write_csv(inside / "a.csv", sentences(5))
    monkeypatch.syspath_prepend(str(tmp_path))
    assert len(load("package:some_package/data/a.csv", tokenizer).train) == 3
    assert resolve_model("package:some_package/data") == str(inside)
    assert resolve_model("bert-base-uncased") == "bert-base-uncased"
    with pytest.raises(FileNotFoundError, match=r"the package some_package holds no 'data/b.csv'"):
        load("package:some_package/data/b.csv", tokenizer)
    with pytest.raises(ImportError, match=r"not installed; pip install --no-deps no-such-package"):
        resolve_model("package:no_such_package/model")


def test_the_hub_without_datasets(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match=r'glue/sst2 is no local file.*pip install "apt-lm\[train\]"') as caught:
        load("glue/sst2", tokenizer)
    assert "\n" not in str(caught.value)


class Split:
    """As much of `datasets.Dataset` as is read."""

    def __init__(self, columns: dict[str, list[Any]]) -> None:
        self.columns, self.column_names = columns, list(columns)
        self.features = {"label": types.SimpleNamespace(names=["negative", "positive"])}

    def __len__(self) -> int:
        return len(self.columns["label"])

    def __getitem__(self, name: str) -> list[Any]:
        return self.columns[name]


@pytest.mark.parametrize(
    ("name", "asked", "tested"),
    [
        ("glue/sst2", ("glue", "sst2"), 2),
        ("nyu-mll/glue/sst2", ("nyu-mll/glue", "sst2"), 2),
        ("me/own", ("me/own",), 3),
    ],
)
def test_the_hub(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch, name: str, asked: tuple[str, ...], tested: int
) -> None:
    calls = []

    def load_dataset(*names: str) -> dict[str, Split]:
        calls.append(names)
        return {
            "train": Split({"sentence": ["good", "bad", "word1"], "label": [1, 0, 1], "idx": [0, 1, 2]}),
            "validation": Split({"sentence": ["good", "bad"], "label": [1, 0], "idx": [0, 1]}),
            # GLUE's test split has no labels; another data set's has.
            "test": Split({"sentence": ["good", "bad", "word2"], "label": [-1] * 3 if tested == 2 else [1, 0, 0]}),
        }

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    data = load(name, tokenizer, test_size=None)
    assert calls == [asked]
    assert (len(data.train), len(data.test), data.label_names) == (3, tested, ["negative", "positive"])


def test_the_hub_out_of_reach(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(*names: str) -> None:
        raise ConnectionError("no route\nto the hub")

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    with pytest.raises(ValueError, match=r"me/own cannot be loaded from the hub \(no route\)"):
        load("me/own", tokenizer)


@pytest.mark.parametrize(
    ("kind", "sample"),
    [
        (InstructionLoader, "instructions.jsonl"),
        (PairLoader, "summaries.jsonl"),
        (QuestionLoader, "questions.jsonl"),
        (TextLoader, None),
    ],
)
def test_a_test_split_that_is_the_training_data(kind: Any, sample: str | None, tmp_path: Path) -> None:
    content = "one text\n\nanother text\n" if sample is None else (DATA / sample).read_text(encoding="utf-8")
    for split in ("train", "test"):
        (tmp_path / f"{split}{'.txt' if sample is None else '.jsonl'}").write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=r"every row of .*train\..* is held out too; nothing is left to train on"):
        kind(DataConfig(datasets=str(tmp_path)), word_tokenizer())
