"""``--to onnx``: what ONNX Runtime makes of a pruned model, beside torch, layers without heads or neurons included."""

from pathlib import Path

import pytest
from deployed import CASES, assert_computed, deployed, share_of_equal_classes

pytestmark = pytest.mark.deploy
for package in ("onnxruntime", "onnxscript"):
    pytest.importorskip(package)

READ = {"input_ids", "attention_mask"}
PORTS = {
    "bert": READ | {"token_type_ids"},
    # Nothing of layer 1, which has no heads.
    "llama_gqa": READ | {"position_ids", "past_key_values.0.key", "past_key_values.0.value"},
}


@pytest.mark.parametrize(("name", "layout"), CASES)
def test_the_program_computes_the_model(name: str, layout: str, tmp_path: Path) -> None:
    assert_computed(name, layout, "onnx", tmp_path)
    if name in PORTS and layout == "free":
        assert ports(tmp_path / "written") == PORTS[name]


def ports(folder: Path) -> set[str]:
    from apt.deploy.onnx import Sessions

    return {port.name for port in Sessions(folder).sessions["model"].get_inputs()}


@pytest.mark.slow
def test_int8_names_the_same_classes(tmp_path: Path) -> None:
    from apt.deploy.onnx import Sessions

    source = deployed("bert", "free", "onnx", tmp_path, "int8")
    assert share_of_equal_classes(Sessions(tmp_path / "written"), source.model) > 0.9
