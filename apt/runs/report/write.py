"""Writes the page and its pictures where the run is."""

from pathlib import Path

from apt.files.telling import tell
from apt.files.whole import write_file_aside, writing
from apt.runs.report.compare import comparisons
from apt.runs.report.page import PAGE, Page, folder_page, run_page
from apt.runs.report.pictures import check_drawing, is_drawn_here
from apt.runs.report.records import RunRecord, find_runs, load_run
from apt.runs.report.tables import sheets
from apt.runs.report.terminal import WIDE, print_sheets
from apt.runs.run_folder import METRICS

PICTURES = "report"  # the folder of the PNGs, beside the page
ADVICE = "only the page is missing; free space there, or copy the folder to where it can be written"


def report(folder: str | Path) -> Path:
    """Print the tables of a run or of a folder of runs, and write its page. Returns the page.

    A run gets `report.html`, which loads nothing from elsewhere, and the pictures as PNGs in `report/`. A folder gets a
    page that compares the finished runs in it, and each of these gets its own. Everything is drawn from the files in
    the folder. A run in a folder that cannot be read is named and left out.

    Raises:
        FileNotFoundError: there is no finished run.
        ValueError: a record is corrupt; in a folder of runs, each of them.
        OSError: the page cannot be written; the tables have been printed by then.
        ImportError: matplotlib or jinja2 is missing; the tables have been printed by then.
    """
    folder = Path(folder)
    if (folder / METRICS).exists() or not find_runs(folder):
        run = load_run(folder)
        print_sheets(sheets(run))
        check_drawing()
        page = run_page(run)
    else:
        runs, unread = _load_all(folder)
        print_sheets(comparisons(runs), width=WIDE)
        check_drawing()
        with writing(folder, "report", ADVICE):
            for run in runs:
                _write(run.folder, run_page(run))
        page = folder_page(folder, runs, unread)
    with writing(folder, "report", ADVICE):
        path = _write(folder, page)
    tell(f"{path} shows this, with {len(page.pictures)} pictures")
    return path


def _load_all(folder: Path) -> tuple[list[RunRecord], list[str]]:
    """The runs that can be read, and a sentence on each other."""
    runs, unread = [], []
    for path in find_runs(folder):
        try:
            run = load_run(path, label=path.relative_to(folder).as_posix())
            sheets(run)
            runs.append(run)
        except ValueError as error:
            unread.append(str(error))
        except (LookupError, TypeError, AttributeError) as error:  # an entry that no table can show
            unread.append(f"report: a record in {path} is corrupt ({error!r:.80}); run the training again")
    if not runs:
        raise ValueError(unread[0])
    for line in unread:
        tell(f"left out: {line}")
    return runs, unread


def _write(folder: Path, page: Page) -> Path:
    """The pictures, then the page; each appears whole or not at all, and our pictures of an older page go.

    Raises:
        ValueError: the folder of the pictures is a link.
    """
    pictures = folder / PICTURES
    if pictures.is_symlink():
        raise ValueError(f"report: {pictures} is a link, and nothing is written where it leads; remove or rename it")
    for picture in page.pictures:
        _replace(pictures / f"{picture.name}.png", picture.png)
    drawn = {f"{picture.name}.png" for picture in page.pictures}
    for path in pictures.glob("*.png"):
        if path.name not in drawn and is_drawn_here(path):
            path.unlink()
    _replace(folder / PAGE, page.html.encode("utf-8"))
    return folder / PAGE


def _replace(path: Path, content: bytes) -> None:
    with write_file_aside(path) as partial:
        partial.write_bytes(content)
