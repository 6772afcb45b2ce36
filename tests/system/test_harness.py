"""Scores by the real lm-evaluation-harness, beside log-likelihoods that are computed here; no network.

`make harness` installs the library; CI runs it, `make test` leaves it out.
"""

import csv
import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tiny_models import fill_adapters
from tiny_text import WORDS, text_tokenizer, tiny_llama, write_llama

import apt
from apt.cli import main
from apt.families import anatomy_of
from apt.pruning.units import find_units
from apt.records import PrunePlan
from apt.runs.evaluation.harness import PAPER, HarnessConfig, _index, score
from apt.surgery.prune import apply_prune_plan

pytestmark = pytest.mark.harness

ROOT = Path(__file__).parents[2]
Rows = list[dict[str, Any]]


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Where `datasets` keeps what it has read: not in the home of who runs the tests."""
    import datasets

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def rows() -> Rows:
    """Questions with three choices, one of them longer; the labels are drawn."""
    draw = random.Random(0)

    def words(count: int) -> str:
        return " ".join(draw.choice(WORDS) for _ in range(count))

    return [
        {"question": words(4), "choices": [words(2), words(2), words(3)], "label": draw.randrange(3)} for _ in range(60)
    ]


@pytest.fixture(scope="module")
def tasks(rows: Rows, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two tasks on the same rows, and a group of both."""
    folder = tmp_path_factory.mktemp("tasks")
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "rows.jsonl")}},
        "test_split": "test",
        "fewshot_split": "test",
        "fewshot_config": {"sampler": "first_n"},
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "choices",
        "doc_to_target": "label",
        "metric_list": [
            {"metric": name, "aggregation": "mean", "higher_is_better": True} for name in ("acc", "acc_norm")
        ],
    }
    group = {"group": "ours", "task": ["words", "bare"], "aggregate_metric_list": [{"metric": "acc"}]}
    documents = {"words": {"task": "words", **task}, "bare": {"task": "bare", **task, "num_fewshot": 0}, "ours": group}
    for name, document in documents.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(document))
    return folder


@pytest.fixture(scope="module")
def pruned() -> Any:
    """A patched Llama whose layers have lost different numbers of heads and neurons."""
    model = fill_adapters(apt.patch_model(tiny_llama(), rank=3))
    groups = find_units(anatomy_of(model))
    kept = {group.name: list(range(index % 3, group.num_units - index)) for index, group in enumerate(groups)}
    apply_prune_plan(model, PrunePlan(step=1, target_sparsity=0.3, kept=kept, round_to=1))
    return model.eval()


@pytest.fixture(scope="module")
def folders(pruned: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    write_llama(folder / "dense")
    apt.export_model(pruned, folder / "pruned")
    text_tokenizer().save_pretrained(folder / "pruned")
    assert not json.loads((folder / "pruned/apt_export.json").read_text())["stock"]
    return {"dense": folder / "dense", "pruned": folder / "pruned"}


def answers(model: Any, rows: Rows, examples: int) -> dict[str, list[int]]:
    """The likeliest choice of each row, and the likeliest by letter: one sequence at a time, no padding, no cache."""
    tokenizer, found = text_tokenizer(), {"acc": [], "acc_norm": []}
    for row in rows:
        others = [other for other in rows if other is not row][:examples]
        shown = "".join(f"{other['question']} {other['choices'][other['label']]}\n\n" for other in others)
        before = len(tokenizer(shown + row["question"]).input_ids)
        sums = []
        for choice in row["choices"]:
            ids = torch.tensor([tokenizer(f"{shown}{row['question']} {choice}").input_ids])
            with torch.no_grad():
                logs = model(input_ids=ids).logits[0, before - 1 : -1].double().log_softmax(-1)
            sums.append(logs.gather(1, ids[0, before:, None]).sum())
        lengths = torch.tensor([len(choice) for choice in row["choices"]])
        found["acc"].append(int(torch.stack(sums).argmax()))
        found["acc_norm"].append(int((torch.stack(sums) / lengths).argmax()))
    return found


def accuracy(found: list[int], rows: Rows) -> float:
    return sum(row["label"] == answer for row, answer in zip(rows, found, strict=True)) / len(rows)


def values(scored: Rows, task: str = "words") -> dict[str, float]:
    return {row["metric"]: row["value"] for row in scored if row["task"] == task}


@pytest.mark.parametrize("examples", [0, 2])
@pytest.mark.parametrize("name", ["dense", "pruned"])
def test_accuracy_is_that_of_log_likelihoods(
    name: str, examples: int, folders: dict[str, Path], tasks: Path, rows: Rows, pruned: Any, tmp_path: Path
) -> None:
    out = tmp_path / "scores.json"
    asked = ("--tasks", "words", "--include", str(tasks), "--num_fewshot", str(examples), "--out", str(out))
    assert main(["harness", str(folders[name]), *asked]) == 0
    written = json.loads(out.read_text())
    models = {"dense": tiny_llama(), "pruned": pruned}
    wanted = {metric: accuracy(found, rows) for metric, found in answers(models[name], rows, examples).items()}
    assert values(written["rows"]) == pytest.approx(wanted, abs=1e-12)
    assert {(row["num_fewshot"], row["samples"]) for row in written["rows"]} == {(examples, len(rows))}
    for row in written["rows"]:  # of a mean of zeros and ones
        assert row["stderr"] == pytest.approx((row["value"] * (1 - row["value"]) / (len(rows) - 1)) ** 0.5)
    assert (written["class"], written["limit"]) == ("LlamaForCausalLM", None)
    assert {"apt-lm", "python", "torch", "transformers", "lm_eval"} <= set(written["versions"])


def test_the_numbers_tell_models_and_prompts_apart(rows: Rows, pruned: Any) -> None:
    """Else the test above could not fail."""
    found = [answers(model, rows, examples) for model in (tiny_llama(), pruned) for examples in (0, 2)]
    for metric in ("acc", "acc_norm"):
        assert len({accuracy(each[metric], rows) for each in found}) > 2
        assert len({tuple(each[metric]) for each in found}) == 4


def test_a_model_in_memory(rows: Rows, tasks: Path, pruned: Any) -> None:
    """Still patched; its mode comes back, and a limit takes the first rows."""
    pruned.train()
    scored = score(pruned, text_tokenizer(), HarnessConfig(tasks=("words",), include=tasks, limit=25))
    assert pruned.training
    wanted = answers(pruned.eval(), rows[:25], 0)
    assert values(scored) == pytest.approx({name: accuracy(found, rows[:25]) for name, found in wanted.items()})


def test_names_and_groups(
    folders: dict[str, Path], tasks: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    model, out = str(folders["dense"]), tmp_path / "scores.json"
    assert main(["harness", model, "--tasks", "ours", "--include", str(tasks), "--out", str(out)]) == 0
    table = capsys.readouterr().out
    assert "ours" in table
    assert "bare" not in table  # a member
    scored = json.loads(out.read_text())["rows"]
    assert values(scored, "ours")["acc"] == values(scored, "bare")["acc"] == values(scored)["acc"]
    assert main(["harness", model, "--tasks", "wurds", "--include", str(tasks)]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("apt: error: harness: there is no task 'wurds'; did you mean words")
    assert main(["harness", model, "--tasks", "bare", "--include", str(tasks), "--num_fewshot", "1"]) == 2
    assert "bare has no room for 1 examples: its file fixes num_fewshot at 0" in capsys.readouterr().err
    assert set(PAPER) <= set(_index(tasks, everything=True).all_tasks)


def test_the_example(folders: dict[str, Path], pruned: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(ROOT)
    asked = ("--tasks", "reviews", "--include", "examples/harness", "--out", str(tmp_path / "scores.json"))
    assert main(["harness", str(folders["pruned"]), *asked]) == 0
    with open("tests/data/reviews.csv", encoding="utf-8", newline="") as file:
        reviews = list(csv.DictReader(file))
    choices = ["bad", "good"]
    rows = [
        {"question": f"Review: {row['text']}\nIt was", "choices": choices, "label": choices.index(row["label"])}
        for row in reviews
    ]
    scored = json.loads((tmp_path / "scores.json").read_text())["rows"]
    assert values(scored, "reviews")["acc"] == pytest.approx(accuracy(answers(pruned, rows, 0)["acc"], rows))


def test_a_folder_without_a_tokenizer(
    pruned: Any, tasks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    apt.export_model(pruned, tmp_path / "bare")
    assert main(["harness", str(tmp_path / "bare"), "--tasks", "words", "--include", str(tasks)]) == 2
    assert "bare has no tokenizer; tokenizer.save_pretrained puts it there" in capsys.readouterr().err
