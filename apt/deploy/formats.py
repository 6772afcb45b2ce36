"""The formats that a model is written in: what each is for, what it needs, and the file that writes it."""

import importlib
import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, cast

if TYPE_CHECKING:
    from apt.deploy.source import Source


@dataclass(frozen=True)
class Comparison:
    """What a program made of a written model, beside the model in torch.

    Args:
        program: its name and version.
        difference: the largest difference of a logit, over the largest logit; None where a program shows none.
        same_text: whether greedy text is the same; None of a model that makes none.
    """

    program: str
    difference: float | None
    same_text: bool | None = None

    def told(self) -> str:
        """One line."""
        parts = []
        if self.difference is not None:
            parts.append(f"logits within {self.difference:.1e} of the largest")
        if self.same_text is not None:
            parts.append("the same text" if self.same_text else "ANOTHER TEXT")
        return f"{self.program}: {', '.join(parts)}"


class Writer(Protocol):
    """What the module of a format has."""

    QUANTISED: Sequence[str]  # what `quantise` may be, beside None; the first is not the default

    def refuse(self, source: "Source") -> str | None:
        """What of this model the format cannot say, in words; None where it can say all. Nothing is written."""

    def write(self, source: "Source", folder: Path, quantise: str | None) -> list[str]:
        """Write the files into a folder that is there and empty; what was padded or left out, a line each."""

    def compare(self, source: "Source", folder: Path, quantise: str | None) -> Comparison:
        """Load what was written in the program that it is for, and run both on the same inputs."""


@dataclass(frozen=True)
class Format:
    """One format.

    Args:
        what: who reads it.
        needs: packages that writing it imports.
        checks: packages that `compare` imports beside them.
        extra: of ours that installs them.
    """

    what: str
    needs: tuple[str, ...] = ()
    checks: tuple[str, ...] = ()
    extra: str = ""


FORMATS: dict[str, Format] = {
    "hf": Format("transformers, and apt.load_model"),
    "hf-remote": Format("transformers without this package, with trust_remote_code=True where layers differ in size"),
    "gguf": Format("llama.cpp", needs=("gguf",), checks=("cyllama",), extra="llamacpp"),
    "onnx": Format("ONNX Runtime", ("onnx", "onnxscript", "onnxruntime"), extra="onnx"),
    "openvino": Format("OpenVINO", ("openvino", "nncf"), extra="openvino"),
    "hf-uniform": Format("transformers alone: AutoModel"),
    "mlx": Format("mlx-lm", checks=("mlx_lm",), extra="mlx"),
    "vllm": Format("vLLM", checks=("vllm",), extra="vllm"),
}


def writer_of(name: str, *, check: bool = False) -> Writer:
    """The module that writes a format.

    Args:
        name: of the format.
        check: whether the result is to be run, too.

    Raises:
        ValueError: there is no such format.
        ImportError: a package that it needs is missing.
    """
    if name not in FORMATS:
        raise ValueError(f"export: there is no format {name!r}; give one of {', '.join(FORMATS)}")
    known = FORMATS[name]
    for package in (*known.needs, *(known.checks if check else ())):
        if importlib.util.find_spec(package) is None:
            what = "checking" if package in known.checks else "writing"
            raise ImportError(f'export: {what} {name} needs {package}: pip install "apt-lm[{known.extra}]"')
    return cast(Writer, importlib.import_module(f"apt.deploy.{name.replace('-', '_')}"))
