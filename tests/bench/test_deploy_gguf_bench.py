"""``python -m bench.deploy_gguf`` at toy size: perplexities are those of torch, and every model has its row."""

import csv
import sys
from pathlib import Path
from typing import Any

import pytest
from tiny_models import random_plan
from tiny_text import text_tokenizer, tiny_llama, write_text_config

import apt
from apt.runs.config import load_config
from apt.runs.data import TextLoader
from apt.runs.evaluation.language import perplexity
from apt.runs.models import build_model
from apt.surgery.prune import apply_prune_plan

pytestmark = pytest.mark.deploy
deploy_gguf: Any = pytest.importorskip("bench.deploy_gguf", reason="no cyllama", exc_type=ImportError)


def test_rows_and_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_text_config(tmp_path)
    model = apt.patch_model(tiny_llama())
    apply_prune_plan(model, random_plan(model, seed=1))
    small = apt.export_model(model, tmp_path / "small")
    out = tmp_path / "deploy_gguf.csv"
    options = ["--config", str(path), "--types", "f32", "q8_0", "--blocks", "1000", "--runs", "2", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", ["deploy_gguf", f"small={small}", *options])
    deploy_gguf.main()
    with out.open(encoding="utf-8") as file:
        rows = {(row["model"], row["type"]): row for row in csv.DictReader(file)}
    assert set(rows) == {(name, kind) for name in ("dense", "small") for kind in ("f32", "q8_0")}
    config = load_config(path)
    test = TextLoader(config.data, text_tokenizer(), config.training.seed).test
    models = {"dense": build_model(config, None, text_tokenizer()), "small": apt.load_model(small)}
    for name, plain in models.items():
        truth = perplexity(plain.eval(), test, 4)
        assert rows[name, "f32"]["test_tokens"] == str(truth["test_tokens"])
        assert float(rows[name, "f32"]["perplexity"]) == pytest.approx(truth["perplexity"], rel=1e-4)
        assert float(rows[name, "f32"]["prompt_tokens_per_s_p50"]) > 0
    assert float(rows["dense", "f32"]["generation_speedup"]) == 1
    table = out.with_suffix(".md").read_text(encoding="utf-8").splitlines()
    assert len(table) == 2 + len(rows)
    assert table[2].startswith("| f32 | dense | ")
