"""Files that commit 3fa0c2a wrote are read by public names, and give what they gave then.

They lie in tests/data/written_by_3fa0c2a, beside the script that wrote them and the answers it got. What a later
version adds to a record is no difference; what it leaves out or says otherwise is one.
"""

import json
import os
import re
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import yaml
from check import Unrounded, close
from safetensors.torch import load_file
from torch import Tensor

import apt
from apt.cli import main

OLD = Path(__file__).parents[1] / "data/written_by_3fa0c2a"
EXPORTS = sorted(path.name for path in (OLD / "exports").iterdir() if path.is_dir())
LOOPS = sorted(path.name for path in (OLD / "own_loop").iterdir())
COMMANDS = json.loads((OLD / "configs/resolved.json").read_text(encoding="utf-8"))
CARD = "apt_export.json"
GATED = "bert_dynacsg"  # comes back patched
CLOCKED = ("seconds", "init_seconds", "versions")  # of no answer
SCORES_APART = 1e-4  # relative, of scores of a float32 run on another kind of CPU


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def read_rows(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def compare(what: str, ours: Any, theirs: Any, rel: float = 1e-7) -> None:
    """Whether a record says what an old one said: numbers with a fraction about, all else exactly."""
    if isinstance(theirs, dict):
        missing = sorted(set(theirs) - set(ours))
        assert not missing, f"{what} lacks {missing}"
        for key in theirs:
            if key not in CLOCKED:
                compare(f"{what}.{key}", ours[key], theirs[key], rel)
    elif isinstance(theirs, list):
        assert len(ours) == len(theirs), f"{what}: {ours} instead of {theirs}"
        for index, pair in enumerate(zip(ours, theirs, strict=True)):
            compare(f"{what}[{index}]", *pair, rel)
    elif isinstance(theirs, float):
        assert ours == pytest.approx(theirs, rel=rel), what
    else:
        assert ours == theirs, what


def logits_of(model: Any, batch: dict[str, Tensor]) -> Tensor:
    with torch.no_grad(), Unrounded():
        found = model.eval()(**batch).logits
    assert isinstance(found, Tensor)
    return found


def base(name: str) -> Any:
    """The model that an old run began with, before it was patched."""
    folder = OLD / "bases" / name
    kind = getattr(transformers, read_json(folder / "config.json")["architectures"][0])
    return kind.from_pretrained(folder).double()


def batches_of(name: str) -> list[dict[str, Tensor]]:
    """One batch a step, and a last one that no step took."""
    table = load_file(OLD / "bases" / f"{name}_batches.safetensors")
    return [{key: rows[step] for key, rows in table.items()} for step in range(len(table["input_ids"]))]


def checkpoint_functions() -> tuple[Callable[..., None], Callable[..., None]]:
    """`restore_shapes` and `load_controller` from where a page of 3fa0c2a told to import them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from apt.checkpoint import load_controller, restore_shapes
    return restore_shapes, load_controller


@pytest.mark.parametrize("label", EXPORTS)
def test_an_export_is_the_model_it_was(label: str) -> None:
    answers = load_file(OLD / "exports" / f"{label}.safetensors")
    tokens = answers.pop("tokens", None)
    logits = answers.pop("logits")
    model: Any = apt.load_model(OLD / "exports" / label).double()
    close(label, logits_of(model, answers), logits)
    if tokens is not None:
        ids = answers["input_ids"][:1, :4]
        found = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False)
        assert torch.equal(found, tokens)


@pytest.mark.parametrize("label", [label for label in EXPORTS if label != GATED])
def test_an_export_can_be_tuned_on(label: str, tmp_path: Path) -> None:
    """Patched, and exported again, it is the same model with the same counts."""
    card = read_json(OLD / "exports" / label / CARD)
    answers = load_file(OLD / "exports" / f"{label}.safetensors")
    model: Any = apt.patch_model(apt.load_model(OLD / "exports" / label).double(), method="lora")
    apt.export_model(model, tmp_path / "again")
    again = read_json(tmp_path / "again" / CARD)
    assert again["params_after"] == card["params_after"]
    if not card["stock"]:  # else the sizes stand in its configuration
        compare("units", again["units"], card["units"])
        assert again.get("hidden") == card.get("hidden")
    batch = {name: tensor for name, tensor in answers.items() if name not in ("logits", "tokens")}
    close(label, logits_of(apt.load_model(tmp_path / "again"), batch), answers["logits"])


@pytest.mark.parametrize("label", ["llama_uniform", "llama_uniform_hidden"])
def test_an_export_is_still_one_of_transformers(label: str) -> None:
    answers = load_file(OLD / "exports" / f"{label}.safetensors")
    model = transformers.AutoModelForCausalLM.from_pretrained(OLD / "exports" / label).double()
    batch = {name: answers[name] for name in ("input_ids", "attention_mask")}
    close(label, logits_of(model, batch), answers["logits"])


@pytest.mark.parametrize("label", LOOPS)
def test_a_loop_of_ones_own_goes_on(label: str) -> None:
    """By the words of docs/own_loop.md: the decisions, losses and counts of the run that was not stopped."""
    restore_shapes, load_controller = checkpoint_functions()
    folder = OLD / "own_loop" / label
    case = read_json(folder / "case.json")
    batches = batches_of(case["base"])
    model = apt.patch_model(base(case["base"]), **case["settings"]).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    restore_shapes(model, folder, optimizer)
    saved = torch.load(folder / "training.pt", weights_only=True)
    model.load_state_dict(saved["model"])
    run = apt.Controller(model, optimizer, case["total"])
    load_controller(run, folder)
    optimizer.load_state_dict(saved["optimizer"])
    torch.manual_seed(5)
    losses = []
    for batch in batches[case["stop"] : case["total"]]:
        with Unrounded():
            loss = run.loss(model(**batch), batch)
        loss.backward()
        losses.append(loss.item())
        run.after_backward()
        optimizer.step()
        run.after_step()
        optimizer.zero_grad()
    compare("losses", losses, case["losses"])
    compare("events", [event.to_json() for event in run.events], case["events"])
    compare("summary", vars(apt.summary(model)), case["summary"])
    close(label, logits_of(model, batches[-1]), load_file(folder / "answers.safetensors")["logits"])


@pytest.mark.parametrize("label", ["padded", "compact"])
def test_a_peft_folder(label: str) -> None:
    model = apt.patch_model(base("bert"), method="lora", rank=1, target_modules=["q", "v", "up"])
    apt.load_adapter(model, OLD / "peft" / label)
    assert apt.summary(model).ranks == read_json(OLD / "peft/ranks.json")
    close(label, logits_of(model, batches_of("bert")[-1]), load_file(OLD / "peft/answers.safetensors")["logits"])


@pytest.mark.parametrize("label", ["lora_and_ptuning", "adalora_and_prefix"])
def test_weights_of_the_manager(label: str) -> None:
    model = base("bert").float()
    manager = apt.EfficientFineTuningManager(model)
    if label == "lora_and_ptuning":
        manager.apply_lora(["query", "value"], rank=2, share_parameters=True)
        manager.apply_ptuning(num_virtual_tokens=3, hidden_dimension=8)
    else:
        manager.apply_adalora(["query", "value"], rank=3, rank_allocation="importance")
        manager.apply_prefix_tuning(prefix_length=3)
    manager.load_efficient_weights(OLD / "efficient" / f"{label}.safetensors")
    answers = load_file(OLD / "efficient" / f"{label}_answers.safetensors")
    close(label, logits_of(model.double(), batches_of("bert")[-1]), answers["logits"])


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the folder in which runs of the command line lie, as the working folder."""
    folder = Path(shutil.copytree(OLD / "command_line", tmp_path / "runs"))
    monkeypatch.chdir(folder)
    return folder


def test_a_run_goes_on_from_its_checkpoint(runs: Path) -> None:
    """It ends where the run ended that nobody stopped, and decides what that one decided."""
    os.rename("unfinished", "run.partial")  # its name in the repository, as git leaves out what ends so
    assert main(["train", "config.yaml", "--resume"]) == 0
    assert read_json(runs / "run/efficiency.json")["resumed_from_step"] == 7
    compare("events", read_rows(runs / "run/events.jsonl"), read_rows(runs / "finished/events.jsonl"))
    compare("metrics", read_json(runs / "run/metrics.json"), read_json(runs / "finished/metrics.json"), SCORES_APART)
    ours = load_file(runs / "run/model/model.safetensors")
    theirs = load_file(runs / "finished/model/model.safetensors")
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        close(name, ours[name], tensor)


def test_a_finished_run_is_known_as_one(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "config.yaml", "output_dir=finished", "--resume"]) == 0
    told = capsys.readouterr().err
    assert "holds a finished run" in told
    assert "other settings" not in told


def test_an_export_of_a_run_is_scored(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", "finished/model", "config.yaml"]) == 0
    compare("scores", json.loads(capsys.readouterr().out), read_json(runs / "scores.json"), SCORES_APART)


def cells_of(table: str) -> list[set[str]]:
    """The cells of every line that a report prints, without their frame."""
    lines = (re.split("[│┃]", line) for line in table.splitlines())
    return [{cell.strip() for cell in cells} for cells in lines if len(cells) > 1]


def test_a_report_tells_what_it_told(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", "finished"]) == 0
    rows = cells_of(capsys.readouterr().out)
    old = cells_of((runs / "report.txt").read_text(encoding="utf-8"))
    assert len(old) > 20
    lost = [cells for cells in old if not any(cells <= row for row in rows)]
    assert not lost
    pictures = {path.name for path in (runs / "finished/report").iterdir()}
    assert set(read_json(runs / "pictures.json")) <= pictures


def test_a_grid_counts_a_finished_run(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    os.makedirs("grid")
    os.rename("finished", "grid/apt-60-seed0")
    assert main(["experiment", "grid.yaml"]) == 0
    assert "1 runs, 1 of them finished" in capsys.readouterr().err
    assert (runs / "grid/runs.csv").read_text(encoding="utf-8") == (runs / "grid_runs.csv").read_text(encoding="utf-8")


@pytest.mark.parametrize("row", COMMANDS, ids=lambda row: " ".join(row["arguments"]))
def test_a_config_means_what_it_meant(
    row: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(OLD)  # whose configs/ the names of presets then mean
    assert main(row["arguments"]) == 0
    compare("config", yaml.safe_load(capsys.readouterr().out), row["resolved"], 0.0)
