"""The table that selection reads: the fastest implementation of every op by device, dtype and shape bucket."""

import json
from pathlib import Path
from typing import Any

import apt_kernels
from apt_kernels import selection
from bench.kernels.group import OP as GROUP
from bench.kernels.group import GroupCase, call_of, judge_group, make_group
from bench.kernels.linear import OP, LinearCase, calls_of, judge, make_inputs
from bench.kernels.passes import PassCase, make_pass, right_passes, run_pass
from bench.kernels.plan import BIG, ENCODER, FULL, TOY, Sizes
from bench.kernels.session import Session
from bench.timing import Call

TUNED = ("gate collecting", "column_sums", "gated_activation", "masked_norm", "weight_kurtosis")
TOKENS = (8192, 16384, 4096, 2048, 1024)  # the most usual first: what does not fit into the time stays eager's
RANKS = (16, 8, 64, 32)
TABLES = Path(apt_kernels.__file__).with_name("tables")  # where selection looks
GROUPS = {"square": 3, "up": 2, "encoder square": 3}  # layers that share their input: q, k, v; gate, up
EXTRA_LAYERS = {"key and value": (4096, 1024), "encoder large": (1024, 1024)}


def tune(session: Session, path: Path, only: Any) -> dict[str, Any]:
    """Time everything that is right, in order of use, until the time is up; the table is written after each key."""
    path.parent.mkdir(parents=True, exist_ok=True)
    found: dict[str, str] = {}
    table: dict[str, Any] = {"implementations": found, "device": session.facts["device"]}
    table["versions"] = {name: session.facts[name] for name in ("torch", "triton")}
    table["commit"] = session.facts["commit"]
    for case in cases(FULL if session.device.type == "cuda" else TOY):
        key = _key(case, session)
        if key in found or not only.search(case.name):
            continue
        if session.over():
            print(f"unmeasured for lack of time: {key}", flush=True)
            continue
        times = _times(case, session)
        if not times:
            continue
        found[key] = min(times, key=lambda name: times[name])
        print(f"{key}: {found[key]} of " + ", ".join(f"{n} {ms:.4f} ms" for n, ms in times.items()), flush=True)
        path.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
    return table


def cases(sizes: Sizes) -> list[LinearCase | PassCase | GroupCase]:
    full = sizes is FULL
    tokens, ranks = (TOKENS, RANKS) if full else (sizes.tokens[:1], sizes.ranks[:1])
    layers = {name: sizes.layers[name] for name in (*BIG, *ENCODER)} | (EXTRA_LAYERS if full else {})
    made: list[LinearCase | PassCase | GroupCase] = []
    for T in tokens:
        for rank in ranks:
            made += [
                LinearCase(layer=n, tokens=T, d_in=i, d_out=o, rank=rank, masks="plain") for n, (i, o) in layers.items()
            ]
        made += [
            GroupCase(tokens=T, d_in=layers[n][0], d_out=layers[n][1], rank=rank, layers=count)
            for n, count in GROUPS.items()
            for rank in ranks
        ]
        widths = sorted({width for pair in layers.values() for width in pair}, reverse=True)
        made += [PassCase(kind=kind, rows=T, width=width) for width in widths for kind in TUNED[:-1]]
    shapes = sorted({(o, i) for i, o in layers.values()}, reverse=True)
    return made + [PassCase(kind=TUNED[-1], rows=o, width=i) for o, i in shapes]


def _key(case: LinearCase | PassCase | GroupCase, session: Session) -> str:
    if isinstance(case, LinearCase):
        return selection.key(OP, session.dtype, (case.tokens, case.d_in, case.d_out, case.rank))
    if isinstance(case, GroupCase):
        return selection.key(GROUP, session.dtype, case.key_sizes)
    return selection.key(case.op, session.dtype, (case.rows, case.width))


def _times(case: LinearCase | PassCase | GroupCase, session: Session) -> dict[str, float]:
    """Median ms of every implementation that is right."""
    calls: dict[str, list[Call]]
    if isinstance(case, LinearCase):
        copies = [make_inputs(case, session, n) for n in range(2)]
        right = {n: build for n, (build, _) in judge(case, session, ours_only=True).items()}
        calls = {n: [calls_of("forward+backward", build(i), i) for i in copies] for n, build in right.items()}
    elif isinstance(case, GroupCase):
        groups = [make_group(case, session, n) for n in range(2)]
        builds = {n: build for n, (build, _) in judge_group(case, session).items()}
        calls = {n: [call_of(build(i), i) for i in groups] for n, build in builds.items()}
    else:
        passes = [make_pass(case, session, n) for n in range(2)]
        calls = {
            n: [lambda t=t, n=n: run_pass(case, t, n) for t in passes]  # type: ignore[misc]
            for n in right_passes(case, session)
        }
    times = session.clock.interleaved(calls)
    rows = [
        case.columns() | {"what": "tune", "implementation": name} | taken.columns() for name, taken in times.items()
    ]
    session.write(rows)
    return {name: taken.median for name, taken in times.items()}
