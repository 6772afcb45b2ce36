"""Model cards of exports: read back by the hub's own reader, complete, and without a path of this machine."""

import json
import re
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from tiny_run import efficiency_of, metrics_of, tiny_bert, write_config

import apt
from apt.cli import main
from apt.export.model_card import NOT_FIGURES, command_of, licence_of, public_name


@pytest.fixture(autouse=True)
def _threads() -> object:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def rows_of(card: ModelCard) -> dict[str, str]:
    return dict(re.findall(r"^\| (.+?) \| (.*) \|$", card.text, re.MULTILINE))


def test_a_run_writes_all_it_knows(tmp_path: Path) -> None:
    config = write_config(tmp_path, training={"max_steps": 20}, evaluation={"event_timing_steps": 0})
    (tmp_path / "tiny" / "README.md").write_text("---\nlicense: mit\n---\n# tiny\n", encoding="utf-8")
    assert main(["train", str(config), "seed=3"]) == 0
    folder = tmp_path / "run" / "model"
    card, metrics = ModelCard.load(folder / "README.md"), metrics_of(tmp_path / "run") | efficiency_of(tmp_path / "run")
    rows = rows_of(card)
    figures = {name: str(value) for name, value in metrics.items() if name not in NOT_FIGURES and value is not None}
    assert {name: rows[name] for name in figures} == figures
    assert {"accuracy", "sparsity", "speedup", "train_seconds", "params_after"} <= set(figures)
    assert card.data.license == "mit"
    assert card.data.base_model == "tiny"
    assert card.data.datasets == ["rows.csv"]
    assert card.data.metrics == ["accuracy"]
    assert {"apt-lm", "apt", "pruned"} <= set(card.data.tags)
    assert "python -m apt train config.yaml seed=3" in card.text
    units = json.loads((folder / "apt_export.json").read_text())["units"]
    for kind in ("heads", "neurons"):
        left = " ".join(str(count) for name, count in units.items() if name.endswith(kind))
        assert rows[f"{kind} left, layer by layer"] == left
    assert rows["torch"] == torch.__version__
    assert str(tmp_path) not in card.content
    assert not re.search(r"(?<![\w.:])/\w+/", card.content)


@pytest.mark.parametrize("layout", ["free", "uniform"])
def test_an_export_of_a_loop_of_ones_own(tmp_path: Path, layout: str) -> None:
    model = apt.patch_model(tiny_bert(), layout=layout)
    folder = apt.export_model(model, tmp_path / "small")
    card = ModelCard.load(folder / "README.md")
    stock = json.loads((folder / "apt_export.json").read_text())["stock"]
    assert ("BertForSequenceClassification.from_pretrained(folder)" in card.text) == stock
    assert ("apt.load_model(folder)" in card.text) == (not stock)
    assert card.data.license == "unknown"
    assert "Scores" not in card.text
    assert rows_of(card)["parameters after"] == f"{apt.summary(model).params_after:,}"


def test_names_and_commands_tell_no_place(tmp_path: Path) -> None:
    assert public_name("org/model") == "org/model"
    assert public_name(str(tmp_path / "model")) == "model"
    assert public_name("./nothing/model") == "model"
    assert public_name("") == "unknown"
    assert licence_of(str(tmp_path)) == "unknown"
    told = command_of(["train", "/home/me/config.yaml", "model=~/models/tiny", "seed=3"])
    assert told == "python -m apt train config.yaml model=tiny seed=3"
