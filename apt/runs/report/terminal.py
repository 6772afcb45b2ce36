"""The tables in the terminal."""

from pathlib import Path
from typing import IO

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from apt.files.telling import printable
from apt.runs.report.records import load_run
from apt.runs.report.tables import Sheet, sheets

WIDTH = 100  # columns, where the output is no terminal and so has no width
WIDE = 120  # the same of tables that compare runs


def print_report(folder: str | Path, file: IO[str] | None = None) -> None:
    """Print the tables of a run: results, events, and what each event saved, where there were any.

    Args:
        folder: of a finished run.
        file: None is the standard output.

    Raises:
        FileNotFoundError: the folder holds no finished run.
        ValueError: a file in it is corrupt.
    """
    print_sheets(sheets(load_run(Path(folder))), file)


def print_sheets(found: list[Sheet], file: IO[str] | None = None, width: int = WIDTH) -> None:
    """Print tables, as wide as the terminal is."""
    console = Console(file=file)
    if not console.is_terminal:
        console = Console(file=file, width=width)
    for sheet in found:
        console.print(_table(sheet))


def _table(sheet: Sheet) -> Table:
    table = Table(title=escape(printable(sheet.title)), title_justify="left", show_header=bool(sheet.headers))
    for header in sheet.headers:
        table.add_column(escape(header), justify="right", overflow="fold")
    if not sheet.headers:
        table.add_column("what")
        table.add_column("value", justify="right")
    for row in sheet.rows:
        table.add_row(*(escape(printable(cell)) for cell in row))
    return table
