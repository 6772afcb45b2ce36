"""Settings, data, models and cards that are odd, hostile or without end: one line, with the file and what to do."""

import datetime
import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml
from own_loop import Loop, patched
from safetensors.torch import load_file, save_file
from tiny_models import tiny_model
from tiny_run import sentences, tiny_tokenizer, write_config, write_csv, write_grid, write_model

import apt
from apt.cli import main
from apt.export.model_card import CardFacts, licence_of, model_card
from apt.files.manifest import MANIFEST
from apt.files.reading import UnreadableError, check_regular, parse_yaml, read_json, shown
from apt.files.telling import markdown, printable
from apt.runs.config import DataConfig, load_config
from apt.runs.data import DatasetLoader, QuestionLoader
from apt.runs.data.labels import Labels
from apt.runs.data.sources import Table
from apt.runs.models import build_model
from apt.surgery import summary

BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join(['*' + before] * 9)}]\n" for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)


@contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """What hangs inside is an error."""

    def end(*_: object) -> None:
        raise TimeoutError(f"it took more than {seconds} s")

    before = signal.signal(signal.SIGALRM, end)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The one line with which a command ends, within seconds."""
    capsys.readouterr()
    with at_most(30):
        assert main([str(argument) for argument in arguments]) == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    return error.splitlines()[-1]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            "output_dir: x\ntraining: {seed: 1}\nmodel: {name: y}\ntraining: {batch_size: 4}\n",
            "'training' stands there",
        ),
        ("training: {seed: 1, seed: 2}\n", "the key 'seed' stands there twice, again on line 1"),
        (BOMB + "output_dir: *i\n", "its aliases stand for more than"),
        ("output_dir: &a [*a]\n", "an alias leads to what it stands in"),
        ("output_dir: " + "[" * 5000, "is not YAML"),
        ("? [a, b]\n: 1\n", "is not YAML"),
        ("output_dir: !!python/object/apply:os.system ['touch hacked']\n", "is not YAML"),
        ("a: \x07\n", "is not YAML"),
        ("when: 2024-13-45\n", "is not YAML"),
    ],
    ids=["a section", "a key", "a bomb", "a circle", "nested", "a list for a key", "code", "a control", "a date"],
)
def test_a_config_that_says_things_twice_or_without_end(
    text: str, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(text, encoding="utf-8")
    line = refused(capsys, "config", path)
    assert f"apt: error: config: {path} " in line
    assert words in line
    assert len(line) < 400
    assert not (tmp_path / "hacked").exists()


def test_what_yaml_allows_still_goes() -> None:
    assert parse_yaml("a: &x {b: 1, c: 2}\nd: {<<: *x, b: 3}\ne: [*x, *x]\n")["d"] == {"b": 3, "c": 2}


@pytest.mark.parametrize("where", ["file", "override"])
def test_the_value_of_an_alias_bomb_is_not_spelt_out(
    where: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Small enough to be read, and still hundreds of thousands of values."""
    small = BOMB.partition("g: ")[0]
    config = write_config(tmp_path)
    text = config.read_text(encoding="utf-8")
    if where == "file":
        config.write_text(small + text.replace("output_dir:", "output_dir: *f\nx:"), encoding="utf-8")
        line = refused(capsys, "config", config)
    else:
        line = refused(capsys, "config", config, "batch_size={" + ", ".join(small.strip().split("\n")) + ", z: *f}")
    assert len(line) < 400


def endless(kind: str, path: Path) -> None:
    """Put something in the place of a file that a reader never comes to the end of."""
    path.unlink(missing_ok=True)
    if kind == "a pipe":
        os.mkfifo(path)
    else:
        path.symlink_to("/dev/zero")


@pytest.mark.parametrize("kind", ["a pipe", "a device"])
@pytest.mark.parametrize("name", ["config.yaml", "rows.csv", "tiny/config.json", "tiny/model.safetensors"])
def test_a_file_that_never_ends_is_not_read(
    name: str, kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_config(tmp_path)
    endless(kind, tmp_path / name)
    assert f"{tmp_path / name} is no regular file, and is not read" in refused(capsys, "train", config)


@pytest.mark.parametrize("kind", ["a pipe", "a device"])
def test_a_card_and_a_record_that_never_end(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = write_model(tmp_path / "tiny")
    endless(kind, model / "README.md")
    with at_most(10):
        assert licence_of(str(model)) == "unknown" or not (model / "README.md").is_file()
    (tmp_path / "run").mkdir()
    endless(kind, tmp_path / "run/metrics.json")
    assert "is no regular file" in refused(capsys, "report", tmp_path / "run")
    with pytest.raises(UnreadableError, match="no regular file"):
        check_regular(tmp_path / "run/metrics.json", "test")


CARDS = {
    "Latin-1": b"---\nlicense: mit\n---\ncaf\xe9\n",
    "a tab": b"---\nlicense:\tmit\n\ttags: x\n---\n",
    "an index that is none": b"---\nlicense: mit\nmodel-index: 3\n---\n",
    "a number for a key": b"---\nlicense: mit\n1: 2\n---\n",
    "an open list": b"---\nlicense: [mit\n---\n",
    "twice": b"---\nlicense: mit\nlicense: gpl\n---\n",
    "a bomb": b"---\n" + BOMB.encode() + b"license: *i\n---\n",
    "a list": b"---\n- mit\n---\n",
    "nothing": b"",
}


@pytest.mark.parametrize("content", CARDS.values(), ids=CARDS)
def test_whatever_the_card_of_a_base_says_there_is_a_licence(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_bytes(content)
    with at_most(10):
        assert licence_of(str(tmp_path)) in ("mit", "unknown")


def test_the_licence_is_read_where_it_can_be(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_bytes(CARDS["an index that is none"])
    assert licence_of(str(tmp_path)) == "mit"


def test_names_are_no_markdown_and_no_markup() -> None:
    """In a card: a data file and a base named to be more than names."""
    counts = summary(apt.patch_model(tiny_model("bert")))
    odd = "<img src=x>|\n[a](http://b) `c` \x1b]0;title\x07"
    facts = CardFacts(odd, "BertModel", "apt", stock=True, counts=counts)
    card = model_card(facts, {"data": odd, "metric": "accuracy", "accuracy": 0.5}, command="python `x`\n```\n# more")
    _, _, text = card.partition("\n---\n\n")
    assert "<img" not in text
    assert "[a](" not in text
    assert "\x1b" not in card
    assert "\x07" not in card
    assert text.count("\n# ") == 0
    assert "&lt;img src=x&gt;" in text
    assert yaml.safe_load(card.split("---\n")[1])["license"] == "unknown"
    assert printable("a\x1b[2J\u202e\ud83d\n") == "a\\x1b[2J\\u202e\\ud83d\\x0a"
    assert markdown("a|b<c>") == "a\\|b&lt;c&gt;"


def test_a_message_shows_the_beginning_of_a_value() -> None:
    nested: Any = "x"
    for _ in range(60):
        nested = [nested, nested]
    with at_most(5):
        assert len(shown(nested)) <= 60
        assert len(shown({"a": 10**5000})) <= 60
    assert shown({"a": [1, "b"]}) == "{'a': [1, 'b']}"


QUESTION = {
    "question": "who",
    "context": "the good word stands here",
    "answers": {"text": ["good"], "answer_start": [4]},
}


@pytest.mark.parametrize("start", [-21, True, "4", 4.0, None], ids=repr)
def test_where_an_answer_begins_is_a_whole_number_from_0_on(start: Any, tmp_path: Path) -> None:
    """At -21 the context, counted from its end, fits."""
    path = tmp_path / "train.jsonl"
    odd = {**QUESTION, "answers": {"text": ["good"], "answer_start": [start]}}
    path.write_text("\n".join(map(json.dumps, [QUESTION, odd, QUESTION])), encoding="utf-8")
    assert QUESTION["context"][-21:-17] == "good"  # type: ignore[index]
    with pytest.raises(
        ValueError, match=rf"data: {path}, line 2, column 'answers': an answer is a text and the number"
    ):
        QuestionLoader(DataConfig(datasets=str(path), test_size=1), tiny_tokenizer())


@pytest.mark.parametrize("label", [[0], {"a": 0}, True, 10**400], ids=["a list", "a table", "a truth", "400 digits"])
def test_a_label_is_a_text_or_a_number(label: Any, tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    rows = [{"text": "good", "label": 0}, {"text": "bad", "label": 1}, {"text": "worse", "label": label}] * 2
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    with pytest.raises(ValueError, match=rf"data: {path}, line 3.*label") as caught:
        DatasetLoader(DataConfig(datasets=str(path), test_size=1), tiny_tokenizer())
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize("label", [[0], {"a": 0}])
def test_a_column_of_lists_is_no_column_of_labels(label: Any, tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    path.write_text("\n".join([json.dumps({"text": "good", "label": label})] * 4), encoding="utf-8")
    with pytest.raises(ValueError, match=rf"data: {path}, line 1, column 'label': label .* is no text and no number"):
        DatasetLoader(DataConfig(datasets=str(path), test_size=1), tiny_tokenizer())


def test_dates_are_no_classes() -> None:
    """As a parquet file holds them."""
    days = [datetime.date(2024, 1, day) for day in (1, 2, 1, 2)]
    with pytest.raises(ValueError, match=r"data: rows, line 1, column 'label': label datetime.*is no text and no numb"):
        Labels(Table("rows", {"label": days}, [1, 2, 3, 4]), "label", None)


def test_truths_alone_are_two_classes(tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    rows = [{"text": "good", "label": True}, {"text": "bad", "label": False}, {"text": "worse", "label": False}]
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    data = DatasetLoader(DataConfig(datasets=str(path), test_size=1), tiny_tokenizer())
    assert data.num_labels == 2


def test_two_files_of_one_split_are_refused(tmp_path: Path) -> None:
    write_csv(tmp_path / "train.csv", sentences(60))
    (tmp_path / "train.jsonl").write_text('{"text": "good", "label": 0}\n', encoding="utf-8")
    with pytest.raises(ValueError, match=r"data: .*train\.csv and train\.jsonl are both the train split; keep one"):
        DatasetLoader(DataConfig(datasets=str(tmp_path), test_size=1), tiny_tokenizer())


def test_half_a_character_is_named_by_its_line(tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    whole = '{"text": "a \\ud83d\\ude00 b", "label": 0}\n'
    path.write_text(whole + '{"text": "a \\ud83d b", "label": 1}\n' + whole, encoding="utf-8")
    with pytest.raises(ValueError, match=rf"data: {path}, line 2 has half a character"):
        DatasetLoader(DataConfig(datasets=str(path), test_size=1), tiny_tokenizer())
    path.write_text(whole * 3 + whole.replace("0}", "1}"), encoding="utf-8")
    DatasetLoader(DataConfig(datasets=str(path), test_size=1), tiny_tokenizer())


def test_rows_with_a_key_of_their_own_each_fill_no_memory(tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    path.write_text("\n".join(json.dumps({f"text{i}": "x", "label": 0}) for i in range(20000)), encoding="utf-8")
    with pytest.raises(ValueError, match=rf"data: {path} has more than 1,000 columns up to line 1000"):
        DatasetLoader(DataConfig(datasets=str(path), test_size=1), tiny_tokenizer())


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def leave_out(folder: Path, end: str) -> None:
    path = folder / "model.safetensors"
    tensors = {name: tensor for name, tensor in load_file(path).items() if not name.endswith(end)}
    save_file(tensors, path, metadata={"format": "pt"})


BASES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "an activation that nobody has": (lambda f: edit_config(f, hidden_act="evil"), "cannot be loaded: KeyError 'evil'"),
    "a width in words": (lambda f: edit_config(f, hidden_size="32"), "hidden_size must be a whole number"),
    "a dropout that is no share": (
        lambda f: edit_config(f, attention_probs_dropout_prob=float("nan")),
        "attention_probs_dropout_prob must be a number from 0 to 1, got nan",
    ),
    "another width": (lambda f: edit_config(f, hidden_size=64), "cannot be loaded: "),
    "a million layers": (
        lambda f: edit_config(f, num_hidden_layers=1000000),
        "num_hidden_layers must be a whole number",
    ),
    "fewer tokens than the tokenizer": (lambda f: edit_config(f, vocab_size=20), "cannot be loaded: |the model has"),
    "half a tokenizer": (
        lambda f: (f / "tokenizer.json").write_text((f / "tokenizer.json").read_text()[:300]),
        "cannot be loaded: ",
    ),
    "half the weights": (lambda f: os.truncate(f / "model.safetensors", 3000), "cannot be loaded: "),
    "no query in a layer": (
        lambda f: leave_out(f, "1.attention.self.query.weight"),
        r"lacks \S+1\.attention\.self\.query\.weight, which would be drawn at random; copy or convert it again",
    ),
    "no tokens": (lambda f: leave_out(f, "word_embeddings.weight"), "lacks .*word_embeddings.weight, which would be"),
    "a list for a config": (lambda f: (f / "config.json").write_text("[]"), "holds no names and values"),
    "half a config": (lambda f: (f / "config.json").write_text('{"model_type": "be'), "config.json is corrupt"),
}


@pytest.mark.parametrize(("spoil", "words"), BASES.values(), ids=BASES)
def test_a_base_that_is_not_what_it_must_be(
    spoil: Callable[[Path], Any], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import re

    config = write_config(tmp_path)
    spoil(tmp_path / "tiny")
    line = refused(capsys, "train", config)
    assert re.search(words, line), line
    assert not list(tmp_path.glob("run*"))


def test_a_base_without_pooler_and_head_is_whole(tmp_path: Path) -> None:
    """As one that has learnt to fill masks: the task's own are drawn."""
    config = load_config(write_config(tmp_path))
    leave_out(tmp_path / "tiny", "pooler.dense.weight")
    leave_out(tmp_path / "tiny", "classifier.weight")
    model: Any = build_model(config, 2, tiny_tokenizer())
    assert model.classifier.weight.isfinite().all()


@pytest.mark.parametrize("size", ["x", -1, 10**9])
@pytest.mark.parametrize("command", ["estimate", "train"])
def test_a_shape_that_no_model_has(size: Any, command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = write_config(tmp_path)
    more = ["--dry-run"] if command == "train" else []
    line = refused(capsys, command, config, f"model.shape={{model_type: bert, hidden_size: {size}}}", *more)
    assert f"config: model.shape: hidden_size must be a whole number from 0 to 1,000,000, got {size!r}" in line


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"methods": {"apt": {"target_sparsity": 0.9}}, "sparsities": [0.5, 0.6]}, "methods.apt has 'target_sparsity'"),
        ({"settings": {"training.seed": 3}}, "settings has 'training.seed', which seeds of the grid sets"),
        ({"settings": {"output_dir": "x"}}, "settings has 'output_dir'"),
        ({"settings": {"pruning.target_sparsity": 0.2}}, "settings has 'pruning.target_sparsity', which sparsities of"),
        ({"sparsities": [0.5, 0.50000001]}, "two runs would be apt-50-seed0"),
        ({"seeds": [0, 0]}, "two runs would be "),
        ({"methods": []}, "methods is empty"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_grid_whose_runs_would_be_others_than_it_says(
    keys: dict[str, Any], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert words in refused(capsys, "experiment", write_grid(tmp_path, **keys))
    assert not (tmp_path / "grid").exists()


def test_a_scaling_factor_of_0_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "scaling_factor must not be 0" in refused(capsys, "train", write_config(tmp_path), "scaling_factor=0")


def test_an_export_takes_no_folder_of_somebody(tmp_path: Path) -> None:
    """Neither one that `overwrite` names, nor what lies under the name that is written first."""
    model = apt.patch_model(tiny_model("bert"), method="lora")
    for name in ("thesis", "x.partial", "y.replaced"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "chapter1.tex").write_text("mine")
    with pytest.raises(ValueError, match=r"thesis exists and holds no apt_export\.json; it stays as it is"):
        apt.export_model(model, tmp_path / "thesis", overwrite=True)
    with pytest.raises(ValueError, match=r"thesis exists and holds no adapter_config\.json; it stays as it is"):
        apt.save_adapter(model, tmp_path / "thesis", overwrite=True)
    for name in ("x", "y"):
        with pytest.raises(ValueError, match=rf"{name}\.\w+ (is needed for|exists)"):
            apt.export_model(model, tmp_path / name)
    assert all(
        (tmp_path / name / "chapter1.tex").read_text() == "mine" for name in ("thesis", "x.partial", "y.replaced")
    )


def test_weights_of_another_are_one_short_line(tmp_path: Path) -> None:
    """torch names each of their tensors; where a list of checksums is, it says so first."""
    apt.save_checkpoint(Loop("bert", patched("bert")).take(1).run, tmp_path / "c")
    (tmp_path / "c" / MANIFEST).unlink()
    shutil.copy(tmp_path / "c/optimizer.safetensors", tmp_path / "c/model.safetensors")
    loop = Loop("bert", patched("bert"), 0)
    with pytest.raises(ValueError, match=r"c/model\.safetensors does not fit the model, .*: Unexpected key") as told:
        apt.resume_checkpoint(tmp_path / "c", loop.model, loop.optimizer)
    assert len(str(told.value)) < 400 + len(str(tmp_path))
    assert "\n" not in str(told.value)


def test_a_number_of_thousands_of_digits_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text('{"a": ' + "9" * 5000 + "}")
    with pytest.raises(UnreadableError, match=r"^test: .*x\.json is corrupt"):
        read_json(tmp_path / "x.json", "test")
    (tmp_path / "x.json").write_text("[" * 100_000)
    with pytest.raises(UnreadableError, match=r"^test: .*x\.json is corrupt \(nested too deeply\)"):
        read_json(tmp_path / "x.json", "test")
