"""Tokens kept on disk: what comes back is what was made, and nothing else is ever taken for it."""

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file, save_file
from tiny_run import sentences, write_csv
from tiny_tasks import DATA, word_tokenizer

import apt.runs.data.cache as cache
from apt.runs.config import DataConfig, load_config
from apt.runs.data import DatasetLoader, InstructionLoader, PairLoader, QuestionLoader, TextLoader
from apt.runs.run_folder import CONFIG, find_checkpoint

LOADERS = {
    "sentences": (DatasetLoader, None),
    "instructions": (InstructionLoader, "instructions.jsonl"),
    "pairs": (PairLoader, "summaries.jsonl"),
    "questions": (QuestionLoader, "questions.jsonl"),
    "text": (TextLoader, None),
}


class Counting:
    """A tokenizer that counts the texts it is given."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer, self.calls = tokenizer, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.tokenizer, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        return self.tokenizer(*args, **kwargs)


@pytest.fixture(autouse=True)
def all_is_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "SLOW", 0)


def config_of(name: str, folder: Path, **settings: Any) -> DataConfig:
    sample = LOADERS[name][1]
    path = write_csv(folder / "rows.csv", sentences(40)) if sample is None else DATA / sample
    settings = {"test_size": 4, "block_length": 16, "max_length": 60, "cache": str(folder / "kept")} | settings
    return DataConfig(datasets=str(path), **settings)


def made(name: str, config: DataConfig, tokenizer: Any = None) -> tuple[Any, int]:
    """The splits as they are, and how often the tokenizer was asked for tokens."""
    counting = Counting(tokenizer or word_tokenizer())
    data = LOADERS[name][0](config, counting)
    parts = [part for part in (data.train, data.test, getattr(data, "validation", None)) if part is not None]
    return [vars(part) for part in parts], counting.calls


@pytest.mark.parametrize("name", LOADERS)
def test_what_is_kept_is_what_was_made(name: str, tmp_path: Path) -> None:
    config = config_of(name, tmp_path)
    plain, _ = made(name, replace(config, cache=None))
    assert not (tmp_path / "kept").exists()
    first, asked = made(name, config)
    again, asked_again = made(name, config)
    assert first == again == plain
    assert asked > 0
    assert asked_again == 0
    assert all(path.suffix == ".safetensors" for path in (tmp_path / "kept").iterdir())


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("sentences", {"max_length": 5}),
        ("pairs", {"max_length": 9}),
        ("pairs", {"max_target_length": 4}),
        ("pairs", {"source_prefix": "say: "}),
        ("instructions", {"max_length": 55}),
        ("questions", {"max_length": 40}),
        ("questions", {"doc_stride": 2}),
    ],
)
def test_other_settings_are_another_entry(name: str, settings: dict[str, Any], tmp_path: Path) -> None:
    made(name, config_of(name, tmp_path))
    changed = config_of(name, tmp_path, **settings)
    found, asked = made(name, changed)
    assert asked > 0
    assert found == made(name, replace(changed, cache=None))[0]


def test_another_text_tokenizer_or_code_is_another_entry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of("sentences", tmp_path)
    made("sentences", config)
    rows = sentences(40)
    write_csv(tmp_path / "rows.csv", [(rows[0][0] + " bad", rows[0][1]), *rows[1:]])
    assert made("sentences", config)[1] > 0
    other = word_tokenizer()
    other.add_tokens(["word1"])
    assert made("sentences", config, other)[1] > 0
    assert made("sentences", config)[1] == 0
    monkeypatch.setattr(cache, "_code", lambda: "another version")
    assert made("sentences", config)[1] > 0


@pytest.mark.parametrize("fault", ["cut off", "altered", "another's", "empty"])
def test_an_entry_that_is_broken_is_made_again(fault: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = config_of("sentences", tmp_path)
    first, _ = made("sentences", config)
    one, two = sorted((tmp_path / "kept").iterdir())
    content, tensors = one.read_bytes(), load_file(one)
    if fault == "cut off":
        one.write_bytes(content[:-10])
    elif fault == "altered":
        one.write_bytes(content[:-10] + bytes([content[-10] ^ 1]) + content[-9:])
    elif fault == "another's":
        save_file(load_file(two), one)
    else:
        one.write_bytes(b"")
    capsys.readouterr()
    again, asked = made("sentences", config)
    said = capsys.readouterr().err
    assert again == first
    assert asked > 0
    assert said.count(f"the tokens kept in {one} are read no more") == 1
    assert len(said.splitlines()) == 1
    assert {name: array.tolist() for name, array in load_file(one).items()} == {
        n: a.tolist() for n, a in tensors.items()
    }
    assert made("sentences", config)[1] == 0


def test_a_folder_that_cannot_be_written_costs_a_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("no folder", encoding="utf-8")
    config = config_of("sentences", tmp_path, cache=str(tmp_path / "file" / "kept"))
    found, _ = made("sentences", config)
    assert "tokens cannot be kept in" in capsys.readouterr().err
    assert found == made("sentences", replace(config, cache=None))[0]


def test_small_data_is_not_kept_and_where_it_is_by_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user"))
    config = config_of("sentences", tmp_path, cache="auto")
    monkeypatch.setattr(cache, "SLOW", 100_000)
    made("sentences", config)
    assert not (tmp_path / "user").exists()
    monkeypatch.setattr(cache, "SLOW", 0)
    made("sentences", config)
    assert len(os.listdir(tmp_path / "user" / "apt-lm" / "tokens")) == 2


def test_a_run_may_be_resumed_with_another_cache(tmp_path: Path) -> None:
    path = tmp_path / CONFIG
    path.write_text(f"output_dir: {tmp_path}\nmodel: {{name: x}}\ndata: {{datasets: y}}\n", encoding="utf-8")
    (tmp_path / "checkpoints" / "checkpoint-3").mkdir(parents=True)
    moved = load_config(path, ["data.cache=null"])
    assert find_checkpoint(tmp_path, moved, overwrite=False, resume=True) == str(tmp_path / "checkpoints/checkpoint-3")
    with pytest.raises(ValueError, match=r"data.max_length is 9, but the unfinished run has 128"):
        find_checkpoint(tmp_path, load_config(path, ["data.max_length=9"]), overwrite=False, resume=True)
