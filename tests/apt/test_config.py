"""RunConfig: what a file and overrides may say, and what each mistake is answered with."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from apt.runs.config import KEYS, SECTIONS, RunConfig, load_config

ROOT = Path(__file__).parents[2]
DEMO = ROOT / "examples/demo.yaml"
MINIMAL = {"output_dir": "runs/x", "model": {"name": "m"}, "data": {"datasets": "d"}}


def write(folder: Path, document: object) -> Path:
    path = folder / "config.yaml"
    path.write_text(document if isinstance(document, str) else yaml.safe_dump(document), encoding="utf-8")
    return path


@pytest.fixture
def minimal(tmp_path: Path) -> Path:
    return write(tmp_path, MINIMAL)


def test_minimal_file_has_the_defaults_of_the_rooms(minimal: Path) -> None:
    config = load_config(minimal)
    assert config.pruning == SECTIONS["pruning"]()
    assert (config.training.initial_rank, config.data.max_length, config.model.method) == (8, 128, "apt")


def test_every_setting_survives_yaml(minimal: Path, tmp_path: Path) -> None:
    config = load_config(minimal, ["filter={a: b, n: 3}", "target_modules=[q, v]", "test_size=7", "prune_end=300"])
    copied = tmp_path / "copy.yaml"
    copied.write_text(config.to_yaml(), encoding="utf-8")
    assert load_config(copied) == config
    sections = yaml.safe_load(config.to_yaml())
    assert {f"{name}.{key}" for name in SECTIONS for key in sections[name]} | {"output_dir", "ablation"} == set(KEYS)


def test_demo_is_what_the_issue_asks_for() -> None:
    config = load_config(DEMO)
    assert set(yaml.safe_load(DEMO.read_text(encoding="utf-8"))) == {"output_dir", *SECTIONS} - {
        "adapter",
        "prompt",
    }  # APT has none of its own
    assert (config.output_dir, config.data.test_size, config.data.max_length) == ("runs/demo", 2000, 64)
    assert (config.training.learning_rate, config.training.batch_size, config.training.weight_decay) == (1e-3, 32, 0.0)
    method = config.apt_config()
    assert (method.rank, method.scale, method.target_modules) == (8, 2.0, ("q", "v", "up", "down"))
    assert (method.pruning.target_sparsity, method.pruning.prune_end) == (0.6, 0.33)


def test_overrides_by_full_name_leaf_and_shorthand(minimal: Path) -> None:
    given = ["training.seed=3", "target_sparsity=0.8", "model=bert", "dataset=glue/sst2", "output_dir=2024"]
    config = load_config(minimal, given)
    assert (config.training.seed, config.pruning.target_sparsity) == (3, 0.8)
    assert (config.model.name, config.data.datasets, config.output_dir) == ("bert", "glue/sst2", "2024")


def test_dataset_shorthand_drops_what_belongs_to_the_old_source() -> None:
    config = load_config(DEMO, ["test_size=9", "dataset=glue/sst2"])
    assert (config.data.filter, config.data.drop_duplicates, config.data.test_size) == (None, False, 9)
    assert config.data.max_length == 64
    assert load_config(DEMO, ["data.datasets=x.csv"]).data.filter == {"source": "rotten_tomatoes"}


def test_kurtosis_may_be_off(tmp_path: Path, minimal: Path) -> None:
    """YAML reads a bare off as false."""
    bare = tmp_path / "off.yaml"
    bare.write_text(minimal.read_text(encoding="utf-8") + "pruning: {kurtosis: off}\n", encoding="utf-8")
    assert load_config(bare).pruning.kurtosis == load_config(minimal, ["kurtosis=off"]).pruning.kurtosis == "off"
    assert load_config(minimal).pruning.kurtosis is None
    assert load_config(minimal, ["kurtosis=normalized"]).pruning.kurtosis == "normalized"


def test_numbers_that_yaml_reads_as_text(minimal: Path) -> None:
    config = load_config(
        minimal, ["learning_rate=1e-3", "prune_end=25", "prune_start=1e-2", "epochs=2", "init_std=null"]
    )
    assert (config.training.learning_rate, config.training.epochs, config.tuning.init_std) == (1e-3, 2.0, None)
    assert isinstance(config.training.epochs, float)
    # An int is an absolute step there, a float a fraction of the run.
    assert isinstance(config.pruning.prune_end, int)
    assert config.pruning.prune_start == 0.01


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("pruning.target_sparcity=0.5", "unknown key 'pruning.target_sparcity'.*did you mean pruning.target_sparsity"),
        ("learning_rat=1", "did you mean training.learning_rate"),
        ("seed", "key=value, got 'seed'"),
        ("zzzzzz=1", "unknown key 'zzzzzz'; there are output_dir, ablation, model.name"),
        ("batch_size=many", "training.batch_size must be a whole number, got 'many'"),
        ("batch_size=1.5", "training.batch_size must be a whole number, got 1.5"),
        ("batch_size=true", "training.batch_size must be a whole number, got True"),
        ("batch_size=0", "training.batch_size must be at least 1, got 0"),
        ("learning_rate=fast", "training.learning_rate must be a number, got 'fast'"),
        ("learning_rate=.nan", "training.learning_rate must be a number, got nan"),
        ("group_by_length=1", "data.group_by_length must be true or false, got 1"),
        ("num_labels=two", "model.num_labels must be a whole number or null"),
        ("num_labels=1", "model.num_labels must be at least 2"),
        ("text_columns=text", "data.text_columns must be a list of names or null, got 'text'"),
        ("text_columns=[a, b, c]", "one or two columns"),
        ("filter=x", "data.filter must be a table of column: value or null"),
        ("filter={a", "data.filter cannot be read"),
        ("target_sparsity=1.0", r"target_sparsity must be in \[0, 1\), got 1.0"),
        ("target_sparsity=-0.1", r"target_sparsity must be in \[0, 1\), got -0.1"),
        ("method=lara", "model.method must be one of .*apt.*, got 'lara'"),
        ("precision=fp8", "hardware.precision must be one of"),
        ("epochs=0", "training.epochs must be above 0"),
        ("max_steps=0", "training.max_steps at least 1 or -1"),
        ("momentum_salience=1.0", r"must be in \[0, 1\)"),
        ("tau=0", "w_pred and w_layer must be at least 0 and tau above 0, got None, 0.9 and 0.0"),
        ("distillation.distill_end=1.5", r"distill_end must be a fraction in \[0, 1\] or a number of steps, got 1.5"),
        ("held_out_share=0", r"held_out_share must be in \(0, 0.5\], got 0.0"),
    ],
)
def test_wrong_overrides(minimal: Path, override: str, words: str) -> None:
    with pytest.raises(ValueError, match=words) as caught:
        load_config(minimal, [override])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("document", "words"),
    [
        ({**MINIMAL, "prunning": {}}, "unknown key 'prunning'; did you mean pruning"),
        ({**MINIMAL, "training": {"lr": 1}}, "unknown key 'training.lr'"),
        ({**MINIMAL, "training": 3}, "section training must hold keys and values, got 3"),
        ({"output_dir": "x", "data": {"datasets": "d"}}, "model.name is missing"),
        ({"model": {"name": "m"}, "data": {"datasets": "d"}}, "output_dir is missing"),
        ("model: [", "is not YAML: .*line 1"),
        ("just text", "must hold the sections"),
    ],
)
def test_wrong_files(tmp_path: Path, document: object, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        load_config(write(tmp_path, document))


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"there is no file .*nothing.yaml"):
        load_config(tmp_path / "nothing.yaml")


def test_an_empty_section_is_its_defaults(tmp_path: Path) -> None:
    assert load_config(write(tmp_path, {**MINIMAL, "pruning": None})).pruning == SECTIONS["pruning"]()


def test_every_leaf_is_the_name_of_one_setting() -> None:
    leaves = [leaf.name for room in SECTIONS.values() for leaf in dataclasses.fields(room)]
    assert len(set(leaves)) == len(leaves)
    assert dataclasses.is_dataclass(RunConfig)


def test_reading_a_config_stays_light() -> None:
    code = "import sys, apt.runs.config; print(*sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    heavy = {"transformers", "datasets", "pandas", "sklearn", "rich"} & set(run.stdout.split())
    assert not heavy
