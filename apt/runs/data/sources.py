"""Where sentences come from: files, folders, the inside of an installed package, the hub."""

import csv
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from apt.families.locate import PACKAGE, _is_local, _package_path
from apt.files.reading import check_regular

SUFFIXES = (".csv", ".tsv", ".jsonl", ".parquet", ".txt")
SPLITS = ("train", "test", "validation")
MOST_COLUMNS = 1000  # of JSON lines; rows that have a key of their own each would fill the memory
TRAIN_EXTRA = 'pip install "apt-lm[train]"'
MAX_FIELD = 1 << 27  # characters; the csv module stops at 131,072, and documents are longer


@dataclass(frozen=True)
class Table:
    """Rows of one split, and where each of them comes from."""

    source: str  # file, or data set and split, as messages name it
    columns: dict[str, list[Any]]
    lines: list[int]  # 1-based line in the file of each row (where a row takes several, its first)
    label_names: list[str] | None = None  # where the source has them

    def __len__(self) -> int:
        return len(self.lines)

    def take(self, rows: list[int]) -> "Table":
        columns = {name: [values[row] for row in rows] for name, values in self.columns.items()}
        return Table(self.source, columns, [self.lines[row] for row in rows], self.label_names)

    def column(self, name: str) -> list[Any]:
        if name not in self.columns:
            raise ValueError(f"data: {self.source} has no column {name!r}; there are {', '.join(self.columns)}")
        return self.columns[name]


def read_tables(name: str) -> dict[str, Table]:
    """The splits of a data set: "train", and "test" where it has one of its own."""
    path = _package_path(name) if name.startswith(PACKAGE) else Path(name).expanduser()
    if path.is_dir():
        tables = _read_folder(path)
    elif path.exists():
        tables = {"train": _read_file(path)}
    elif path.suffix in SUFFIXES or _is_local(name):
        raise FileNotFoundError(f"data: there is no file or folder {path}")
    else:
        tables = _read_hub(name)
    for table in tables.values():
        if not table.lines:
            raise ValueError(f"data: {table.source} is empty; it has no rows")
    return tables


def _read_folder(folder: Path) -> dict[str, Table]:
    paths = [path for path in sorted(folder.iterdir()) if path.suffix in SUFFIXES]
    found: dict[str, Path] = {}
    for path in paths:
        if path.stem in SPLITS and path.stem in found:
            raise ValueError(
                f"data: {found[path.stem]} and {path.name} are both the {path.stem} split; keep one of them"
            )
        found[path.stem] = path
    if "train" not in found:
        raise FileNotFoundError(f"data: {folder} holds no train file, of {', '.join(SUFFIXES)}")
    test = next((found[stem] for stem in ("test", "validation") if stem in found), None)
    tables = {"train": _read_file(found["train"])}
    return tables if test is None else tables | {"test": _read_file(test)}


def _read_file(path: Path) -> Table:
    if path.suffix not in SUFFIXES:
        raise ValueError(f"data: {path} must be one of {', '.join(SUFFIXES)}, got {path.suffix or 'no ending'}")
    check_regular(path, "data")
    try:
        if path.suffix == ".parquet":
            return _read_parquet(path)
        if path.suffix == ".txt":
            return _read_text(path)
        return _read_jsonl(path) if path.suffix == ".jsonl" else _read_csv(path)
    except UnicodeDecodeError as error:
        raise ValueError(f"data: {path} is not UTF-8 text (byte {error.start}); convert it first") from None


def _read_text(path: Path) -> Table:
    """Plain text: a document is what stands between blank lines."""
    documents: list[list[str]] = []
    starts, inside = [], False
    for line, text in enumerate(path.read_text(encoding="utf-8-sig").splitlines(), start=1):
        if text.strip() and not inside:
            documents.append([])
            starts.append(line)
        inside = bool(text.strip())
        if inside:
            documents[-1].append(text)
    return Table(str(path), {"text": ["\n".join(lines) for lines in documents]}, starts)


def _read_csv(path: Path) -> Table:
    """Comma-separated with double quotes; tab-separated (.tsv) without quoting, as the GLUE files are."""
    rows, lines = [], []
    limit = csv.field_size_limit(MAX_FIELD)
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            style: dict[str, Any] = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if path.suffix == ".tsv" else {}
            reader = csv.reader(file, strict=True, **style)
            numbered = _with_line(reader, path)
            _, header = next(numbered, (1, []))
            for line, fields in numbered:
                if fields and len(fields) != len(header):
                    raise ValueError(
                        f"data: {path}, line {line} has {len(fields)} fields, but the header has {len(header)} "
                        f"({', '.join(header)}); look for a missing or unquoted delimiter there"
                    )
                if fields:
                    rows.append(fields)
                    lines.append(line)
    finally:
        csv.field_size_limit(limit)
    if len(set(header)) != len(header):
        raise ValueError(f"data: {path}, line 1 names a column twice: {', '.join(header)}")
    return Table(str(path), {name: [row[i] for row in rows] for i, name in enumerate(header)}, lines)


def _with_line(reader: Any, path: Path) -> Iterator[tuple[int, list[str]]]:
    """Rows with the line they start on: the reader counts to the line that ends a row."""
    start = reader.line_num + 1
    try:
        for fields in reader:
            yield start, fields
            start = reader.line_num + 1
    except csv.Error as error:
        raise ValueError(f"data: {path}, the row that starts on line {start} is not valid csv: {error}") from None


def _read_jsonl(path: Path) -> Table:
    rows, lines = [], []
    names: dict[str, None] = {}
    with path.open(encoding="utf-8-sig") as file:
        for line, text in enumerate(file, start=1):
            if not text.strip():
                continue
            try:
                row = json.loads(text)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"data: {path}, line {line} is not JSON: {error}") from None
            if not isinstance(row, dict):
                raise ValueError(f"data: {path}, line {line} must be an object with columns, got {text.strip():.40}")
            if "\\ud" in text.lower() and not _is_text(row):
                raise ValueError(
                    f"data: {path}, line {line} has half a character (\\ud800 to \\udfff alone), as a text cut in the "
                    f"middle of one has it; remove or replace it"
                )
            rows.append(row)
            lines.append(line)
            names |= dict.fromkeys(row)
            if len(names) > MOST_COLUMNS:
                raise ValueError(
                    f"data: {path} has more than {MOST_COLUMNS:,} columns up to line {line}; rows must share their keys"
                )
    return Table(str(path), {name: [row.get(name) for row in rows] for name in names}, lines)


def _is_text(row: dict[str, Any]) -> bool:
    """Whether every text in a row can be written: half of a surrogate pair cannot."""
    try:
        json.dumps(row, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _read_parquet(path: Path) -> Table:
    try:
        import pandas

        frame = pandas.read_parquet(path)
    except ImportError:
        raise ImportError(f"data: reading {path} needs pandas and pyarrow; {TRAIN_EXTRA}") from None
    except (ValueError, OSError, RuntimeError, LookupError) as error:
        raise ValueError(f"data: {path} is not a parquet file: {error}") from None
    columns = {str(name): frame[name].astype(object).where(frame[name].notna(), None).tolist() for name in frame}
    return Table(str(path), columns, list(range(1, len(frame) + 1)))


def _read_hub(name: str) -> dict[str, Table]:
    """A data set of the hub. The test split of GLUE has no labels, so its validation split stands in."""
    try:
        from datasets import load_dataset
    except ImportError:
        raise ImportError(
            f"data: {name} is no local file or folder, and loading it from the hub needs datasets; {TRAIN_EXTRA}"
        ) from None
    parts = name.split("/")
    glue = parts[0] == "glue" or parts[1:2] == ["glue"]
    owner = 1 if parts[0] == "glue" else 2
    try:
        splits = load_dataset("/".join(parts[:owner]), *parts[owner:])
    except (OSError, ValueError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"data: {name} cannot be loaded from the hub ({reason}); a local file works too") from None
    choices = ("validation", "validation_matched") if glue else ("test", "validation")
    test = next((split for split in choices if split in splits), None)
    if "train" not in splits:
        raise ValueError(f"data: {name} has no train split; there are {', '.join(splits)}")
    chosen = {"train": "train"} if test is None else {"train": "train", "test": test}
    return {role: _hub_table(f"{name} ({split})", splits[split]) for role, split in chosen.items()}


def _hub_table(source: str, split: Any) -> Table:
    columns = {column: list(split[column]) for column in split.column_names}
    names = getattr(split.features.get("label"), "names", None)
    return Table(source, columns, list(range(1, len(split) + 1)), names)
