"""Damages files and reads them: ``python tests/fuzzing.py [FOLDER] [--count 500] [--seed 0] [--seconds 600]``.

Each trial draws a subject (an export, a checkpoint, an adapter, a file of weights, a base model, a GGUF file, a cache,
a config, a record, a data set), a file of it and a damage. Then the subject either is refused in one line that names
its folder, or gives what the undamaged one gave, where its files have checksums. Base models, configs and data have
none, so there another value may come of it, but no other error. No damage may run anything or take more than seconds.
One line of JSON for each fault that is found, with the seed and the number of the trial, which make it again; the exit
code is 1 where there is one.
"""

import argparse
import contextlib
import io
import json
import random
import re
import shutil
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from own_loop import Loop, patched
from run_records import whole_run
from tiny_models import fill_adapters, tiny_batch, tiny_model
from tiny_run import sentences, tiny_tokenizer, write_config, write_csv
from tiny_text import write_gguf
from torch import Tensor

import apt
import apt.runs.data.cache as cache
from apt.cli import USER_ERRORS
from apt.efficient_finetuning import apply_lora_to_model
from apt.files.manifest import MANIFEST, write_manifest
from apt.methods import svd
from apt.runs.config import DataConfig, ModelConfig, RunConfig, load_config
from apt.runs.data import DatasetLoader
from apt.runs.models import build_model, build_tokenizer
from apt.runs.report.records import load_run
from apt.runs.report.tables import sheets
from apt.training.whole_checkpoints import check_checkpoint

SECONDS = 20  # that reading one damaged subject may take
FORBIDDEN = ("os.system", "os.exec", "os.posix_spawn", "subprocess.Popen", "socket.connect", "pickle.find_class")
ODD = (
    None,
    True,
    -1,
    0,
    3.5,
    10**18,
    float("nan"),
    "",
    "x" * 300,
    [],
    {},
    [[]],
    "\x1b]0;t\x07",
    "../../etc/passwd",
    "(",
)
DROPPED = {"target_sparsity": 0.6, "num_events": 3, "prune_end": 24, "round_to": 4}


class HungError(BaseException):
    """Reading took too long. No handler of errors sees it."""


class RanError(BaseException):
    """Something of a file was run."""


@dataclass(frozen=True)
class Subject:
    """Something that is written once, and read again and again."""

    name: str
    write: Callable[[Path], Any]  # into a folder
    read: Callable[[Path], Any]  # what it gives: tensors, texts, numbers
    has_sums: bool = True  # whether a reader can tell that another value is wrong


def _logits(model: Any) -> list[Tensor]:
    with torch.no_grad():
        return [model.eval()(**tiny_batch("bert")).logits]


def _lora() -> Any:
    return apt.patch_model(tiny_model("bert", torch.float32), method="lora", rank=2, target_modules=("q", "v"))


def _read_adapter(folder: Path) -> list[Tensor]:
    model = _lora()
    apt.load_adapter(model, folder / "a")
    return _logits(model)


def _gated() -> Any:
    small = {"rank": 2, "hyper_params": 300, "svd_cache": None}
    return apt.patch_model(tiny_model("bert", torch.float32), method="dynacsg", **small)


def _read_loop(folder: Path) -> list[Any]:
    other = Loop("bert", patched("bert"), 0)
    other.run = apt.resume_checkpoint(folder / "c", other.model, other.optimizer, **DROPPED)
    return [other.run.step, *other.model.state_dict().values(), *_logits(other.model)]


def _managed() -> Any:
    return apply_lora_to_model(tiny_model("bert", torch.float32), ["q", "v"], rank=2)


def _read_weights(folder: Path) -> list[Tensor]:
    manager = _managed()
    manager.load_efficient_weights(folder / "w.safetensors")
    return _logits(manager.model)


WEIGHT = torch.randn(256, 256, generator=torch.Generator().manual_seed(0))


def _write_trainers(folder: Path) -> None:
    """The files of a Trainer's checkpoint at toy size."""
    folder = folder / "checkpoint-12"
    from apt.training.checkpoint import save_controller

    loop = Loop("bert", patched("bert"), 30, **DROPPED).take(12)
    save_controller(loop.run, folder)
    torch.save(loop.optimizer.state_dict(), folder / "optimizer.pt")
    torch.save({"last_epoch": 12}, folder / "scheduler.pt")
    (folder / "trainer_state.json").write_text(json.dumps({"global_step": 12, "log_history": []}))
    write_manifest(folder)


def _write_data(folder: Path) -> None:
    (folder / "d").mkdir()
    write_csv(folder / "d/train.csv", sentences(40))
    rows = [json.dumps({"text": text, "label": label}) for text, label in sentences(10)]
    (folder / "d/test.jsonl").write_text("\n".join(rows), encoding="utf-8")


def _read_data(folder: Path) -> list[Any]:
    data = DatasetLoader(DataConfig(datasets=str(folder / "d")), tiny_tokenizer())
    return [len(data.train), len(data.test)]


def _base_config(folder: Path) -> RunConfig:
    data = DataConfig(datasets="none.csv")
    return RunConfig(output_dir="none", model=ModelConfig(name=str(folder), task="classification"), data=data)


def _write_base(folder: Path) -> None:
    """A model folder as the hub has them."""
    model: Any = tiny_model("bert", torch.float32, vocab_size=len(tiny_tokenizer()))
    model.bert.save_pretrained(folder / "b")
    tiny_tokenizer().save_pretrained(folder / "b")


def _read_base(path: Path) -> list[Any]:
    config = _base_config(path)
    tokenizer = build_tokenizer(config)
    model: Any = build_model(config, 2, tokenizer)
    ids = tokenizer(["a good film"]).input_ids
    with torch.no_grad():
        return [ids, model.eval()(torch.tensor(ids)).logits.shape]


def _tokens(folder: Path) -> list[Any]:
    """Rows of a table whose tokens are kept in a folder beside it; the table itself stays whole."""
    before, cache.SLOW = cache.SLOW, 0
    try:
        config = DataConfig(datasets=str(folder / "tiny/rows.csv"), test_size=4, cache=str(folder / "kept"))
        data = DatasetLoader(config, tiny_tokenizer())
    finally:
        cache.SLOW = before
    return [data.train.columns, data.test.columns]


def _write_tokens(folder: Path) -> None:
    (folder / "tiny").mkdir()
    write_csv(folder / "tiny/rows.csv", sentences(40))
    _tokens(folder)


SUBJECTS = (
    Subject(
        "export",
        lambda f: apt.export_model(fill_adapters(_lora(), 0.2), f / "e"),
        lambda f: _logits(apt.load_model(f / "e")),
    ),
    Subject("gated export", lambda f: apt.export_model(_gated(), f / "e"), lambda f: _logits(apt.load_model(f / "e"))),
    Subject("adapter", lambda f: apt.save_adapter(fill_adapters(_lora(), 0.2), f / "a"), _read_adapter),
    Subject(
        "checkpoint of a loop",
        lambda f: apt.save_checkpoint(Loop("bert", patched("bert"), 30, **DROPPED).take(12).run, f / "c"),
        _read_loop,
    ),
    Subject("checkpoint of a Trainer", _write_trainers, lambda f: check_checkpoint(f / "checkpoint-12")),
    Subject("weights", lambda f: _managed().save_efficient_weights(f / "w.safetensors"), _read_weights),
    Subject(
        "decompositions",
        lambda f: svd.singular_triplets(WEIGHT, 4, str(f)),
        lambda f: list(svd.singular_triplets(WEIGHT, 4, str(f))),
    ),
    Subject("config", lambda f: write_config(f), lambda f: [load_config(f / "config.yaml")], has_sums=False),
    Subject("record", lambda f: whole_run(f / "run"), lambda f: sheets(load_run(f / "run")), has_sums=False),
    Subject("data", _write_data, _read_data, has_sums=False),
    Subject("base", _write_base, lambda f: _read_base(f / "b"), has_sums=False),
    Subject("GGUF", lambda f: write_gguf(f / "m.gguf"), lambda f: _read_base(f / "m.gguf"), has_sums=False),
    Subject("tokens", _write_tokens, _tokens),
)


def flip_a_bit(path: Path, draw: random.Random) -> None:
    content = bytearray(path.read_bytes())
    if content:
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    path.write_bytes(content)


def cut(path: Path, draw: random.Random) -> None:
    path.write_bytes(path.read_bytes()[: draw.randrange(path.stat().st_size + 1)])


def empty_a_piece(path: Path, draw: random.Random) -> None:
    content = bytearray(path.read_bytes())
    start = draw.randrange(len(content) + 1)
    end = min(len(content), start + draw.choice((1, 16, 4096)))
    content[start:end] = bytes(end - start)
    path.write_bytes(content)


def leave_a_piece_out(path: Path, draw: random.Random) -> None:
    content = path.read_bytes()
    start = draw.randrange(len(content) + 1)
    path.write_bytes(content[:start] + content[start + draw.choice((1, 7, 512)) :])


def say_a_piece_twice(path: Path, draw: random.Random) -> None:
    content = path.read_bytes()
    start = draw.randrange(len(content) + 1)
    path.write_bytes(content[:start] + content[start : start + 64] + content[start:])


def remove(path: Path, draw: random.Random) -> None:
    path.unlink()


def take_another(path: Path, draw: random.Random) -> None:
    """The content of another file of the folder."""
    others = sorted(other for other in path.parent.iterdir() if other.is_file() and other != path)
    path.write_bytes(draw.choice(others).read_bytes() if others else b"")


def make_endless(path: Path, draw: random.Random) -> None:
    path.unlink()
    path.symlink_to("/dev/zero")


def change_a_value(path: Path, draw: random.Random) -> None:
    """Another value in the place of one of a JSON file; of any other file, a line of code to run."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        path.write_bytes(b"!!python/object/apply:os.system ['touch hacked']\ncos\nsystem\n(S'touch hacked'\ntR.")
        return
    places = list(_places(document))
    if places:
        owner, key = draw.choice(places)
        owner[key] = draw.choice(ODD)
    path.write_text(json.dumps(document), encoding="utf-8")


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    entries: Any = value.items() if isinstance(value, dict) else enumerate(value if isinstance(value, list) else ())
    for key, inner in entries:
        yield value, key
        yield from _places(inner)


DAMAGES = (
    *(flip_a_bit, cut, empty_a_piece, leave_a_piece_out, say_a_piece_twice, remove, take_another, make_endless),
    *(change_a_value, change_a_value, flip_a_bit),  # which find most
)


class Guard:
    """Sees what Python is about to run while a damaged file is read."""

    def __init__(self) -> None:
        self.on = False
        sys.addaudithook(self._see)

    def _see(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.on and event in FORBIDDEN:
            raise RanError(event)

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        def end(*_: object) -> None:
            raise HungError

        before = signal.signal(signal.SIGALRM, end)
        signal.setitimer(signal.ITIMER_REAL, SECONDS)
        self.on = True
        try:
            yield
        finally:
            self.on = False
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)


def same(ours: Any, theirs: Any) -> bool:
    if isinstance(ours, list) and isinstance(theirs, list):
        return len(ours) == len(theirs) and all(map(same, ours, theirs))
    if isinstance(ours, Tensor):
        return torch.equal(ours, theirs)
    return bool(ours == theirs)


def fault_of(subject: Subject, folder: Path, whole: Any, guard: Guard, *, listed: bool) -> str | None:
    """What is wrong with how a damaged subject was read, or None."""
    try:
        with guard.watching(), warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            found = subject.read(folder)
    except USER_ERRORS as error:
        told = str(error)
        if "\n" in told.strip() or len(told) > 1000:
            return f"more than a line: {told[:300]!r}"
        return None if str(folder) in told or not subject.has_sums else f"names no file: {told[:300]!r}"
    except HungError:
        return f"took more than {SECONDS} s"
    except (Exception, RanError) as error:
        return f"{type(error).__name__}: {str(error)[:200]}"
    checked = subject.has_sums and listed
    return "was taken, and gives something else" if checked and not same(found, whole) else None


def fuzz(folder: Path, count: int, seed: int, seconds: float, guard: Guard) -> tuple[int, list[dict[str, Any]]]:
    """Damage and read so many times, or until the time is over; how many times it was, and the faults."""
    wholes = {}
    for subject in SUBJECTS:
        (folder / subject.name).mkdir()
        with contextlib.redirect_stderr(io.StringIO()):
            subject.write(folder / subject.name)
            wholes[subject.name] = subject.read(folder / subject.name)
    faults, started, done = [], time.monotonic(), 0
    for number in range(count):
        if time.monotonic() - started > seconds:
            break
        draw = random.Random(f"{seed} {number}")
        subject = SUBJECTS[number % len(SUBJECTS)]
        copy = folder / "damaged"
        shutil.copytree(folder / subject.name, copy)
        path = draw.choice(sorted(path for path in copy.rglob("*") if path.is_file() and "tiny" not in path.parts))
        damage = draw.choice(DAMAGES)
        damage(path, draw)
        # A fifth is of a version that left no list; there a list must not be needed to refuse in one line.
        listed = bool(draw.randrange(5)) and (subject.name == "weights" or path.name != MANIFEST or path.exists())
        if not listed:
            for manifest in copy.rglob(MANIFEST):
                manifest.unlink()
        fault = fault_of(subject, copy, wholes[subject.name], guard, listed=listed)
        if fault is not None:
            told = {
                "trial": number,
                "seed": seed,
                "subject": subject.name,
                "file": path.name,
                "damage": damage.__name__,
            }
            faults.append({**told, "listed": listed, "fault": re.sub(re.escape(str(copy)), "", fault)})
        shutil.rmtree(copy)
        done += 1
    return done, faults


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path, nargs="?")
    parser.add_argument("--count", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=600.0)
    arguments = parser.parse_args()
    folder = arguments.folder or Path(tempfile.mkdtemp())
    folder.mkdir(parents=True, exist_ok=True)
    done, faults = fuzz(folder, arguments.count, arguments.seed, arguments.seconds, Guard())
    for fault in faults:
        print(json.dumps(fault))
    print(json.dumps({"trials": done, "faults": len(faults)}))
    return 1 if faults or done < arguments.count else 0


if __name__ == "__main__":
    sys.exit(main())
