"""ONNX, for ONNX Runtime and what is built on it: traced by transformers' exporter, int8 by ONNX Runtime's own."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir
import onnxruntime
from numpy.typing import NDArray
from onnxruntime.quantization import QuantType
from transformers.exporters.configs import OnnxConfig
from transformers.exporters.exporter_onnx import OnnxExporter
from transformers.exporters.quantizers.quantizer_onnxruntime import OnnxRuntimeDynamicConfig, OnnxRuntimeQuantizer

from apt.deploy.driving import Arrays, compare_graphs
from apt.deploy.formats import Comparison
from apt.deploy.graphs import IDLE, Graph, graphs_of, traceable, traced, why_no_graph
from apt.deploy.source import Source

QUANTISED = ("int8",)
WHOLE = 1536 * 2**20  # bytes of weights that a file holds beside its graph; protobuf ends at 2 GB


def refuse(source: Source) -> str | None:
    """Sizes of a graph are those of its weights, so only what a graph cannot decide."""
    return why_no_graph(source)


def write(source: Source, folder: Path, quantise: str | None) -> list[str]:
    """One file a graph, with the configuration beside it."""
    model, notes = traceable(source.model)
    config = OnnxConfig(dynamic=True, quantizer=_quantizer() if quantise else None)
    for graph in graphs_of(model):
        program = traced(graph, OnnxExporter, config)
        _rename(program.graph, graph)
        if quantise:
            notes.append(f"{graph.stem}.onnx: {_told(program)}")
        _save(program, folder / f"{graph.stem}.onnx")
    model.config.save_pretrained(folder)
    return notes


def compare(source: Source, folder: Path, quantise: str | None) -> Comparison:
    """Run the graphs in ONNX Runtime."""
    model, _ = traceable(source.model)
    return compare_graphs(f"onnxruntime {onnxruntime.__version__}", lambda: Sessions(folder), model)


class Sessions:
    """The graphs of a folder in ONNX Runtime, on the CPU.

    Args:
        folder: where they lie.
        threads: of an operator; 0 is all cores.
    """

    def __init__(self, folder: Path, threads: int = 0) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        self.sessions = {
            path.stem: onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
            for path in sorted(folder.glob("*.onnx"))
        }

    def __call__(self, stem: str, feed: Mapping[str, NDArray[Any]]) -> Arrays:
        """The outputs of a graph by name; keys and values that are not given are those of no token."""
        session = self.sessions[stem]
        rows = len(next(iter(feed.values())))
        known = {}
        for port in session.get_inputs():
            if port.name in feed:
                known[port.name] = feed[port.name]
            else:
                known[port.name] = np.zeros((rows, port.shape[1], 0, port.shape[3]), np.float32)
        names = [port.name for port in session.get_outputs()]
        return dict(zip(names, session.run(names, known), strict=True))


def _quantizer() -> OnnxRuntimeQuantizer:
    return OnnxRuntimeQuantizer(OnnxRuntimeDynamicConfig(per_channel=True, weight_type=QuantType.QInt8))


def _rename(graph: onnx_ir.Graph, names: Graph) -> None:
    for value in graph.inputs:
        value.name = names.input_name(str(value.name))
        # The exporter writes a size that tracing found to be fixed as a name of digits.
        sizes = [str(size.value if isinstance(size, onnx_ir.SymbolicDim) else size) for size in value.shape or ()]
        value.shape = onnx_ir.Shape([int(size) if size.isdigit() else size for size in sizes])
    for value in list(graph.outputs):
        if value.name == IDLE:
            graph.outputs.remove(value)
        else:
            value.name = names.output_name(str(value.name))


def _told(program: onnx_ir.Model) -> str:
    """How many products with weights are in int8."""
    kinds = [node.op_type for node in program.graph if node.op_type.startswith("MatMulInteger")]
    rest = [node for node in program.graph if node.op_type in ("MatMul", "Gemm") and _has_weight(node)]
    return f"{len(kinds)} of {len(kinds) + len(rest)} products with weights in int8"


def _has_weight(node: onnx_ir.Node) -> bool:
    value = node.inputs[1]
    made_by = value.producer() if value is not None else None
    if made_by is not None and made_by.op_type == "Transpose":
        value = made_by.inputs[0]
    return value is not None and value.is_initializer()


def _save(program: onnx_ir.Model, path: Path) -> None:
    """One file, or where it would be too large, the weights in a second."""
    values = program.graph.initializers.values()
    size = sum(value.const_value.nbytes for value in values if value.const_value is not None)
    onnx_ir.save(program, path, external_data=None if size < WHOLE else f"{path.name}_data")
