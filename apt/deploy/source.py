"""What is exported: a run, an export, a PEFT folder, a model of the hub or in memory, as a plain model and a folder.

Every source comes to a folder of transformers, or an export of ours beside it, from which all formats are written.
"""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import nn

from apt.export.files import CARD
from apt.export.read import load_model
from apt.export.write import export_model
from apt.families import Anatomy, known_anatomy
from apt.families.config_files import UNUSABLE, check_model_folder, reason_of
from apt.families.locate import resolve_model
from apt.files.reading import read_json_table
from apt.files.whole import find_whole

RUN_MODEL = "model"  # in the folder of a run
ADAPTER = "adapter_config.json"  # of a PEFT folder
COMPANIONS = (  # files beside the weights that a reader of text needs
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json"),
    *("merges.txt", "vocab.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "chat_template.jinja"),
    *("generation_config.json", "LICENSE", "NOTICE"),
)


@dataclass
class Source:
    """A model that is to be written in another format.

    Args:
        name: as the user gave it.
        folder: of transformers' files; with `CARD` in it, an export of ours.
    """

    name: str
    folder: Path

    @property
    def is_ours(self) -> bool:
        return (self.folder / CARD).exists()

    @cached_property
    def card(self) -> dict[str, Any]:
        """What our export tells of itself; of another folder nothing."""
        return read_json_table(self.folder / CARD, "export") if self.is_ours else {}

    @property
    def is_stock(self) -> bool:
        """Whether `AutoModel` loads the folder."""
        return bool(self.card.get("stock", True))

    @cached_property
    def model(self) -> Any:
        """The plain model with its own sizes, in evaluation mode, on the CPU, in the dtype of its weights."""
        return load_model(self.folder) if self.is_ours else _load_stock(self.folder)

    @cached_property
    def anatomy(self) -> Anatomy | None:
        """Its attentions and FFNs; None of a family that is not known."""
        return known_anatomy(self.model)

    @property
    def generates(self) -> bool:
        """Whether it makes text."""
        return bool(getattr(self.model, "can_generate", lambda: False)())

    def copy_companions(self, folder: Path) -> None:
        """Put the tokenizer, the licence and how text is generated beside what was written."""
        for name in COMPANIONS:
            if (self.folder / name).is_file() and not (folder / name).exists():
                shutil.copyfile(self.folder / name, folder / name)


@contextmanager
def opened(given: str | Path) -> Iterator[Source]:
    """The source that a name means: the folder of a run or of an export, a PEFT folder, a folder or name on the hub.

    Raises:
        ValueError: it is none of these, or cannot be read.
    """
    folder = find_whole(Path(given).expanduser())
    if (folder / RUN_MODEL / CARD).exists():
        folder = folder / RUN_MODEL
    if (folder / ADAPTER).exists():
        with _merged(folder) as merged:
            yield Source(str(given), merged)
        return
    if not folder.exists():
        folder = Path(resolve_model(str(given)))
        if not folder.exists():
            folder = _from_hub(str(given))
    if not (folder / "config.json").exists():
        raise ValueError(f"export: {given} is no run, no export, no PEFT folder and no model; it has no config.json")
    yield Source(str(given), folder)


@contextmanager
def staged(model: nn.Module) -> Iterator[Source]:
    """A patched model in memory as a source."""
    with tempfile.TemporaryDirectory() as scratch:
        yield Source(type(model).__name__, export_model(model, Path(scratch) / "model"))


def _load_stock(folder: Path) -> Any:
    import transformers

    check_model_folder(folder, "export")
    names = read_json_table(folder / "config.json", "export").get("architectures") or []
    kind = getattr(transformers, str(names[0]), None) if names else None
    if kind is None:
        raise ValueError(f"export: {folder / 'config.json'} names no class of transformers, but {names}")
    try:
        return kind.from_pretrained(folder, dtype="auto").eval()
    except UNUSABLE as error:
        raise ValueError(f"export: {folder} cannot be loaded: {reason_of(error)}") from None


def _from_hub(name: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]))
    except (OSError, ValueError) as error:
        raise ValueError(f"export: there is no folder {name}, and the hub gives none: {reason_of(error)}") from None


@contextmanager
def _merged(folder: Path) -> Iterator[Path]:
    """A PEFT adapter and its base as one plain folder."""
    try:
        import peft
    except ImportError:
        raise ImportError('export: a PEFT folder is read by peft: pip install "apt-lm[peft]"') from None
    base = str(read_json_table(folder / ADAPTER, "export").get("base_model_name_or_path") or "")
    with tempfile.TemporaryDirectory() as scratch:
        try:
            plain = _load_stock(Path(resolve_model(base)) if Path(resolve_model(base)).exists() else _from_hub(base))
            merged: Any = peft.PeftModel.from_pretrained(plain, str(folder)).merge_and_unload()
        except UNUSABLE as error:
            raise ValueError(f"export: {folder} on {base!r} cannot be loaded: {reason_of(error)}") from None
        merged.save_pretrained(scratch)
        source = Source(str(folder), Path(scratch))
        for place in (folder, Path(resolve_model(base))):
            if place.is_dir():
                Source(str(place), place).copy_companions(source.folder)
        yield source.folder
