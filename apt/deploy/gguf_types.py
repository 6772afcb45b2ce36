"""Number types of a GGUF file: those that the package gguf writes, and the mixtures of llama.cpp's quantiser."""

from collections import Counter
from pathlib import Path

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Kind
from gguf import LlamaFileType
from torch import Tensor

F32 = "f32"
PLAIN = {  # name -> type of the matrices, and what the file says of itself
    F32: (Kind.F32, LlamaFileType.ALL_F32),
    "f16": (Kind.F16, LlamaFileType.MOSTLY_F16),
    "bf16": (Kind.BF16, LlamaFileType.MOSTLY_BF16),
    "q8_0": (Kind.Q8_0, LlamaFileType.MOSTLY_Q8_0),
    "q5_0": (Kind.Q5_0, LlamaFileType.MOSTLY_Q5_0),
    "q5_1": (Kind.Q5_1, LlamaFileType.MOSTLY_Q5_1),
    "q4_0": (Kind.Q4_0, LlamaFileType.MOSTLY_Q4_0),
    "q4_1": (Kind.Q4_1, LlamaFileType.MOSTLY_Q4_1),
}
MIXED = {  # name -> file type of llama.cpp's quantiser, which chooses a type for each matrix
    "q6_k": LlamaFileType.MOSTLY_Q6_K,
    "q5_k_m": LlamaFileType.MOSTLY_Q5_K_M,
    "q5_k_s": LlamaFileType.MOSTLY_Q5_K_S,
    "q4_k_m": LlamaFileType.MOSTLY_Q4_K_M,
    "q4_k_s": LlamaFileType.MOSTLY_Q4_K_S,
    "iq4_nl": LlamaFileType.MOSTLY_IQ4_NL,
    "iq4_xs": LlamaFileType.MOSTLY_IQ4_XS,
    "q3_k_m": LlamaFileType.MOSTLY_Q3_K_M,
    "q2_k": LlamaFileType.MOSTLY_Q2_K,
}
QUARTERS = (Kind.Q5_0, Kind.Q5_1, Kind.Q4_0, Kind.Q4_1)  # too coarse for embeddings and head, which get q8_0
OUTER = ("token_embd.weight", "output.weight")
WHOLE = ("position_embd.weight",)  # added to the stream as it is read


def type_of(name: str, tensor: Tensor, wanted: Kind) -> Kind:
    """The type in which a tensor is written: vectors stay float32, rows that no block divides are float16.

    Args:
        name: of the tensor.
        tensor: its numbers.
        wanted: of matrices.
    """
    if tensor.dim() < 2 or name in WHOLE:
        return Kind.F32
    kind = Kind.Q8_0 if name in OUTER and wanted in QUARTERS else wanted
    block, _ = gguf.GGML_QUANT_SIZES[kind]
    return kind if tensor.shape[-1] % block == 0 else Kind.F16


def numbers(tensor: Tensor, kind: Kind) -> np.ndarray:
    """A tensor in a type, as its bytes lie in the file where that is none of numpy's."""
    values = np.ascontiguousarray(tensor.numpy(), dtype=np.float32)
    if kind == Kind.F32:
        return values
    return values.astype(np.float16) if kind == Kind.F16 else gguf.quants.quantize(values, kind)


def quantise_file(source: Path, target: Path, name: str) -> None:
    """Let llama.cpp write a float32 file in one of `MIXED`.

    Raises:
        ImportError: cyllama is missing.
        ValueError: llama.cpp refuses.
    """
    try:
        from cyllama.llama import llama_cpp
    except ImportError:
        raise ImportError(f'export: {name} is made by llama.cpp\'s quantiser: pip install "apt-lm[llamacpp]"') from None
    llama_cpp.disable_logging()
    settings = llama_cpp.LlamaModelQuantizeParams()
    settings.ftype = int(MIXED[name])
    settings.nthread = 1
    try:
        llama_cpp.model_quantize(str(source), str(target), settings)
    except RuntimeError as error:
        raise ValueError(f"export: llama.cpp does not quantise {source.name} to {name}: {error}") from None


def ragged_note(path: Path, name: str, hidden: int) -> str | None:
    """One line on the matrices whose rows no block of a type divides; None where there are none.

    Args:
        path: a file that was written.
        name: of the type.
        hidden: width of the stream, which pruning of units does not change.
    """
    block = gguf.GGML_QUANT_SIZES[PLAIN[name][0]][0] if name in PLAIN else gguf.QK_K
    matrices = [t for t in gguf.GGUFReader(path).tensors if len(t.shape) > 1 and t.name not in WHOLE]
    ragged = [t for t in matrices if int(t.shape[0]) % block]
    if not ragged:
        return None
    kinds = Counter(t.tensor_type.name.lower() for t in ragged)
    told = ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items()))
    widths = sorted({int(t.shape[0]) for t in ragged})
    some = ", ".join(map(str, widths[:6])) + (", ..." if len(widths) > 6 else "")
    cure = f"prune with round_to={block} to avoid it"
    if hidden in widths:
        cure = f"round_to={block} avoids it but in the rows of {hidden}, the width of the stream"
    return (
        f"{len(ragged)} of {len(matrices)} matrices are not {name} but {told}: its blocks of {block} do not divide "
        f"rows of {some}; {cure}"
    )
