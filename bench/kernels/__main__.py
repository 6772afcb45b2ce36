"""Judge and time the cases; or compile them ahead, profile them, try other tiles, or tune.

``python -m bench.kernels [--ahead|--profile|--sweep|--tune] [--quick] [--out FOLDER] [--device cuda|cpu]
[--only REGEX] [--minutes 6]``

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

from bench.kernels.ahead import compile_ahead
from bench.kernels.page import table
from bench.kernels.plan import FULL, TOY, Plan, plan, profile_plan, sweep_plan
from bench.kernels.session import BAD, Session
from bench.kernels.tune import TABLES, tune
from bench.plan import rehearsal_folder, results_folder
from bench.rows import environment
from bench.timing import Clock


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="bench.kernels", description=__doc__)
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument("--ahead", action="store_true", help="compile in threads what the others launch, and no more")
    instead.add_argument("--profile", action="store_true", help="what each kernel of an op takes, by torch's profiler")
    instead.add_argument("--sweep", action="store_true", help="other tiles for the kernels of rank R")
    instead.add_argument("--tune", action="store_true", help="write the table of the fastest implementations")
    parser.add_argument("--quick", action="store_true", help="the most important cases, fewer runs of each")
    parser.add_argument("--out", type=Path, help="folder; else OUT, else bench/results/<device>")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--only", type=re.compile, default=re.compile(""), help="names of cases, a regular expression")
    parser.add_argument("--minutes", type=float, default=6.0, help="after which no other case is begun")
    parser.add_argument("--run", default="", help="the run that the rows belong to, where several commands make one")
    parser.add_argument("--resume", default="", help=argparse.SUPPRESS)  # run@deadline, of a run that goes on
    return parser.parse_args(arguments)


def start(options: argparse.Namespace) -> Session:
    device = torch.device(options.device)
    facts = environment()
    if device.type == "cpu":
        facts["device"] = f"cpu x{torch.get_num_threads()}"
    run, _, deadline = options.resume.partition("@")
    facts["run"] = run or options.run or datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")
    folder = options.out or (results_folder() if device.type == "cuda" else rehearsal_folder("kernels"))
    if options.tune or options.quick or options.sweep:
        clock = Clock(device, runs=20, seconds=2.0) if device.type == "cuda" else Clock(device, runs=3, warmup=1)
    else:
        clock = Clock(device)
    end = float(deadline) if deadline else time.time() + 60 * options.minutes
    return Session(device, clock, folder / "kernels.csv", facts, end, resumed=bool(run))


def chosen_plan(session: Session, options: argparse.Namespace) -> Plan:
    """The cases that were asked for."""
    sizes = FULL if session.device.type == "cuda" else TOY
    if options.ahead:
        return [("compile ahead", lambda s: compile_ahead(sizes, s))]
    if options.profile:
        return profile_plan(sizes)
    return sweep_plan(sizes) if options.sweep else plan(sizes, quick=options.quick)


def measure_all(session: Session, options: argparse.Namespace) -> None:
    """Every case in order; those that the time does not allow are named."""
    # A case that brought the device down as a whole is not tried again.
    done = {row["case"] for row in session.rows if not row["implementation"] and row["status"] in ("done", "failed")}
    for name, measure in chosen_plan(session, options):
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
        draw(session)
        print(path)
    else:
        measure_all(session, options)
        draw(session)
        if not (options.ahead or options.profile or options.sweep):
            print(session.path.with_suffix(".md").read_text(encoding="utf-8").partition("## Not measured")[0])
    print(", ".join(f"{count} rows {status}" for status, count in session.written.items()))
    # A run is resumed only behind a failure.
    return 1 if session.resumed or any(status in session.written for status in BAD) else 0


if __name__ == "__main__":
    sys.exit(main())
