"""Folders that cannot be written and disks that are full: one line says so, and nothing gets its final name."""

import errno
import os
import resource
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tiny_run import tiny_tokenizer, write_config

from apt.cli import main
from apt.files import whole as files
from apt.runs import measure, run
from apt.training.trainer import APTrainer

SIZES: dict[str, dict[str, Any]] = {
    "training": {"max_steps": 20, "save_steps": 8, "logging_steps": 50},
    "evaluation": {"event_timing_steps": 0, "inference_repeats": 1},
}


def mounted(folder: Path, options: str) -> bool:
    """Whether a file system of its own could be mounted: the tests must also run where they may not do that."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    try:
        return subprocess.run(command, capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        return False


class SmallDisk:
    """A disk of 4 MB. Where none may be mounted, a limit on the size of files stands in: it stops every library in
    the middle of a file, by the same calls of the system, with EFBIG for ENOSPC."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.is_mounted = folder, mounted(folder, "size=4m")
        self.filler, self.limit = folder / "filler", resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill(self, left: int) -> None:
        """Leave room for so many bytes: for all files together, or for each of them."""
        if not self.is_mounted:
            return resource.setrlimit(resource.RLIMIT_FSIZE, (left, self.limit[1]))
        with self.filler.open("wb", buffering=0) as file:
            file.write(bytes(shutil.disk_usage(self.folder).free - left))

    def free(self) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, self.limit)
        self.filler.unlink(missing_ok=True)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[SmallDisk]:
    disk = SmallDisk(tmp_path / "disk")
    yield disk
    disk.free()
    if disk.is_mounted:
        subprocess.run(["umount", "-l", str(disk.folder)], check=True)  # a test that fails may hold a file


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """What a command says before it ends as after an error of the user: one line."""
    capsys.readouterr()
    assert main([str(argument) for argument in arguments]) == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    assert error.count("apt: error: ") == 1
    return error.splitlines()[-1]


@pytest.mark.parametrize(
    ("owner", "name", "left"),
    [
        (APTrainer, "_save_checkpoint", 4096),  # the weights, by safetensors
        (APTrainer, "_save_checkpoint", 140_000),  # the optimizer, by torch
        (measure, "export_model", 4096),
        (run, "write_card", 0),
        (run, "write_json", 0),
    ],
    ids=["checkpoint", "optimizer", "export", "card", "metrics"],
)
def test_a_disk_that_is_full(
    owner: Any,
    name: str,
    left: int,
    small_disk: SmallDisk,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config, output = write_config(tmp_path, **SIZES), small_disk.folder / "run"
    original: Callable[..., Any] = getattr(owner, name)

    def on_a_full_disk(*args: Any, **kwargs: Any) -> Any:
        if not small_disk.filler.exists():
            small_disk.fill(left)
        return original(*args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(owner, name, on_a_full_disk)
        error = refused(capsys, "train", config, f"output_dir={output}")
    small_disk.free()
    assert f"train: {output}.partial cannot be written: " in error
    assert "free space there" in error
    assert "--resume" in error
    assert {path.name for path in small_disk.folder.iterdir()} == {"run.partial"}
    partial = output.with_name("run.partial")
    assert not (partial / "metrics.json").exists()
    if name == "_save_checkpoint":
        assert {path.name for path in (partial / "checkpoints").iterdir()} <= {"checkpoint.partial"}
    if name == "export_model":
        assert not (partial / "model").exists()
    if name == "write_json":  # with room again it goes on, and is the run that it would have been
        assert main(["train", str(config), f"output_dir={output}", "--resume"]) == 0
        assert main(["train", str(config), f"output_dir={tmp_path / 'whole'}"]) == 0
        files = [(run_folder / "metrics.json").read_bytes() for run_folder in (output, tmp_path / "whole")]
        assert files[0] == files[1]


def test_a_folder_under_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = write_config(tmp_path)
    (tmp_path / "thesis.txt").write_text("mine", encoding="utf-8")
    error = refused(capsys, "train", config, f"output_dir={tmp_path / 'thesis.txt' / 'run'}")
    assert error.endswith(f"as {tmp_path / 'thesis.txt'} is no folder; give another output_dir")
    grid = tmp_path / "grid.yaml"
    grid.write_text(f"output_dir: {tmp_path / 'thesis.txt' / 'grid'}\nconfig: {config}\n", encoding="utf-8")
    assert f"as {tmp_path / 'thesis.txt'} is no folder" in refused(capsys, "experiment", grid)
    assert (tmp_path / "thesis.txt").read_text(encoding="utf-8") == "mine"


def test_a_folder_that_may_not_be_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Said before a model is read. Rights do not bind root, so it is a disk mounted for reading, if that is allowed."""
    config, folder = write_config(tmp_path), tmp_path / "read_only"
    is_mounted = mounted(folder, "ro")
    try:
        if not is_mounted:
            folder.chmod(0o500)
            if os.access(folder, os.W_OK):  # root, who may not mount: the answer of the system is all that is left
                monkeypatch.setattr(files.os, "access", lambda path, mode: Path(path) != folder)
        error = refused(capsys, "train", config, f"output_dir={folder / 'deep' / 'run'}", "model=./nowhere")
        assert error == (
            f"apt: error: train: {folder / 'deep' / 'run.partial'} cannot be written, as {folder} may not be written; "
            "give another output_dir"
        )
        assert not list(folder.iterdir())
    finally:
        if is_mounted:
            subprocess.run(["umount", "-l", str(folder)], check=True)


def test_the_page_of_a_report(
    small_disk: SmallDisk, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from run_records import whole_run

    folder = whole_run(small_disk.folder / "run")
    small_disk.fill(0)
    error = refused(capsys, "report", folder)
    small_disk.free()
    assert f"report: {folder} cannot be written: " in error
    assert not list(folder.rglob("*.png"))
    assert not list(folder.rglob("*.html"))


def test_which_errors_are_of_writing(small_disk: SmallDisk, tmp_path: Path) -> None:
    """Each library that writes for a run tells it in its own way; what is no error of writing there passes."""
    small_disk.fill(0)
    writers: list[Callable[[Path], object]] = [
        lambda path: path.write_bytes(bytes(100_000)),
        lambda path: torch.save(torch.zeros(100_000), path),
        lambda path: save_file({"x": torch.zeros(100_000)}, path),
        lambda path: tiny_tokenizer().backend_tokenizer.save(str(path)),
    ]
    for number, write in enumerate(writers):
        told = pytest.raises(OSError, match=r"room: .* cannot be written: .*; do this$")
        with told as caught, files.writing(small_disk.folder, "room", "do this"):
            write(small_disk.folder / f"file{number}")
        assert caught.value.__cause__ is not None
    others = (
        ValueError("of the user"),
        PermissionError(errno.EACCES, "denied", str(tmp_path / "data.csv")),
        FileNotFoundError(errno.ENOENT, "not there", str(small_disk.folder / "x")),
    )
    for error in others:
        with pytest.raises(type(error)) as same, files.writing(small_disk.folder, "room", "do this"):
            raise error
        assert same.value is error
