"""From YAML and ``key=value`` to a `RunConfig`: names that are found, values of the type that their field wants."""

import dataclasses
import difflib
import math
from dataclasses import MISSING, fields
from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_origin, get_type_hints

import yaml

from apt.files.reading import parse_yaml, read_yaml, shown
from apt.runs.config.document_keys import DOCUMENT_KEYS, counterparts, translate
from apt.runs.config.settings import RunConfig

SHORTHANDS = {"model": "model.name", "dataset": "data.datasets"}
COLUMNS = ("text_columns", "label_column", "target_column")
OF_ONE_SOURCE = (*COLUMNS, "filter", "drop_duplicates", "test_size", "train_size")  # these go with a data set
OF_ONE = {  # what an override puts back to its default, as it goes with the file's data set, or with its model
    "dataset": {f"data.{leaf}" for leaf in OF_ONE_SOURCE},
    "model": {"model.shape"},
    "model.architectures": {"model.shape"},
}
OFF_IS_TEXT = ("pruning.kurtosis", "pruning.repair")  # YAML 1.1 reads a bare off as false
SECTIONS: dict[str, Any] = {  # section -> its dataclass
    entry.name: entry.type for entry in fields(RunConfig) if dataclasses.is_dataclass(entry.type)
}
TOP = [entry.name for entry in fields(RunConfig) if entry.name not in SECTIONS]
KEYS = TOP + [f"{section}.{leaf.name}" for section, room in SECTIONS.items() for leaf in fields(room)]
KNOWN = [*KEYS, *DOCUMENT_KEYS]


def load_config(path: str | Path | None, overrides: list[str] | None = None) -> RunConfig:
    """Read a YAML file, if any, and put ``key=value`` settings on top of it.

    A key is ``section.leaf``, ``output_dir``, the name of a leaf that only one section has, one of `DOCUMENT_KEYS`, or
    a shorthand: ``model=`` for ``model.name``, ``dataset=`` for ``data.datasets``. As the columns, filter, duplicates
    and test size in a file belong to its own data set, ``dataset=`` puts them back to their defaults unless the
    overrides set them too; so do ``model=`` and ``model.architectures=`` with the shape. Values are YAML.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: broken YAML, an unknown key (the nearest ones are named), or a value of a wrong type or range.
    """
    values = {} if path is None else _read_yaml(Path(path))
    pairs = [(key in OF_ONE, key, text) for key, text in map(_split, overrides or [])]
    for resets, key, text in sorted(pairs, key=lambda pair: not pair[0]):
        full = _full_key(key)
        if resets:
            values = {name: value for name, value in values.items() if name not in OF_ONE[key]}
        for other in counterparts(full):
            values.pop(other, None)
        values[full] = text if full in KEYS and _hint(full) is str else _yaml_value(full, text)
    return _build({key: _convert(key, value, _hint(key)) for key, value in translate(values).items()})


def read_table(path: Path, room: str, content: str) -> dict[Any, Any]:
    """A YAML file that holds a table; `room` begins a message, `content` says what is in such a table.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not YAML, or no table.
    """
    document = read_yaml(path, room)
    if not isinstance(document, dict):
        raise ValueError(f"{room}: {path} must hold {content}, got {shown(document)}")
    return document


def _read_yaml(path: Path) -> dict[str, Any]:
    """The file as ``{"section.leaf": value}``."""
    document = read_table(path, "config", f"the sections {', '.join(SECTIONS)}")
    values: dict[str, Any] = {}
    for name, content in document.items():
        if name not in SECTIONS:
            values[_known(str(name), [*TOP, *SECTIONS])] = content
            continue
        if not isinstance(content, dict | None):
            raise ValueError(f"config: section {name} must hold keys and values, got {shown(content)}")
        values.update(_leaves(name, content or {}))
    translate(values)  # says what is wrong with the file itself, which overrides may hide
    return values


def _leaves(section: str, content: dict[str, Any]) -> dict[str, Any]:
    """The keys of a section; one that holds keys in the documents (``model.adapter``) is taken apart."""
    found: dict[str, Any] = {}
    for leaf, value in content.items():
        key = f"{section}.{leaf}"
        inner = isinstance(value, dict) and any(known.startswith(f"{key}.") for known in DOCUMENT_KEYS)
        found.update(_leaves(key, value) if inner else {_known(key, KNOWN): value})
    return found


def _split(override: str) -> tuple[str, str]:
    key, equals, text = override.partition("=")
    if not equals or not key.strip():
        raise ValueError(f"config: an override is written key=value, got {shown(override)}")
    return key.strip(), text.strip()


def _yaml_value(key: str, text: str) -> Any:
    try:
        return parse_yaml(text)
    except yaml.YAMLError:
        raise ValueError(f"config: {key} cannot be read from {shown(text)}; a value is written as in YAML") from None


def _full_key(key: str) -> str:
    """The full name of a key as an override gives it."""
    key = SHORTHANDS.get(key, key)
    if "." in key or key in KEYS:
        return _known(key, KNOWN)
    matches = [full for full in KNOWN if full.endswith("." + key)]
    if len(matches) > 1:
        raise ValueError(f"config: {key!r} is in several sections; give {' or '.join(matches)}")
    return matches[0] if matches else _known(key, KEYS)


def _known(key: str, keys: list[str]) -> str:
    if key in keys:
        return key
    leaves = {full.rpartition(".")[2]: full for full in keys}
    near = difflib.get_close_matches(key, keys, n=3)
    near += [leaves[leaf] for leaf in difflib.get_close_matches(key.rpartition(".")[2], leaves, n=2)]
    hint = f"did you mean {' or '.join(dict.fromkeys(near))}?" if near else f"there are {', '.join(keys)}"
    raise ValueError(f"config: unknown key {shown(key)}; {hint}")


def _hint(key: str) -> Any:
    section, _, leaf = key.rpartition(".")
    return get_type_hints(SECTIONS[section] if section else RunConfig)[leaf]


def _convert(key: str, value: Any, hint: Any) -> Any:
    """A value as its field wants it. YAML reads ``1e-3`` as text, so numbers in text count where a float may stand."""
    options = [hint] if get_origin(hint) in (list, tuple, dict) or not get_args(hint) else list(get_args(hint))
    if value is False and key in OFF_IS_TEXT:
        return "off"
    if value is None and NoneType in options:
        return None
    for option in options:
        plain = get_origin(option) or option
        if plain in (list, tuple) and isinstance(value, list) and all(isinstance(entry, str) for entry in value):
            return plain(value)
        if plain in (bool, str, dict, int) and type(value) is plain:
            return value
    if float in options and not isinstance(value, bool):
        try:
            number = float(value)
        except (TypeError, ValueError):
            number = math.nan
        if math.isfinite(number):
            return number
    raise ValueError(f"config: {key} must be {' or '.join(map(_describe, options))}, got {shown(value)}")


def _describe(hint: Any) -> str:
    words = {bool: "true or false", int: "a whole number", float: "a number", str: "text", NoneType: "null"}
    return words.get(hint, "a list of names" if get_origin(hint) in (list, tuple) else "a table of column: value")


def _build(values: dict[str, Any]) -> RunConfig:
    missing = [key for key in KEYS if key not in values and _is_required(key)]
    if missing:
        raise ValueError(f"config: {missing[0]} is missing; give it in the file or as {missing[0]}=...")
    sections = {
        name: room(**{key.partition(".")[2]: value for key, value in values.items() if key.startswith(name + ".")})
        for name, room in SECTIONS.items()
    }
    return RunConfig(**{key: values[key] for key in TOP if key in values}, **sections)


def _is_required(key: str) -> bool:
    section, _, leaf = key.rpartition(".")
    entry = RunConfig.__dataclass_fields__[leaf] if not section else SECTIONS[section].__dataclass_fields__[leaf]
    return entry.default is MISSING and entry.default_factory is MISSING
