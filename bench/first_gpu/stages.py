"""The stages of the first run on a GPU, in their order, with what each may take of the nine minutes.

The order is that of worth. Kernels first, as the benchmark judges each against float64 itself and needs no tests before
it; then what says why a goal is missed (profile, tiles) and what a user would feel (a step); the tests and the table
last, since both can be had again at any time.
"""

import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

TESTS = ("tests/kernels", "-m", "gpu or not slow", "-q", "--ignore-glob=*ahead*", "--ignore-glob=*compile_counts*")
TOY_CONTESTANTS = ("peft lora", "frozen", "apt lora by torch", "apt lora by triton", "apt 60% by torch")
TOY_SHAPES = ("toy llama", "toy bert")


@dataclass(frozen=True, kw_only=True)
class Job:
    """What the command of a stage is made from."""

    folder: Path
    device: str  # cuda or cpu
    run: str  # that the rows belong to
    minutes: float  # after which the stage begins nothing new
    workers: int = 12  # processes of the tests


def kernels(*mode: str) -> Callable[[Job], list[str]]:
    def command(job: Job) -> list[str]:
        shared = [f"--device={job.device}", f"--out={job.folder}", f"--run={job.run}", f"--minutes={job.minutes:.3f}"]
        return [sys.executable, "-m", "bench.kernels", *mode, *shared]

    return command


def facts(job: Job) -> list[str]:
    return [sys.executable, "-m", "bench.first_gpu.facts", str(job.folder / "facts.json")]


def step(job: Job) -> list[str]:
    command = [sys.executable, "-m", "bench.train_step", "--together", f"--minutes={job.minutes:.3f}"]
    command += [f"--out={job.folder / 'train_step.csv'}"]
    if job.device == "cuda":
        return [*command, "--dtype=bfloat16", "--runs=7", "--seconds=6"]
    toys = ["--shapes", *TOY_SHAPES, "--contestants", *TOY_CONTESTANTS]
    return [*command, "--dtype=float32", "--runs=5", "--seconds=3", *toys]


def tests(job: Job) -> list[str]:
    """The tests of the kernels, side by side where pytest can; compiling ahead for other machines needs none."""
    apart = ["-n", str(job.workers), "--dist=worksteal"] if importlib.util.find_spec("xdist") else []
    report = [f"--junitxml={job.folder / 'gpu-tests.xml'}", "-p", "no:cacheprovider"]
    return [sys.executable, "-m", "pytest", *TESTS, *apart, *report]


@dataclass(frozen=True)
class Stage:
    """A process of its own: what it loses when it fails is itself."""

    name: str
    seconds: float  # of nine minutes; what a stage leaves goes to those after it
    what: str
    command: Callable[[Job], list[str]]
    output: str = ""  # file that keeps what it prints
    grace: float = 8.0  # seconds between the interrupt and the kill, to write reports in
    floor: float = 25.0  # seconds it gets even where its share is less: a cold disk gives torch slowly


STAGES = (
    Stage("facts", 10, "device, driver, versions, clocks", facts),
    Stage("ahead", 45, "compile in threads what the next three launch", kernels("--ahead")),
    Stage("kernels", 150, "every op against float64, then timed", kernels("--quick")),
    Stage("profile", 25, "what each kernel of an op takes", kernels("--profile")),
    Stage("tiles", 30, "other tiles for the kernels of rank R", kernels("--sweep")),
    Stage("step", 120, "a training step of a decoder and an encoder", step),
    Stage("tests", 100, "the tests of the kernels", tests, output="gpu-tests.txt", grace=15.0),
    Stage("tune", 40, "the table that selection reads", kernels("--tune")),
)
