"""``python -m apt export``: what it takes, how it refuses, and that nothing half-written stays."""

import errno
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from exported import free_export, uniform_export
from tiny_models import tiny_batch, tiny_model
from tiny_run import tiny_tokenizer, write_config

import apt
from apt.cli import main
from apt.deploy import hf
from apt.deploy.formats import FORMATS, Comparison


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exports")
    free_export("llama_gqa", folder / "free")
    uniform_export("llama_gqa", folder / "uniform")
    return folder


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    found: torch.Tensor = model(**tiny_batch("llama_gqa")).logits
    return found


@pytest.mark.parametrize("layout", ["free", "uniform"])
def test_an_export_is_written_as_it_is(
    layout: str, exports: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", str(exports / layout), "--to", "hf", "--out", str(tmp_path / "hf"), "--check"]) == 0
    told = capsys.readouterr().err
    assert "logits within 0.0e+00 of the largest, the same text" in told
    assert ("AutoModelForCausalLM with trust_remote_code=True, and apt.load_model" in told) == (layout == "free")
    assert torch.equal(logits(apt.load_model(tmp_path / "hf")), logits(apt.load_model(exports / layout)))
    made = json.loads((tmp_path / "hf/apt_deploy.json").read_text())
    assert (made["format"], made["quantise"]) == ("hf", None)
    assert made["checked"]


def test_the_card_of_the_source_says_what_the_folder_is(exports: Path, tmp_path: Path) -> None:
    assert main(["export", str(exports / "free"), "--to", "hf", "--out", str(tmp_path / "hf")]) == 0
    card, ours = ((folder / "README.md").read_text() for folder in (tmp_path / "hf", exports / "free"))
    front, _, rest = card.partition("---\n\n")
    assert front.startswith("---\n")
    assert rest.startswith("- Written for transformers, and apt.load_model (`hf`).\n- no stock configuration describes")
    assert ours.partition("---\n\n")[2] in card


def test_a_folder_that_others_load_does_not_say_how_we_do(exports: Path, tmp_path: Path) -> None:
    for to in ("hf-remote", "hf-uniform"):
        assert main(["export", str(exports / "free"), "--to", to, "--out", str(tmp_path / to)]) == 0
    before, after = ((tmp_path / to / "README.md").read_text() for to in ("hf-remote", "hf-uniform"))
    assert "apt.load_model(folder)" in before
    assert "load_model" not in after
    assert "## What was removed, and what is left" in after


def test_a_run_is_a_source(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    short = {"training": {"max_steps": 20}, "evaluation": {"event_timing_steps": 0, "inference_repeats": 1}}
    assert main(["train", str(write_config(tmp_path, **short))]) == 0
    assert main(["export", str(tmp_path / "run"), "--to", "hf", "--out", str(tmp_path / "hf"), "--check"]) == 0
    assert "logits within 0.0e+00 of the largest" in capsys.readouterr().err
    assert {"tokenizer.json", "tokenizer_config.json"} <= {path.name for path in (tmp_path / "hf").iterdir()}


def test_a_peft_folder_is_merged_into_its_base(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    base = tiny_model("llama_gqa", torch.float32)
    base.save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    tuned = peft.get_peft_model(
        stock(tmp_path / "base"), peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
    )
    tuned.save_pretrained(tmp_path / "adapter")
    assert main(["export", str(tmp_path / "adapter"), "--to", "hf", "--out", str(tmp_path / "hf")]) == 0
    wanted = logits(tuned.eval())
    assert (logits(stock(tmp_path / "hf")) - wanted).abs().max() < 1e-5
    assert (logits(base) - wanted).abs().max() > 1e-2
    assert (tmp_path / "hf/tokenizer.json").exists()


def stock(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder).eval()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["free", "--to", "word"], "export: there is no format 'word'; give one of hf"),
        (["free", "--to", "hf", "--quantise", "q8_0"], "export: hf cannot be quantised to 'q8_0'; give none"),
        (["nothing", "--to", "hf"], "export: there is no folder nothing"),
        ([".", "--to", "hf"], "is no run, no export, no PEFT folder and no model; it has no config.json"),
        (["free", "--to", "hf", "--out", "uniform"], "uniform exists; give another folder or --overwrite"),
        (["free", "--to", "hf", "--out", "uniform", "--overwrite"], "uniform exists and holds no apt_deploy.json"),
    ],
)
def test_what_cannot_be_is_said_in_one_line(
    arguments: list[str],
    words: str,
    exports: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(exports)
    before = sorted(path.name for path in exports.iterdir())
    assert main(["export", *arguments]) == 2
    told = capsys.readouterr().err.splitlines()
    assert words in told[-1]
    assert told[-1].startswith("apt: error: ")
    assert sorted(path.name for path in exports.iterdir()) == before


def test_a_full_disk_leaves_nothing(
    exports: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*args: Any) -> Any:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(hf.shutil, "copyfile", full)
    assert main(["export", str(exports / "free"), "--to", "hf", "--out", str(tmp_path / "hf")]) == 2
    assert "cannot be written: No space left on device; free some space" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("found", [Comparison("theirs", 0.2, True), Comparison("theirs", 1e-6, False)])
def test_what_is_not_the_model_is_not_kept(
    found: Comparison,
    exports: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Numbers of fewer bits are another matter: there it is told."""
    monkeypatch.setattr(hf, "compare", lambda *given: found)
    command = ["export", str(exports / "free"), "--to", "hf", "--out", str(tmp_path / "hf"), "--check"]
    assert main(command) == 2
    assert f"is not the model, so it is not kept: {found.told()}" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(hf, "QUANTISED", ("int8",))
    assert main([*command, "--quantise", "int8"]) == 0
    assert found.told() in capsys.readouterr().err


def test_a_package_that_is_missing_is_named(
    exports: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(FORMATS, "hf", replace(FORMATS["hf"], needs=("no_such_package",), extra="some"))
    assert main(["export", str(exports / "free"), "--to", "hf", "--out", str(tmp_path / "hf")]) == 2
    assert 'export: writing hf needs no_such_package: pip install "apt-lm[some]"' in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
