"""Writes a model in a format: aside, then renamed; checked in the program that it is for, where that is asked."""

import json
import re
from pathlib import Path

import torch
from torch import nn

from apt.deploy.formats import FORMATS, Comparison, writer_of
from apt.deploy.source import Source, opened, staged
from apt.export import export_model as export_stock
from apt.export.model_card import FRONT_MATTER, README
from apt.files.telling import tell
from apt.files.whole import check_replaceable, check_writable, find_whole, write_folder_aside, writing

MADE = "apt_deploy.json"  # in every folder that is written here: format, source, notes
STOCK = "hf"
AS_BEFORE = (STOCK, "hf-remote")  # formats that are loaded as the model card of the source says
LOADING = re.compile(r"^## How to load it\n.*?(?=^## |\Z)", re.MULTILINE | re.DOTALL)
# The largest difference of a logit over the largest logit: llama.cpp's GELU, from a table in 16 bits, has 4e-4.
MOST, MOST_IN_16_BITS = 1e-3, 5e-2


def export_model(
    model: nn.Module,
    folder: str | Path,
    *,
    to: str = STOCK,
    quantise: str | None = None,
    overwrite: bool = False,
) -> Path:
    """Save a patched model for a program: by default as an ordinary smaller one of transformers.

    For transformers adapters are merged in float32, and pruned units are gone. The folder holds ``config.json``,
    ``model.safetensors`` under the stock parameter names, and ``apt_export.json`` with the number of units in every
    group and of hidden dimensions, which `load_model` reads, and ``README.md``, a model card. Where a stock
    configuration describes the result ("stock" in that file), as with ``layout="uniform"``, it is the one that is
    saved, and ``AutoModel`` loads the folder too. Gates that depend on the example (method "dynacsg") cannot be merged:
    they lie beside the weights, and `load_model` puts them back. A prompt is kept without the network that makes it,
    and `load_model` puts it to work. The other formats are made from that one. The model in memory is not changed.

    Args:
        model: patched by `apt.patch_model`, a Hugging Face model.
        folder: written under a temporary name, then renamed.
        to: a format of `apt.deploy.formats`, "hf" for transformers; ``python -m apt export --help`` lists them.
        quantise: a number type that the format knows; None keeps the numbers as they are.
        overwrite: replace a folder that exists.

    Returns:
        The folder.

    Raises:
        ValueError: the model is not patched or still masks units between two events, the folder exists, or the format
            cannot say the model.
        ImportError: a package that the format needs is missing.
    """
    if to == STOCK and quantise is None:
        return export_stock(model, folder, overwrite=overwrite)
    folder = Path(folder).expanduser()
    _prepare(folder, to, quantise, overwrite=overwrite)
    with staged(model) as source:
        _write(source, folder, to, quantise)
    return folder


def export_source(
    given: str | Path,
    to: str,
    folder: Path,
    *,
    quantise: str | None = None,
    check: bool = False,
    overwrite: bool = False,
) -> Path:
    """Write what a run left, or any model of transformers, for a program.

    Args:
        given: folder of a run, of an export or of a PEFT adapter, a model folder, or a name on the hub.
        to: one of `FORMATS`.
        folder: written under a temporary name, then renamed.
        quantise: a number type that the format knows; None keeps the numbers as they are.
        check: run what was written in its program, and say how it compares with torch.
        overwrite: replace a folder that this has written.

    Returns:
        The folder.

    Raises:
        ValueError: there is no such format or type, the source is no model, the format cannot say it, the folder
            exists, or, with `check`, the result is not the model.
        ImportError: a package is missing.
        OSError: the folder cannot be written.
    """
    folder = folder.expanduser()
    _prepare(folder, to, quantise, overwrite=overwrite, check=check)
    with opened(given) as source:
        compared = _write(source, folder, to, quantise, check=check)
    tell(f"{folder} holds the model for {FORMATS[to].what}")
    if compared is not None:
        tell(compared.told())
    return folder


def _prepare(folder: Path, to: str, quantise: str | None, *, overwrite: bool, check: bool = False) -> None:
    """Raise what can be told before a model is loaded."""
    writer = writer_of(to, check=check)
    if quantise is not None and quantise not in writer.QUANTISED:
        known = f"one of {', '.join(writer.QUANTISED)}" if writer.QUANTISED else "none"
        raise ValueError(f"export: {to} cannot be quantised to {quantise!r}; give {known}")
    if not overwrite and (found := find_whole(folder)).exists():
        raise ValueError(f"export: {found} exists; give another folder or --overwrite")
    check_replaceable(folder, MADE)
    check_writable(folder, "export", "--out")


def _write(source: Source, folder: Path, to: str, quantise: str | None, *, check: bool = False) -> Comparison | None:
    writer = writer_of(to)
    reason = writer.refuse(source)
    if reason is not None:
        raise ValueError(f"export: {to} cannot say {source.name}: {reason}")
    with writing(folder, "export", "free some space, or give another --out"), write_folder_aside(folder, MADE) as aside:
        notes = writer.write(source, aside, quantise)
        compared = writer.compare(source, aside, quantise) if check else None
        if compared is not None and quantise is None:
            _refuse_another_model(source, compared, to)
        source.copy_companions(aside)
        made = {"format": to, "quantise": quantise, "notes": notes, "checked": compared and compared.told()}
        (aside / MADE).write_text(json.dumps(made, indent=2) + "\n", encoding="utf-8")
        (aside / README).write_text(_readme(source, to, quantise, notes), encoding="utf-8")
    for note in notes:
        tell(note)
    return compared


def _refuse_another_model(source: Source, compared: Comparison, to: str) -> None:
    """Raise ValueError where a program does not compute the model, though its numbers are as they were."""
    whole = source.model.dtype in (torch.float32, torch.float64)
    far = compared.difference is not None and not compared.difference <= (MOST if whole else MOST_IN_16_BITS)
    if far or (whole and compared.same_text is False):
        raise ValueError(
            f"export: what was written for {to} is not the model, so it is not kept: {compared.told()}; give another "
            f"format, and tell us, or leave --check out to have it all the same"
        )


def _readme(source: Source, to: str, quantise: str | None, notes: list[str]) -> str:
    """The model card of the source, with what this folder is behind its front matter, and without another's way in."""
    path = source.folder / README
    card = path.read_text(encoding="utf-8") if path.is_file() else ""
    front = FRONT_MATTER.match(card)
    rest = card[front.end() :] if front else card
    if to not in AS_BEFORE:
        rest = LOADING.sub("", rest)
    told = [f"Written for {FORMATS[to].what} (`{to}`{f', {quantise}' if quantise else ''}).", *notes]
    body = "\n".join(f"- {line}" for line in told)
    return f"{card[: front.end()].rstrip() + chr(10) * 2 if front else ''}{body}\n\n{rest.lstrip()}"
