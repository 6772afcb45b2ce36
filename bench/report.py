"""Tables and pictures of every result there is, and the page that shows them: ``python -m bench.report``.

For each machine (a folder in bench/results) that has rows of a benchmark, its table and picture are drawn from the CSV
beside it. In docs/results.md what stands between ``<!-- bench:NAME -->`` and ``<!-- /bench -->`` is replaced by the
command that measures it, and the tables; in README.md by the table alone; in docs/gpu.md by the goals of the kernels.
Text around the marks stays. What no machine has measured reads `unmeasured`.
"""

import argparse
import re
from collections.abc import Callable, Collection
from os.path import relpath
from pathlib import Path

from bench import (
    ablations,
    accuracy,
    adapters,
    copy_task_cut,
    cost,
    decoder,
    events,
    footprints,
    goals,
    inference,
    instructions,
    last_phase,
    ratings,
    repair_cost,
    repaired,
    train_step,
)
from bench.grid import Rows
from bench.kernels import page as kernels
from bench.plots import PICTURES, save
from bench.rows import read_rows

TABLES: dict[str, Callable[[Rows], str]] = {
    "train_step": train_step.table,
    "inference": inference.table,
    "cost": cost.table,
    "events": events.table,
    "last_phase": last_phase.table,
    "accuracy": accuracy.table,
    "ablations": ablations.table,
    "adapters": adapters.table,
    "footprints": footprints.table,
    "ratings": ratings.table,
    "decoder": decoder.table,
    "decoder_speed": decoder.speed_table,
    "copy_task_cut": copy_task_cut.table,
    "instructions": instructions.table,
    "repair_cost": repair_cost.table,
    "repaired": repaired.table,
}
COMMANDS = {  # where it is not python -m bench.NAME
    "ratings": "make ratings",
    "decoder_speed": "python -m bench.decoder --arms apt lora --speed",
}
ON_README = ("footprints",)
ROWS = {"ablations": "accuracy"}  # whose rows a table is drawn from, where they are another's
GOALS = "goals"  # the block of all bars
KERNEL_GOALS = "kernel_goals"  # the block of those of the kernels, on the page of GPUs
BLOCK = re.compile(r"(<!-- bench:(\w+) -->\n).*?(<!-- /bench -->)", re.DOTALL)


def section(name: str, results: Path, page: Path) -> str:
    """What the page says about one benchmark."""
    command = COMMANDS.get(name, f"python -m bench.{name}")
    lines = ["", f"Measure it with `{command}`, draw it with `python -m bench.report`.", ""]
    files = sorted(results.glob(f"*/{ROWS.get(name, name)}.csv"))
    for file in files:
        rows = read_rows(file)
        text = TABLES[name](rows)
        file.with_name(f"{name}.md").write_text(text, encoding="utf-8")
        commits = ", ".join(dict.fromkeys(row["commit"] for row in rows if row["commit"]))
        lines += [f"#### {file.parent.name}, commit {commits or 'unknown'}", "", text.rstrip("\n"), ""]
        if name in PICTURES:
            picture = file.with_suffix(".png")
            save(name, rows, picture)
            lines += [f"![{name} on {file.parent.name}]({relpath(picture, page.parent)})", ""]
        lines += [f"Rows: [{file.name}]({relpath(file, page.parent)}).", ""]
    return "\n".join(lines if files else [*lines, "`unmeasured`", ""])


def goals_section(results: Path) -> str:
    """Every bar, machine by machine."""
    lines = ["", "Print it with `python -m bench.goals`.", ""]
    for folder in sorted(folder for folder in results.iterdir() if any(folder.glob("*.csv"))):
        lines += [f"#### {folder.name}", "", goals.table(goals.read_from(folder))]
    return "\n".join(lines)


def excerpt(name: str, results: Path) -> str:
    """The tables of one benchmark, and nothing else."""
    tables = [TABLES[name](read_rows(file)) for file in sorted(results.glob(f"*/{ROWS.get(name, name)}.csv"))]
    return "\n" + ("\n".join(tables) or "`unmeasured`\n")


def rewrite(page: Path, needed: Collection[str], written: Callable[[str], str]) -> None:
    """Replace what stands between the marks of a page.

    Args:
        page: has one pair of marks for each name that is `needed`.
        needed: the names.
        written: from a name to what is to stand there.

    Raises:
        ValueError: a mark names something else, or the page lacks the marks of a name.
    """
    text = page.read_text(encoding="utf-8")
    if sorted(match[1] for match in BLOCK.findall(text)) != sorted(needed):
        raise ValueError(f"{page}: it needs one <!-- bench:NAME --> ... <!-- /bench --> for each of {list(needed)}")
    new = BLOCK.sub(lambda match: match[1] + written(match[2]) + match[3], text)
    page.write_text(new, encoding="utf-8")


def rewrite_results(page: Path, results: Path) -> None:
    """All benchmarks and every bar, on the page of results; ValueError where it lacks a mark."""
    rewrite(
        page,
        [*TABLES, GOALS],
        lambda name: goals_section(results) if name == GOALS else section(name, results, page),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, default=Path("bench/results"))
    parser.add_argument("--page", type=Path, default=Path("docs/results.md"))
    parser.add_argument("--readme", type=Path, default=Path("README.md"))
    parser.add_argument("--gpus", type=Path, default=Path("docs/gpu.md"))
    arguments = parser.parse_args()
    rewrite_results(arguments.page, arguments.results)
    rewrite(arguments.readme, ON_README, lambda name: excerpt(name, arguments.results))
    rewrite(arguments.gpus, [KERNEL_GOALS], lambda _: kernels.section(arguments.results))
    print(f"{arguments.page}, {arguments.gpus} and {arguments.readme} are up to date with {arguments.results}")


if __name__ == "__main__":
    main()
