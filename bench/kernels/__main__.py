"""Run the cases, or tune.

``python -m bench.kernels [--tune] [--quick] [--out FOLDER] [--device cuda|cpu] [--only REGEX] [--minutes 6]``

Writes ``kernels.csv`` and, drawn from it, ``kernels.md``. Status 1: something was wrong or failed.
"""

import argparse
import os
import re
import sys
import time
from datetime import datetime, timezone
from pathlib import Path

import torch

from bench.kernels.goals import table
from bench.kernels.plan import FULL, TOY, plan
from bench.kernels.session import BAD, Session
from bench.kernels.tune import TABLES, tune
from bench.rows import environment
from bench.timing import Clock


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="bench.kernels", description=__doc__)
    parser.add_argument("--tune", action="store_true", help="write the table of the fastest implementations instead")
    parser.add_argument("--quick", action="store_true", help="the most important cases, fewer runs of each")
    parser.add_argument("--out", type=Path, help="folder; else OUT, else bench/results/<device>")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--only", type=re.compile, default=re.compile(""), help="names of cases, a regular expression")
    parser.add_argument("--minutes", type=float, default=6.0, help="after which no other case is begun")
    parser.add_argument("--resume", default="", help=argparse.SUPPRESS)  # run@deadline, of a run that goes on
    return parser.parse_args(arguments)


def start(options: argparse.Namespace) -> Session:
    device = torch.device(options.device)
    facts = environment()
    if device.type == "cpu":
        facts["device"] = f"cpu x{torch.get_num_threads()}"
    run, _, deadline = options.resume.partition("@")
    facts["run"] = run or datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")
    slug = re.sub(r"\W+", "-", facts["device"].lower()).strip("-")
    # Figures of toy sizes are no results.
    default = Path("bench/results") / slug if device.type == "cuda" else Path("bench/scratch/kernels")
    folder = options.out or (Path(os.environ["OUT"]) if os.environ.get("OUT") else default)
    if options.tune or options.quick:
        clock = Clock(device, runs=20, seconds=2.0) if device.type == "cuda" else Clock(device, runs=3, warmup=1)
    else:
        clock = Clock(device)
    end = float(deadline) if deadline else time.time() + 60 * options.minutes
    name = "tune.csv" if options.tune else "kernels.csv"
    return Session(device, clock, folder / name, facts, end, resumed=bool(run))


def measure_all(session: Session, options: argparse.Namespace) -> None:
    """Every case in order; those that the time does not allow are named."""
    sizes = FULL if session.device.type == "cuda" else TOY
    # A case that brought the device down as a whole is not tried again.
    done = {row["case"] for row in session.rows if not row["implementation"] and row["status"] in ("done", "failed")}
    for name, measure in plan(sizes, quick=options.quick):
        if not options.only.search(name) or name in done:
            continue
        if session.over():
            session.write([{"case": name, "implementation": "", "status": "unmeasured", "note": "the time was up"}])
            continue
        started = time.time()
        try:
            measure(session)
        except Exception as error:  # a case must not take the others with it; its row says what it was
            session.failed(name, "", error)
        seconds = time.time() - started
        session.write([{"case": name, "implementation": "", "status": "done", "value": round(seconds, 2), "unit": "s"}])
        print(f"{seconds:6.1f} s  {name}", flush=True)
        draw(session)
        if session.device.type == "cuda":
            torch.cuda.empty_cache()


def draw(session: Session) -> None:
    session.path.with_suffix(".md").write_text(table(session.rows), encoding="utf-8")


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    session = start(options)
    return run(session, options)


def run(session: Session, options: argparse.Namespace) -> int:
    if options.tune:
        device = session.facts["device"]
        elsewhere = options.out or os.environ.get("OUT") or session.device.type == "cpu"
        path = (session.path.parent if elsewhere else TABLES) / (device.replace(" ", "_") + ".json")
        tune(session, path, options.only)
        print(path)
    else:
        measure_all(session, options)
        draw(session)
        print(session.path.with_suffix(".md").read_text(encoding="utf-8").partition("## Times")[0])
    bad = [row for row in session.rows if row["status"] in BAD]
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
