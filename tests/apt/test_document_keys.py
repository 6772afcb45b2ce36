"""The settings of the first documents: every key they name is accepted, and does what they say it does."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from apt.apt_config import APTConfig
from apt.cli import main
from apt.pruning import PruningConfig
from apt.runs.arguments import optimizer_class
from apt.runs.config import RunConfig, load_config
from apt.runs.config.document_keys import DOCUMENT_KEYS, MEANING
from apt.training.controller.timeline import Timeline

DOCUMENT = """
output_dir: runs/x
model:
  architectures: [roberta]
  adapter:
    mha_components: [q_proj, v_proj]
    apply_to_ffn: true
data:
  datasets: glue/sst2
  max_length: 128
training:
  initial_rank: 8
  scaling_factor: 2.0
  momentum_salience: 0.85
  optimizer: adam
  learning_rate: 2e-4
  weight_decay: 0.1
  max_grad_norm: 1.0
  epochs: 40
pruning:
  target_sparsity: 0.6
  scheduler: cubic
  update_frequency: 100
  use_kurtosis: true
tuning:
  adaptive_rank_update: true
  rank_increase_strategy: top_half
  max_tuning_params_ratio: 0.05
  init_std: 0.02
  update_frequency: 50
distillation:
  use_self_distillation: true
  teacher_layer_mapping: nearest
  num_teacher_layers: 4
  distill_loss_weight_start: 0.0
  distill_loss_weight_end: 1.0
evaluation:
  inference_batch_size: 128
  metrics: {classification: accuracy, qa: [f1], summarization: [rouge1, rouge2, rougeL]}
hardware:
  precision: fp16
"""


def read(folder: Path, document: dict[str, Any], overrides: list[str] | None = None) -> RunConfig:
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(document), encoding="utf-8")
    return load_config(path, overrides)


@pytest.fixture
def document() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(DOCUMENT)
    return found


def test_a_config_in_the_words_of_the_documents(tmp_path: Path, document: dict[str, Any]) -> None:
    config = read(tmp_path, document)
    assert config.model.name == "FacebookAI/roberta-base"
    assert config.model.target_modules == ["q", "v", "up"]
    assert (config.pruning.kurtosis, config.tuning.growth_frequency) == ("paper", 50)
    assert config.evaluation.metrics == ["accuracy"]
    method = config.apt_config()
    timeline = Timeline.of(method, 1000)  # the window is steps 20 to 400
    assert timeline.pruning.events == [146, 273, 400]  # 380 // 100 intervals of about 127 steps
    assert len(timeline.tuning.events) == 7
    assert timeline.tuning.events[-1] == 400
    copy = tmp_path / "copy.yaml"
    copy.write_text(config.to_yaml(), encoding="utf-8")
    assert load_config(copy) == config


@pytest.mark.parametrize(
    ("adapter", "roles"),
    [
        ({"mha_components": ["query", "key", "value", "o_proj"]}, ["q", "k", "v", "o"]),
        ({"mha_components": ["q_proj"], "apply_to_ffn": False}, ["q"]),
        ({"apply_to_ffn": True}, ["q", "v", "up"]),
        ({"apply_to_ffn": ["intermediate_dense", "output_dense"]}, ["q", "v", "up", "down"]),
        ({}, None),
    ],
)
def test_where_adapters_go(tmp_path: Path, document: dict[str, Any], adapter: object, roles: object) -> None:
    document["model"]["adapter"] = adapter
    assert read(tmp_path, document).model.target_modules == roles


def test_an_override_stands_above_a_file_in_either_words(tmp_path: Path, document: dict[str, Any]) -> None:
    assert read(tmp_path, document, ["use_kurtosis=false"]).pruning.kurtosis == "off"
    assert read(tmp_path, document, ["kurtosis=normalized"]).pruning.kurtosis == "normalized"
    assert read(tmp_path, document, ["model=bert"]).model.name == "bert"
    assert read(tmp_path, document, ["target_modules=[k]"]).model.target_modules == ["k"]
    assert read(tmp_path, document, ["apply_to_ffn=false"]).model.target_modules == ["q", "v"]
    assert read(tmp_path, document, ["model.adapter.mha_components=[k_proj]"]).model.target_modules == ["k", "up"]
    with pytest.raises(ValueError, match=r"give pruning.update_frequency or tuning.update_frequency"):
        read(tmp_path, document, ["update_frequency=3"])


@pytest.mark.parametrize(
    ("section", "content", "words"),
    [
        ("model", {"architectures": ["roberta", "t5"]}, "model.architectures must name one model"),
        ("model", {"name": "a", "architectures": "b"}, "model.architectures and model.name are one setting"),
        (
            "model",
            {"name": "a", "adapter": {"mha": 1}},
            "unknown key 'model.adapter.mha'; did you mean model",
        ),
        ("model", {"name": "a", "adapter": 3}, "unknown key 'model.adapter'"),
        ("model", {"name": "a", "adapter": {"mha_components": ["dense"]}}, "must name some of q, q_proj, .*'dense'"),
        ("evaluation", {"metrics": {"classification": "pearson"}}, "evaluation.metrics.* must be one of .*'pearson'"),
        ("evaluation", {"metrics": {"classification": 3}}, "classification must name metrics, got 3"),
        ("pruning", {"use_kurtosis": "yes please"}, "use_kurtosis must be true or false"),
        ("pruning", {"scheduler": "linear"}, r"scheduler must be one of \['cubic'\], got 'linear'"),
        ("pruning", {"update_frequency": 0}, "update_frequency must be at least 1"),
        ("tuning", {"update_frequency": 0}, "growth_frequency must be at least 1"),
        ("tuning", {"update_frequency": 9, "num_tuning_events": 2}, "give one of them"),
        ("training", {"optimizer": "adamm"}, "training.optimizer must be one of .*'adam'"),
    ],
)
def test_what_is_wrong_with_them(
    tmp_path: Path, document: dict[str, Any], section: str, content: dict[str, Any], words: str
) -> None:
    document[section] = content
    with pytest.raises(ValueError, match=words):
        read(tmp_path, document)


def test_the_flags_of_the_documents(
    tmp_path: Path, document: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    read(tmp_path, document)
    flags = ["--model_type", "t5", "--dataset", "glue/mnli", "--sparsity_level", "0.3", "--ablation", "w/o_Ds"]
    assert main(["config", str(tmp_path / "config.yaml"), *flags, "seed=5"]) == 0
    shown = yaml.safe_load(capsys.readouterr().out)
    assert (shown["model"]["name"], shown["data"]["datasets"]) == ("google/t5-base-lm-adapt", "glue/mnli")
    assert (shown["pruning"]["target_sparsity"], shown["training"]["seed"]) == (0.3, 5)
    assert not shown["distillation"]["use_self_distillation"]
    assert main(["config", str(tmp_path / "config.yaml"), "--sparsity_level", "much"]) == 2


def test_every_key_of_the_documents_is_explained() -> None:
    assert set(MEANING) == set(DOCUMENT_KEYS)


def test_without_pruning_ranks_grow_as_often() -> None:
    config = APTConfig(pruning=PruningConfig(update_frequency=100), ablation="w/o_Ap")
    timeline = Timeline.of(config, 1000)
    assert (timeline.prune_steps, timeline.tuning.events) == ([], [146, 273, 400])
    assert Timeline.of(config.with_overrides(rank=4), 1000) == timeline


def test_the_optimizer_is_the_one_asked_for(tmp_path: Path, document: dict[str, Any]) -> None:
    chosen = optimizer_class(read(tmp_path, document).training)
    assert chosen is not None
    assert (chosen[0].__name__, chosen[1]) == ("Adam", {"lr": 2e-4})
    assert optimizer_class(read(tmp_path, document, ["optimizer=adamw"]).training) is None
