"""OpenVINO's files: converted by transformers' exporter, int8 weights by NNCF."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import openvino
from numpy.typing import NDArray
from transformers.exporters.configs import OpenVINOConfig
from transformers.exporters.exporter_openvino import OpenVINOExporter
from transformers.exporters.quantizers.quantizer_nncf import NNCFOpenVINOQuantizer, NNCFWeightCompressionConfig

from apt.deploy.driving import Arrays, compare_graphs
from apt.deploy.formats import Comparison
from apt.deploy.graphs import Graph, graphs_of, traceable, traced, why_no_graph
from apt.deploy.source import Source

QUANTISED = ("int8",)
PREFIX = "openvino_"


def refuse(source: Source) -> str | None:
    """Sizes of a graph are those of its weights, so only what a graph cannot decide."""
    return why_no_graph(source)


def write(source: Source, folder: Path, quantise: str | None) -> list[str]:
    """Two files a graph, with the configuration beside them; a decoder keeps its cache inside.

    Behind an encoder it is two graphs, and what is inside one the other cannot read: there keys and values come and go.
    """
    model, notes = traceable(source.model)
    config = OpenVINOConfig(
        dynamic=True,
        stateful=not model.config.is_encoder_decoder,
        quantizer=NNCFOpenVINOQuantizer(NNCFWeightCompressionConfig()) if quantise else None,
    )
    for graph in graphs_of(model):
        program = traced(graph, OpenVINOExporter, config)
        _rename(program, graph)
        openvino.save_model(program, folder / f"{PREFIX}{graph.stem}.xml", compress_to_fp16=False)
    model.config.save_pretrained(folder)
    return notes


def compare(source: Source, folder: Path, quantise: str | None) -> Comparison:
    """Run the graphs in OpenVINO, in float32: on some CPUs its default is bfloat16."""
    model, _ = traceable(source.model)
    return compare_graphs(f"openvino {openvino.__version__.partition('-')[0]}", lambda: Requests(folder), model)


class Requests:
    """The graphs of a folder in OpenVINO, on the CPU, each with what its decoder has read.

    Args:
        folder: where they lie.
        settings: of the device, beside the precision.
    """

    def __init__(self, folder: Path, **settings: Any) -> None:
        core = openvino.Core()
        told = {"INFERENCE_PRECISION_HINT": "f32", **settings}
        self.requests = {
            path.stem.removeprefix(PREFIX): core.compile_model(path, "CPU", told).create_infer_request()
            for path in sorted(folder.glob(f"{PREFIX}*.xml"))
        }

    def __call__(self, stem: str, feed: Mapping[str, NDArray[Any]]) -> Arrays:
        """The outputs of a graph by name."""
        request = self.requests[stem]
        known = {name: feed[name] for port in request.model_inputs for name in port.get_names() if name in feed}
        made = request.infer(known)
        return {name: value for port, value in made.items() for name in port.get_names()}


def _rename(program: openvino.Model, names: Graph) -> None:
    for port in program.inputs:
        port.get_tensor().set_names({names.input_name(name) for name in port.get_names()})
    for port in program.outputs:
        port.get_tensor().set_names({names.output_name(name) for name in port.get_names()})
