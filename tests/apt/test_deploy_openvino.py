"""``--to openvino``: what OpenVINO makes of a pruned model, beside torch, layers without heads or neurons included."""

from pathlib import Path

import pytest
from deployed import CASES, assert_computed, deployed, share_of_equal_classes

pytestmark = pytest.mark.deploy
for package in ("openvino", "nncf"):
    pytest.importorskip(package)

READ = {"input_ids", "attention_mask"}
PORTS = {
    "bert": READ | {"token_type_ids"},
    "llama_gqa": READ | {"position_ids", "beam_idx"},  # its cache is inside
}


@pytest.mark.parametrize(("name", "layout"), CASES)
def test_the_program_computes_the_model(name: str, layout: str, tmp_path: Path) -> None:
    assert_computed(name, layout, "openvino", tmp_path)
    if name in PORTS and layout == "free":
        assert ports(tmp_path / "written") == PORTS[name]


def ports(folder: Path) -> set[str]:
    from apt.deploy.openvino import Requests

    return {port.any_name for port in Requests(folder).requests["model"].model_inputs}


@pytest.mark.slow
def test_int8_names_the_same_classes(tmp_path: Path) -> None:
    from apt.deploy.openvino import Requests

    source = deployed("bert", "free", "openvino", tmp_path, "int8")
    assert share_of_equal_classes(Requests(tmp_path / "written"), source.model) > 0.9
