"""Which tiny models the tests of formats that are graphs trace: a few by default, for each takes many seconds."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from exported import free_export, uniform_export
from tiny_models import CLASSIFIERS

from apt.deploy.export import export_source
from apt.deploy.formats import writer_of
from apt.deploy.graphs import call_inputs
from apt.deploy.probe import logits_of
from apt.deploy.source import Source

TWO = {"num_hidden_layers": 2}  # one without neurons, the other without heads
SLOW = [
    *((name, "free") for name in ("roberta", "deberta", "distilbert", "gpt2", "gpt2_cls", "opt", "phi3")),
    *((name, "free") for name in ("mistral", "qwen2", "qwen3", "gemma3", "t5")),
    *((name, "uniform") for name in ("bert", "llama_gqa", "mistral", "gemma3", "t5")),
]
CASES = [("bert", "free"), ("llama_gqa", "free"), *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW)]


def deployed(name: str, layout: str, to: str, folder: Path, quantise: str | None = None) -> Source:
    """The source of what is written into ``folder / "written"``."""
    settings = {} if name in ("gemma3", "t5", "distilbert") else TWO
    made = {"free": free_export, "uniform": uniform_export}[layout](name, folder / "model", **settings)
    export_source(made, to, folder / "written", quantise=quantise)
    return Source(name, made)


def assert_computed(name: str, layout: str, to: str, folder: Path) -> None:
    """Write a model, and compare what its program makes of it with torch: logits, and text where it makes any."""
    source = deployed(name, layout, to, folder)
    found = writer_of(to).compare(source, folder / "written", None)
    assert found.difference is not None
    assert found.difference < 1e-4
    assert found.same_text is (None if name in CLASSIFIERS else True)


def share_of_equal_classes(run: Any, model: Any) -> float:
    """How often a program names the same class as torch, over 64 rows."""
    draw = torch.Generator().manual_seed(0)
    inputs = {name: value[:1].repeat(64, 1) for name, value in call_inputs(model).items()}
    inputs["input_ids"] = torch.randint(3, model.config.vocab_size, inputs["input_ids"].shape, generator=draw)
    found = run("model", {name: value.numpy() for name, value in inputs.items()})["logits"]
    return float(np.mean(found.argmax(-1) == logits_of(model, inputs).numpy().argmax(-1)))
