"""The pages that are drawn from the rows of the kernel benchmark: kernels.md, and the goals on docs/gpu.md."""

from pathlib import Path

from bench.kernels.goals import goal_lines
from bench.kernels.rows_of_run import BOTH, FORWARD, Row, Rows
from bench.rows import read_rows

REHEARSAL = "**A rehearsal at toy sizes on a CPU: no figure or verdict below means anything.**"
HEADER = ("| goal | measure | limit | figure | by | |", "|---|---|---|---|---|---|")


def first_measurements(rows: Rows) -> list[str]:
    """What decides between the implementations, in TFLOP/s and GB/s."""
    lines = ["| case | what | median ms | rate | over the plain product or frozen |", "|---|---|---|---|---|"]
    wanted = [
        row for row in rows.good if row.get("op") in ("gemm", "copy") or row.get("what") in (BOTH, FORWARD, "pass")
    ]
    for row in wanted:
        rate = f"{row['value']} {row['unit']}"
        what = f"{row['implementation']}, {row['what']}"
        lines.append(f"| {row['case']} | {what} | {row['median_ms']} | {rate} | {row.get('ratio', '')} |")
    return lines


def excuses(rows: list[Row]) -> list[str]:
    """What was wrong, failed or was left out, a line for each reason."""
    cases: dict[tuple[str, str, str], list[str]] = {}
    for row in rows:
        if row["status"] not in ("ok", "done"):
            key = (row["status"], row.get("implementation") or "all", row.get("note", "").replace("|", "/"))
            cases.setdefault(key, []).append(row["case"])
    return [f"- {status}, {name}: {note} ({', '.join(where)})" for (status, name, note), where in cases.items()]


def goals_table(asked: Rows) -> list[str]:
    return [*HEADER, *(line.text() for line in goal_lines(asked))]


def profile_table(rows: list[Row]) -> list[str]:
    """What each kernel takes, case by case."""
    lines = ["| case | implementation | kernel | us | calls | rate |", "|---|---|---|---|---|---|"]
    for row in rows:
        if row.get("what") == "profile" and row["status"] == "ok":
            rate = f"{row['value']} {row['unit']}" if row.get("value") else ""
            shown = (row["case"], row["implementation"], row["kernel"].replace("|", "/"), row["us"], row["calls"], rate)
            lines.append(f"| {' | '.join(shown)} |")
    return lines


def sweep_table(rows: list[Row]) -> list[str]:
    """What other tiles take, beside the one that runs."""
    lines = ["| case | tile | median ms | rate | over the one that runs | |", "|---|---|---|---|---|---|"]
    for row in rows:
        if row.get("what") == "sweep":
            rate = f"{row['value']} {row['unit']}" if row.get("value") else ""
            shown = (row["case"], row["implementation"], row.get("median_ms", ""), rate, row.get("ratio", ""))
            lines.append(f"| {' | '.join(shown)} | {row['status']} |")
    return lines


def facts(rows: list[Row]) -> str:
    """Which run it was, and a warning where that was a rehearsal."""
    names = ("device", "torch", "triton", "commit", "run")
    said = ", ".join(f"{name} {rows[0].get(name) or 'unknown'}" for name in names) + "."
    return f"{REHEARSAL}\n\n{said}" if rows[0]["device"].startswith("cpu") else said


def table(rows: list[Row]) -> str:
    """Markdown: run, goals, what was wrong, failed or left out, and every time."""
    if not rows:
        return "Nothing was measured.\n"
    asked = Rows(rows)
    lines = ["# Kernels", "", facts(rows), "", *goals_table(asked)]
    lines += ["", "## Not measured", "", *excuses(rows)]
    lines += ["", "## What each kernel takes", "", *profile_table(rows)]
    lines += ["", "## Other tiles", "", *sweep_table(rows)]
    lines += ["", "## Times", "", *first_measurements(asked)]
    return "\n".join(lines) + "\n"


def section(results: Path) -> str:
    """The goals of every GPU that was measured, by its latest run; where none was, every goal is unmeasured."""
    lines = [""]
    for file in sorted(results.glob("*/kernels.csv")):
        rows = read_rows(file)
        latest = [row for row in rows if row["run"] == rows[-1]["run"]]
        lines += [f"#### {file.parent.name}", "", facts(latest), "", *goals_table(Rows(latest)), ""]
    if len(lines) == 1:
        lines += [*goals_table(Rows([])), ""]
    return "\n".join(lines)
