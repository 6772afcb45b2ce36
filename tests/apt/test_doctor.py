"""What the doctor finds, in this process and in ones that are broken on purpose."""

import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import apt_kernels
from apt import doctor
from apt.cli import main
from apt.doctor import NEEDED, OPTIONAL, PYTHON, Finding, backend, diagnose, gpu, import_name, processor, versions
from apt_kernels import selection

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")


def shell(code: str, cwd: Path, *paths: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths)), **variables}
    command = [sys.executable, "-c", code]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)


def package(folder: Path, name: str = "apt", text: str = "") -> Path:
    (folder / name).mkdir(parents=True)
    (folder / name / "__init__.py").write_text(text, encoding="utf-8")
    return folder


def test_a_run_can_work_here(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("APT_BACKEND", raising=False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert main(["doctor"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "a run can work here"
    found = {finding.subject: finding for finding in diagnose()}
    assert found["torch"].found == torch.__version__
    assert found["CPU"].advice is None
    assert found["backend on cpu"] == Finding("backend on cpu", "torch: kernels need a GPU")


def test_what_is_needed_is_what_the_distribution_asks_for() -> None:
    text = (ROOT / "setup.py").read_text(encoding="utf-8")
    needs = text.partition("install_requires")[2].partition("]")[0]
    asked = dict(re.findall(r"""["']([\w-]+)(?:>=([\d.]+))?[^"']*["'],""", needs.replace('"Linux"', "Linux")))
    assert asked.pop("triton")
    assert asked == NEEDED
    assert f'python_requires=">={PYTHON}"' in text


def test_versions_that_are_old_or_missing() -> None:
    good = {name: least or "1" for name, least in NEEDED.items()}
    assert not any(finding.broken for finding in versions(good, "3.10.0"))
    assert [f.subject for f in versions(good, "3.9.18") if f.broken] == ["python"]
    old = versions({**good, "torch": "2.5.1+cu121", "transformers": "5.9.3"}, "3.11.0")
    assert [(f.subject, f.advice) for f in old if f.broken] == [
        ("torch", "pip install 'torch>=2.6'"),
        ("transformers", "pip install 'transformers>=5.15'"),
    ]
    del good["tqdm"]
    missing = versions(good, "3.11.0")
    assert [(f.subject, f.found, f.advice) for f in missing if f.broken] == [("tqdm", "missing", "pip install tqdm")]
    assert {f.subject for f in missing if f.advice and not f.broken} == set(OPTIONAL)


def test_the_clash_of_names(tmp_path: Path) -> None:
    system, here = package(tmp_path / "dist-packages"), str(ROOT)
    assert import_name([here, here]) == [Finding("import apt", str(ROOT / "apt"))]
    hidden = import_name([here, here, str(system)])
    assert [f.found for f in hidden] == [str(ROOT / "apt"), f"{system / 'apt'} is hidden by ours"]
    first = import_name([here, str(system), here])
    assert [f.found for f in first[1:]] == [f"{system / 'apt'} hides ours from scripts that lie elsewhere"]
    alone = import_name([here, str(system)])
    assert "from the present folder alone" in alone[1].found
    assert "hides ours" in alone[2].found
    assert all(f.advice and not f.broken for f in [*hidden[1:], *first[1:], *alone[1:]])


def test_another_apt_in_its_place_is_told_by_the_command(tmp_path: Path) -> None:
    system = package(tmp_path / "dist-packages")
    code = "import sys, apt_lm; sys.exit(apt_lm.main())"
    hidden = shell(code, tmp_path, system, ROOT)
    assert hidden.returncode == 2
    assert str(system / "apt" / "__init__.py") in hidden.stderr
    assert "virtual environment" in hidden.stderr
    assert "Traceback" not in hidden.stderr
    found = shell("import sys, apt_lm; sys.argv[1:] = ['nothing']; sys.exit(apt_lm.main())", tmp_path, ROOT, system)
    assert "invalid choice" in found.stderr


def test_a_torch_that_is_broken(tmp_path: Path) -> None:
    folder = package(tmp_path / "broken", "torch", "raise ImportError('libcudart.so.12: cannot open')")
    done = shell("import sys; from apt.cli import main; sys.exit(main(['doctor']))", tmp_path, folder, ROOT)
    assert done.returncode == 1, done.stderr
    assert "broken: import torch: libcudart.so.12: cannot open: install torch again" in done.stdout
    assert done.stdout.splitlines()[-1] == "a run cannot work here"


def test_it_prints_without_rich(tmp_path: Path) -> None:
    folder = package(tmp_path / "broken", "rich", "raise ImportError('no rich')")
    done = shell("import sys; from apt.cli import main; sys.exit(main(['doctor']))", tmp_path, folder, ROOT)
    assert "python: " in done.stdout, done.stderr
    assert "a run can" in done.stdout


def test_threads_beyond_the_cores() -> None:
    assert "at most" in str(processor(1000).advice)
    assert processor(1).advice is None


def test_a_backend_that_is_forced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selection._triton, "interpreted", lambda: False)
    x = torch.ones(1, 2)
    for forced in ("triton", "split_cublas", "nothing"):
        monkeypatch.setenv("APT_BACKEND", forced)
        found = backend(CPU, default=True)
        assert found.broken
        assert found.advice == "unset APT_BACKEND"
        assert not backend(CPU, default=False).broken
        with pytest.raises(ValueError, match=f"backend '{forced}' is not available"):  # as a run would say
            apt_kernels.column_sums(x) if forced != "split_cublas" else apt_kernels.masked_lora_linear(
                x, torch.ones(3, 2), torch.ones(1, 2), torch.ones(3, 1), scale=1.0
            )
    monkeypatch.setenv("APT_BACKEND", "torch")
    assert backend(CPU, default=True) == Finding("backend on cpu", "torch: APT_BACKEND=torch forces it")


def test_a_gpu_with_and_without_a_table(monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.device("cuda", 0)
    properties = SimpleNamespace(name="Card 9", total_memory=int(48e9), major=9, minor=0)
    monkeypatch.delenv("APT_BACKEND", raising=False)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(selection._triton, "INSTALLED", True)
    assert gpu(device) == Finding("GPU 0", "Card 9, 48.0 GB, sm_90, no measured table")
    assert backend(device, default=True).found == "torch: no table of measurements for Card 9"
    assert "bench.kernels --tune" in str(backend(device, default=True).advice)
    monkeypatch.setitem(selection.TABLES, "Card 9", {"implementations": {"a": "triton", "b": "torch"}})
    assert gpu(device).found.endswith(", measured table")
    assert backend(device, default=True) == Finding(
        "backend on cuda:0", "triton: by the table of Card 9: at 1 of 2 shapes"
    )
    monkeypatch.setattr(selection._triton, "INSTALLED", False)
    assert backend(device, default=True).found == "torch: triton is not installed"


def test_the_interpreter_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert [f.advice for f in doctor.diagnose() if f.subject == "TRITON_INTERPRET"] == ["unset it to train"]
