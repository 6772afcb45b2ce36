"""What is written aside appears whole or not at all: writers killed at every moment of giving a name to a folder."""

import os
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import fill_adapters, tiny_batch, tiny_model
from torch import Tensor, nn

import apt
from apt.files.manifest import MANIFEST
from apt.files.whole import mark, partial_of, replaced_of, write_file_aside, write_folder_aside
from apt.runs.run_folder import METRICS, publish_run


class Killed(BaseException):
    """Ends a writer as a signal does: no handler of errors sees it."""


class Trap:
    """Kills a writer before, halfway through or after the n-th renaming or removal."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
        self.left = number
        for owner, name in ((os, "rename"), (os, "replace"), (shutil, "rmtree")):
            monkeypatch.setattr(owner, name, self._around(getattr(owner, name), name))

    def _around(self, original: Callable[..., Any], name: str) -> Callable[..., Any]:
        def wrapped(path: Any, *args: Any, **kwargs: Any) -> Any:
            if name == "rmtree" and not Path(path).exists():
                return original(path, *args, **kwargs)
            self._pass()
            if self.left == 0 and name == "rmtree":
                next(file for file in sorted(Path(path).rglob("*")) if file.is_file()).unlink()
            self._pass()
            done = original(path, *args, **kwargs)
            self._pass()
            return done

        return wrapped

    def _pass(self) -> None:
        if self.left == 0:
            raise Killed
        self.left -= 1


def patched(std: float) -> nn.Module:
    model = apt.patch_model(tiny_model("bert", torch.float32), method="lora", rank=2, target_modules=("q", "v"))
    return fill_adapters(model, std)


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model.eval()(**tiny_batch("bert")).logits


def of_export(folder: Path) -> Tensor:
    return logits(apt.load_model(folder))


def of_adapter(folder: Path) -> Tensor:
    model = apt.patch_model(tiny_model("bert", torch.float32), method="lora", rank=2, target_modules=("q", "v"))
    apt.load_adapter(model, folder)
    return logits(model)


@pytest.mark.parametrize(
    ("write", "read"),
    [(apt.export_model, of_export), (apt.save_adapter, of_adapter)],
    ids=["export_model", "save_adapter"],
)
def test_a_kill_leaves_the_old_folder_or_the_new_one(
    write: Callable[..., Path], read: Callable[[Path], Tensor], tmp_path: Path
) -> None:
    models = patched(0.2), patched(0.5)
    kept = [write(model, tmp_path / name) for model, name in zip(models, ("old", "new"), strict=True)]
    old, new = (read(folder) for folder in kept)
    assert not torch.allclose(old, new, atol=1e-3)
    outcomes = []
    for number in range(100):
        folder = tmp_path / f"{number}" / "model"
        shutil.copytree(kept[0], folder)
        with pytest.MonkeyPatch.context() as monkeypatch:
            Trap(monkeypatch, number)
            try:
                write(models[1], folder, overwrite=True)
                killed = False
            except Killed:
                killed = True
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            found = read(folder)
        assert torch.equal(found, old) or torch.equal(found, new)
        outcomes.append("old" if torch.equal(found, old) else "new")
        if not folder.exists():
            assert any(str(replaced_of(folder)) in str(warning.message) for warning in told)
            with (
                pytest.warns(match="was stopped"),
                pytest.raises(ValueError, match=r"model\.replaced exists; .*overwrite=True"),
            ):
                write(models[1], folder)
            outcomes[-1] += " beside it"
        write(models[1], folder, overwrite=True)
        assert torch.equal(read(folder), new)
        assert [path.name for path in folder.parent.iterdir()] == ["model"]
        if not killed:
            break
    assert list(dict.fromkeys(outcomes)) == ["old", "old beside it", "new"]


def test_an_error_leaves_no_temporary_name(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("old")

    def fill_the_disk(path: Path) -> None:
        path.write_text("ne")
        raise OSError("full")

    with pytest.raises(OSError, match="full"), write_file_aside(tmp_path / "file") as partial:
        fill_the_disk(partial)
    with pytest.raises(OSError, match="full"), write_folder_aside(tmp_path / "folder", "part") as partial:
        fill_the_disk(partial / "part")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_text() == "old"


def test_two_processes_that_write_one_file_have_a_temporary_name_each(tmp_path: Path) -> None:
    path = tmp_path / "cache" / "entry"
    with write_file_aside(path, shared=True) as partial:
        assert str(os.getpid()) in partial.name
        partial.write_text("ours")
    assert path.read_text() == "ours"
    assert list(path.parent.iterdir()) == [path]


def test_what_a_kill_left_under_the_temporary_name_is_in_nobodys_way(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    mark(partial_of(folder))
    (partial_of(folder) / "half").write_text("ha")
    with write_folder_aside(folder, "whole") as partial:
        (partial / "whole").write_text("whole")
    assert sorted(path.name for path in folder.iterdir()) == [MANIFEST, "whole"]
    assert list(tmp_path.iterdir()) == [folder]


def test_a_link_is_replaced_and_what_it_leads_to_stays(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "mine").write_text("mine")
    folder = tmp_path / "link"
    folder.symlink_to(tmp_path / "elsewhere")
    with write_folder_aside(folder, "mine") as partial:
        (partial / "whole").write_text("whole")
    assert sorted(path.name for path in folder.iterdir()) == [MANIFEST, "whole"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["elsewhere", "link"]
    assert (tmp_path / "elsewhere" / "mine").read_text() == "mine"


def test_a_run_takes_the_place_of_a_run_only(tmp_path: Path) -> None:
    """What was put under its name while it ran is no run, and stays."""
    partial, output = tmp_path / "run.partial", tmp_path / "run"
    for folder, name in ((partial, METRICS), (output, "thesis.txt")):
        folder.mkdir()
        (folder / name).write_text("{}")
    with pytest.raises(OSError, match="not empty"):
        publish_run(partial, output)
    assert (partial / METRICS).exists()
    (output / "thesis.txt").rename(output / METRICS)
    publish_run(partial, output)
    assert list(tmp_path.iterdir()) == [output]
