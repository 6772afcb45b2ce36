"""The first run on a GPU: ``python3 -m bench first_gpu [--out FOLDER] [--device cuda|cpu] [--minutes 9]``.

At most nine minutes, the most valuable first, and every row on disk as soon as it exists. It needs torch, triton,
transformers, peft and pytest, and runs from the source tree. With ``--device cpu`` it is a rehearsal at toy sizes: the
commands are the same, the figures mean nothing and go to a scratch folder. Status 1: a stage did not end well.
"""

import argparse
import signal
import sys
import time
from datetime import datetime, timezone
from pathlib import Path

import torch

from bench.first_gpu.runner import Runner, interrupted, table
from bench.first_gpu.stages import STAGES
from bench.plan import rehearsal_folder, results_folder

MINUTES, WORKERS = {"cuda": 9.0, "cpu": 3.0}, {"cuda": 12, "cpu": 1}
RESERVE = 8.0  # seconds for what is no stage: the start, and the end of this process


def options(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="bench.first_gpu", description=__doc__)
    names = [stage.name for stage in STAGES]
    parser.add_argument("--out", type=Path, help="folder; else OUT, else that of this machine in bench/results")
    parser.add_argument("--device", choices=list(MINUTES), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--minutes", type=float, help="of all together; 9, in a rehearsal 3")
    parser.add_argument("--stages", nargs="+", choices=names, default=names, help="these alone, in their own order")
    parser.add_argument("--workers", type=int, help="processes of the tests; 12, in a rehearsal 1")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    begun = time.monotonic()
    given = options(arguments)
    rehearsal = given.device == "cpu"
    folder = given.out or (rehearsal_folder("first_gpu") if rehearsal else results_folder())
    folder = folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    run = datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")
    deadline = begun + 60 * (given.minutes or MINUTES[given.device]) - RESERVE
    runner = Runner(folder, given.device, run, deadline, given.workers or WORKERS[given.device])
    signal.signal(signal.SIGTERM, interrupted)
    try:
        well = runner.run_all([stage for stage in STAGES if stage.name in given.stages])
    finally:
        print(f"\n{table(folder / 'stages.csv', run)}\n\nrows: {folder}", flush=True)
        if rehearsal:
            print("a rehearsal at toy sizes on a CPU: no figure in it means anything", flush=True)
    return 0 if well else 1


if __name__ == "__main__":
    sys.exit(main())
