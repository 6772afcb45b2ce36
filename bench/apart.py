"""A run in a process of its own, which prints its row."""

import json
import subprocess
import sys
from typing import Any

PREFIX = "ROW "  # of the line with the row


def row_of(arguments: list[str], what: str) -> dict[str, Any]:
    """The row that ``python -m`` with these arguments prints behind `PREFIX`, as JSON.

    Raises:
        SystemExit: it failed; the message is what was run, and its last words.
    """
    finished = subprocess.run([sys.executable, "-m", *arguments], capture_output=True, text=True, check=False)
    found = [line[len(PREFIX) :] for line in finished.stdout.splitlines() if line.startswith(PREFIX)]
    if not found:
        raise SystemExit(f"{what} failed:\n{finished.stderr[-2000:]}")
    row: dict[str, Any] = json.loads(found[0])
    return row
