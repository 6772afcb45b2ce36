"""The first run on a GPU, rehearsed on a CPU: each stage loses at most itself, and what was measured is on disk."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from bench import plan
from bench.first_gpu import runner
from bench.first_gpu.__main__ import MINUTES, RESERVE
from bench.first_gpu.runner import Runner, table
from bench.first_gpu.stages import STAGES, Job, Stage
from bench.rows import read_rows

ROOT = Path(__file__).parents[2]
PLAIN = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}


def stage(name: str, code: str, **more: object) -> Stage:
    return Stage(name, 10, "planted", lambda job: [sys.executable, "-c", code], **({"floor": 0.0} | more))


def run(stages: list[Stage], folder: Path, seconds: float) -> tuple[bool, list[dict[str, str]]]:
    folder.mkdir(exist_ok=True)
    own = Runner(folder, "cpu", "now", time.monotonic() + seconds)
    return own.run_all(stages), read_rows(folder / "stages.csv")


def ends(rows: list[dict[str, str]]) -> dict[str, str]:
    return {row["stage"]: row["status"] for row in rows if row["status"] != "begun"}


ROW = "open('row','a').write('one ')"
STUBBORN = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); print('up', flush=True); time.sleep(60)"


@pytest.mark.parametrize(
    ("code", "status", "note"),
    [
        ("raise ValueError('planted')", "failed", "ValueError: planted"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "died of SIGKILL", ""),
        ("import os; print('last words', flush=True); os.abort()", "died of SIGABRT", "last words"),
    ],
)
def test_a_stage_that_breaks_loses_itself_alone(code: str, status: str, note: str, tmp_path: Path) -> None:
    well, rows = run([stage("one", "print('fine')"), stage("two", code), stage("three", "")], tmp_path, 60.0)
    assert not well
    assert ends(rows) == {"one": "ok", "two": status, "three": "ok"}
    assert [row["status"] for row in rows if row["stage"] == "two"] == ["begun", status]
    assert next(row["note"] for row in rows if row["status"] == status) == note


@pytest.mark.parametrize(
    ("code", "status"), [("import time; time.sleep(60)", "stopped"), (STUBBORN, "killed")], ids=["stops", "ignores"]
)
def test_a_stage_that_hangs_is_ended_at_its_limit(
    code: str, status: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner, "LEAST", 0.1)
    started = time.monotonic()
    well, rows = run([stage("one", code, grace=0.5), stage("two", "print('fine')")], tmp_path, 4.0)
    assert (well, ends(rows)) == (False, {"one": status, "two": "ok"})
    assert 1.0 < float(rows[1]["seconds"]) < 3.0
    assert time.monotonic() - started < 4.5


def test_what_a_stage_has_started_dies_with_it(tmp_path: Path) -> None:
    child = "import time; time.sleep(60)"
    code = f"import subprocess, sys; print(subprocess.Popen([sys.executable, '-c', {child!r}]).pid, flush=True)"
    _, rows = run([stage("one", code)], tmp_path, 20.0)
    assert ends(rows) == {"one": "ok"}
    assert not is_alive(int(rows[-1]["note"]))


def test_what_the_time_forbids_is_unmeasured_and_what_is_left_goes_on(tmp_path: Path) -> None:
    assert ends(run([stage("one", "")], tmp_path / "none", 1.0)[1]) == {"one": "unmeasured"}
    _, rows = run([stage("one", ""), stage("two", "")], tmp_path / "two", 40.0)
    limits = [int(row["note"].split()[2]) for row in rows if row["status"] == "begun"]
    assert limits[0] == pytest.approx(20, abs=1)
    assert limits[1] > 35
    _, rows = run([stage("one", "", floor=25.0), stage("two", "")], tmp_path / "floor", 40.0)
    assert next(int(row["note"].split()[2]) for row in rows if row["status"] == "begun") == 25


def test_half_a_file_of_a_killed_stage_goes(tmp_path: Path) -> None:
    code = f"open({str(tmp_path / 'rows.csv.partial')!r}, 'w').write('half'); open({str(tmp_path / 'rows.csv')!r}, 'w')"
    run([stage("one", code)], tmp_path, 20.0)
    assert {path.name for path in tmp_path.iterdir()} == {"rows.csv", "stages.csv"}


def is_alive(pid: int) -> bool:
    """Whether a process runs; one that has ended and that nobody has asked for does not."""
    status = Path(f"/proc/{pid}/stat")
    for _ in range(100):
        if not status.exists() or status.read_text().rpartition(")")[2].split()[0] == "Z":
            return False
        time.sleep(0.02)
    return True


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM], ids=["SIGKILL", "SIGTERM"])
def test_a_run_that_is_killed_leaves_what_was_finished_and_no_process(how: signal.Signals, tmp_path: Path) -> None:
    code = f"""
import signal, sys, time
from pathlib import Path
from bench.first_gpu.runner import Runner, interrupted
from bench.first_gpu.stages import Stage
signal.signal(signal.SIGTERM, interrupted)
sleeps = "import os, time; print('pid', os.getpid(), flush=True); time.sleep(60)"
planted = {{"one": "print(1)", "two": sleeps}}
stages = [Stage(name, 10, "", lambda job, code=code: [sys.executable, "-c", code]) for name, code in planted.items()]
Runner(Path({str(tmp_path)!r}), "cpu", "now", time.monotonic() + 100).run_all(stages)
"""
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        pid = next(int(line.split()[1]) for line in process.stdout if line.startswith("pid "))
        process.send_signal(how)
        process.wait()
    rows = read_rows(tmp_path / "stages.csv")
    assert [(row["stage"], row["status"]) for row in rows[:3]] == [("one", "begun"), ("one", "ok"), ("two", "begun")]
    assert [row["status"] for row in rows[3:]] == (["interrupted"] if how == signal.SIGTERM else [])
    assert not is_alive(pid)


def test_the_command_from_beginning_to_end(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "bench", "first_gpu", "--device", "cpu", "--minutes", "3", "--out", str(tmp_path)]
    command += ["--stages", "facts", "ahead", "profile", "tiles"]
    done = subprocess.run(command, cwd=ROOT, env=PLAIN, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert ends(read_rows(tmp_path / "stages.csv")) == dict.fromkeys(("facts", "ahead", "profile", "tiles"), "ok")
    assert {path.name for path in tmp_path.iterdir()} == {"facts.json", "kernels.csv", "kernels.md", "stages.csv"}
    rows = read_rows(tmp_path / "kernels.csv")
    assert len({row["run"] for row in rows}) == 1
    assert {row["op"] for row in rows if row["what"] == "profile"} >= {"masked_lora_linear", "gated_activation"}
    assert all(float(row["us"]) > 0 and float(row["calls"]) >= 1 for row in rows if row["what"] == "profile")
    assert {row["status"] for row in rows if row["case"].startswith(("sweep", "compile"))} == {"unavailable", "done"}
    assert "A rehearsal at toy sizes" in (tmp_path / "kernels.md").read_text(encoding="utf-8")
    assert json.loads((tmp_path / "facts.json").read_text(encoding="utf-8"))["torch"] == torch.__version__
    assert done.stdout.rstrip().endswith("no figure in it means anything")


def test_the_stages_fit_into_nine_minutes_and_leave_eight_files(tmp_path: Path) -> None:
    assert sum(stage.seconds for stage in STAGES) <= 60 * MINUTES["cuda"] - RESERVE
    assert len({stage.name for stage in STAGES}) == len(STAGES)
    job = Job(folder=tmp_path, device="cuda", run="now", minutes=1.0)
    for each in STAGES:
        module = each.command(job)[2]
        assert importlib.util.find_spec(module) is not None, module
    words = [Path(word) for each in STAGES for word in each.command(job)]
    named = {word.name for word in words if word.suffix in (".csv", ".json", ".xml")}
    outputs = {each.output for each in STAGES if each.output}
    # Beside those: kernels.csv, kernels.md, stages.csv and the table of the device.
    assert named | outputs == {"facts.json", "train_step.csv", "gpu-tests.xml", "gpu-tests.txt"}


def test_a_wrong_name_says_what_there_is() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "bench", "kernel"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "no benchmark 'kernel'" in done.stderr
    assert all(f"\n  {name} " in done.stderr for name in ("kernels", "first_gpu", "train_step", "report"))
    assert "\n  timing " not in done.stderr  # no command


def test_one_function_names_the_folder_of_a_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OUT", raising=False)
    assert plan.results("cost") == Path("bench/results/cpu/cost.csv")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200 (141 GB)")
    assert plan.results("cost") == Path("bench/results/nvidia-h200-141-gb/cost.csv")
    assert plan.machine("cpu") == "cpu"
    typed = [
        path for path in (ROOT / "bench").rglob("*.py") if 'Path("bench/results' in path.read_text(encoding="utf-8")
    ]
    assert sorted(path.name for path in typed) == ["plan.py", "report.py"]


def test_the_table_shows_how_each_stage_ended(tmp_path: Path) -> None:
    run([stage("one", "print('fine')"), stage("two", "raise SystemExit(2)")], tmp_path, 60.0)
    lines = table(tmp_path / "stages.csv", "now").splitlines()[1:]
    assert [line.split()[:2] for line in lines] == [["one", "ok"], ["two", "failed"]]
