"""What a run left behind -> tables in the terminal and a page with pictures. A function of the run's folder alone."""

from apt.runs.report.terminal import print_report
from apt.runs.report.write import report

__all__ = [
    "print_report",
    "report",
]
