"""What README and docs/ say runs, offline and at toy size: code, configs, commands, paths, messages.

A new page is taken up by itself. Hub names give tiny random models; what a page leaves to the reader (`loader`,
``train_dataset=...``) is in `GIVEN`.
"""

import re
import shlex
import socket
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import yaml
from pages import (
    CUT,
    PAGES,
    ROOT,
    blocks,
    commands,
    files,
    first_cells,
    is_a_message,
    lost_anchors,
    lost_paths,
    obstacles,
    quoted_first,
    refusals,
    tiny_pretrained,
    toy_rows,
)
from tiny_tasks import word_tokenizer
from torch.utils.data import DataLoader

import apt
from apt.cli import main, parse_arguments, read_compression, read_config
from apt.runs.config import SECTIONS, load_config
from apt.runs.experiment import cells, load_grid

BASE = {"output_dir": "runs/page", "model": {"name": "bert-base-uncased"}, "data": {"datasets": "glue/sst2"}}
AUTO = ["AutoTokenizer", *(f"AutoModelFor{head}" for head in ("CausalLM", "Seq2SeqLM", "SequenceClassification"))]
AUTO += ["AutoModelForQuestionAnswering"]
TOY = ("training.batch_size=4", "training.max_steps=30", "training.learning_rate=3e-3", "pruning.num_events=2")
QUICK = ("inference_length=8", "generated_tokens=4", "inference_repeats=2", "event_timing_steps=1", "num_threads=1")


def page_id(page: Path) -> str:
    return str(page.relative_to(ROOT))


def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


every_page = pytest.mark.parametrize("page", PAGES, ids=page_id)


def local_or_toy(original: Any) -> Any:
    """``from_pretrained`` that reads a folder as ever, and gives a toy for a name on the hub."""

    def from_pretrained(cls: type, name: Any, *args: Any, **settings: Any) -> Any:
        if Path(name).is_dir():
            return original.__func__(cls, name, *args, **settings)
        if cls.__name__ == "AutoTokenizer":
            return word_tokenizer()
        told = settings.pop("output_loading_info", False)
        model = tiny_pretrained(cls.__name__, **settings)
        return (model, {"missing_keys": []}) if told else model

    return classmethod(from_pretrained)


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with the files of the repository in it, no network, toys for hub names."""
    for top in {name.partition("/")[0] for name in files()}:
        (tmp_path / top).symlink_to(ROOT / top)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(torch, "compile", partial(torch.compile, disable=True))  # minutes; test_compile.py has it
    for owner in (getattr(transformers, name) for name in AUTO):
        original = owner.__dict__.get("from_pretrained", owner.from_pretrained)
        monkeypatch.setattr(owner, "from_pretrained", local_or_toy(original))
    return tmp_path


def refuse(*args: Any) -> None:
    raise OSError("a page asked for the network")


def fit(model: Any, **settings: Any) -> None:
    """What pages call `fit`: any training that prunes to its end."""
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    run = apt.Controller(model, optimizer, 20, **settings)
    tokens = torch.randint(1, model.config.vocab_size, (4, 8))
    for _ in range(20):
        labels = tokens if "CausalLM" in type(model).__name__ else tokens[:, 0] % 2
        run.loss(model(input_ids=tokens, labels=labels)).backward()
        run.after_backward()
        optimizer.step()
        run.after_step()
        optimizer.zero_grad()


def given() -> dict[str, Any]:
    """What a page leaves to its reader."""
    rows = toy_rows(96)
    return {"train_dataset": rows, "eval_dataset": rows[:8], "loader": DataLoader(rows, batch_size=4), "fit": fit}  # type: ignore[arg-type]


def write_demo_run(folder: Path) -> None:
    """The part of a finished run that pages load: a model with its tokenizer, as ``make demo`` leaves it."""
    model = apt.patch_model(tiny_pretrained("AutoModelForSequenceClassification", num_labels=2))
    fit(model, target_sparsity=0.6)
    apt.export_model(model, folder / "model")
    word_tokenizer().save_pretrained(folder / "model")


def run_python(text: str, name: str) -> dict[str, Any]:
    """Run the Python blocks of a page in one namespace, which is returned; lines are those of the page."""
    space: dict[str, Any] = given()
    for block in blocks(text, "python"):
        code = re.sub(r"\b(\w+)=\.\.\.", r"\1=\1", block.code)
        exec(compile("\n" * (block.line - 1) + code, name, "exec"), space)
    return space


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(text_of(p), "python")], ids=page_id)
def test_the_code_of_a_page_runs(page: Path, desk: Path) -> None:
    write_demo_run(desk / "runs/demo")
    space = run_python(text_of(page), page_id(page))
    controllers = [value for value in space.values() if isinstance(value, apt.Controller)]
    controllers += [value.controller for value in space.values() if isinstance(value, apt.APTrainer)]
    assert not any(run.active for run in controllers), "a loop of the page ends before its last event"


def read_configs(text: str, folder: Path) -> list[Path]:
    """Load every YAML block of a page: a grid with all its runs, a config, or a part of one on top of `BASE`.

    Returns the configs that have a name in their first line; they lie in the folder.
    """
    written = []
    for number, block in enumerate(blocks(text, "yaml")):
        name = re.match(r"# (\S+\.yaml)\n", block.code)
        document = yaml.safe_load(block.code)
        if "config" in document:
            check_grid(folder / f"grid{number}.yaml", document)
            continue
        if "output_dir" not in document:
            parts = {key: BASE.get(key, {}) | value for key, value in document.items() if key in SECTIONS}  # type: ignore[operator]
            document = BASE | document | parts
        path = folder / (name[1] if name else f"block{number}.yaml")
        path.write_text(yaml.safe_dump(document), encoding="utf-8")
        load_config(path)
        if name:
            written.append(path)
    return written


def check_grid(path: Path, document: dict[str, Any]) -> None:
    """Load a grid, whose config may lie beside `examples/grid.yaml`, and the config of each of its runs."""
    beside = ROOT / "examples" / document["config"]
    path.write_text(yaml.safe_dump(document | {"config": str(beside)} if beside.exists() else document))
    assert cells(load_grid(path))


@every_page
def test_the_configs_and_commands_of_a_page_are_understood(page: Path, desk: Path) -> None:
    read_configs(text_of(page), desk)
    for line in commands(text_of(page)):
        check_command(line)


def check_command(line: str) -> None:
    """Parse a line as the shell and the program that it calls would, and see that what it names is there."""
    words = shlex.split(line)
    while re.fullmatch(r"\w+=\S*", words[0]):  # environment
        words = words[1:]
    if words[0] == "apt-lm" or words[1:3] == ["-m", "apt"]:
        arguments = parse_arguments(words[1:] if words[0] == "apt-lm" else words[3:])
        if arguments.command == "compress":
            read_compression(arguments)
        elif hasattr(arguments, "overrides"):
            read_config(arguments)
        if hasattr(arguments, "grid"):
            assert cells(load_grid(arguments.grid)), line
        for value in vars(arguments).values():
            assert not str(value).endswith(".yaml") or Path(value).is_file(), f"{line}: there is no {value}"
    elif words[0] == "make":
        makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
        targets = [word for word in words[1:] if "=" not in word]
        assert all(re.search(rf"^{re.escape(target)}:", makefile, re.MULTILINE) for target in targets), line
    elif words[1:2] == ["-m"] and words[2].partition(".")[0] == "bench":
        path = words[2].replace(".", "/")
        assert {f"{path}.py", f"{path}/__main__.py"} & files(), line
    elif words[1].endswith(".py"):
        assert words[1] in files(), line


TASKS_PAGE = ROOT / "docs/tasks.md"


@pytest.mark.parametrize("number", range(len(blocks(text_of(TASKS_PAGE), "yaml"))))
def test_the_config_of_a_task_trains(number: int, desk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The whole run, on the sample that the page names, with a toy in the place of its model."""
    config = read_configs(text_of(TASKS_PAGE), desk)[number]
    assert main(["train", str(config), *TOY, *QUICK, "hardware.device=cpu"]) == 0, capsys.readouterr().err
    output = Path(load_config(config).output_dir)
    assert (output / "metrics.json").exists()
    assert apt.load_model(output / "model")


@every_page
def test_quoted_paths_and_linked_headings_are_there(page: Path) -> None:
    assert not lost_paths(text_of(page))
    assert not lost_anchors(page, text_of(page))


def test_the_messages_of_troubleshooting_are_those_of_the_code() -> None:
    quoted = list(first_cells(text_of(ROOT / "docs/troubleshooting.md")))
    assert len(quoted) > 10
    assert not [message for message in quoted if not is_a_message(message)]


def test_what_is_refused_is_told_in_the_words_of_the_code() -> None:
    rows = refusals(text_of(ROOT / "docs/troubleshooting.md"))
    assert len(rows) > 50
    assert all(what and instead for what, _, instead in rows)
    quoted = [quoted_first(why) for _, why, _ in rows]
    assert not [why for message, (_, why, _) in zip(quoted, rows, strict=True) if not is_refusal(message)]
    begins = [message.partition(CUT)[0] for message in quoted if message.partition(CUT)[0]]
    assert obstacles()
    assert not [text for text in obstacles() if not any(text in begin or begin in text for begin in begins)]


def is_refusal(quoted: str) -> bool:
    return bool(quoted.strip(CUT)) and is_a_message(quoted)


FAULTS = {
    "code": "```python\nimport apt\n\napt.patch_modell(None)\n```",
    "code with a wrong setting": "```python\nimport apt\n\napt.APTConfig().with_overrides(target_sparsty=0.5)\n```",
    "config": "```yaml\nmodel:\n  nam: bert-base-uncased\n```",
    "grid": "```yaml\noutput_dir: runs/grid\nconfig: demo.yaml\nmethods: [lore]\n```",
    "command": "```\npython -m apt trian examples/demo.yaml\n```",
    "option": "```bash\npython -m apt train examples/demo.yaml --sparsty_level 0.5\n```",
    "override": "```\npython -m apt train examples/demo.yaml target_sparsty=0.5\n```",
    "config that is not there": "```\npython -m apt train examples/demos.yaml\n```",
    "target": "```\nmake demos\n```",
    "module": "```\npython -m bench.nothing --tune\n```",
    "path": "It is in `tests/apt/test_nothing.py`.",
    "heading": "See [there](settings.md#nothing).",
    "bare name": "It is in `test_nothing.py`.",
    "refusal": "| what | why | instead |\n|---|---|---|\n| trees | `is made of wood`: it would burn | stones |",
    "message": "| `schedule: a run of … steps is too long` | nothing |",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_found(fault: str, desk: Path) -> None:
    with pytest.raises((AssertionError, AttributeError, ValueError, OSError)):
        check_all(FAULTS[fault], desk)


def check_all(text: str, desk: Path) -> None:
    run_python(text, "page")
    read_configs(text, desk)
    for line in commands(text):
        check_command(line)
    assert not lost_paths(text)
    assert not lost_anchors(ROOT / "docs/page.md", text)
    assert all(map(is_a_message, first_cells(text)))
    assert all(is_refusal(quoted_first(why)) for _, why, _ in refusals(text))
