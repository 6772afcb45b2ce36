"""The estimate against exact counts, against real tensors, and against the memory of a process that trains."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import yaml
from tiny_models import MODELS, SIZES
from tiny_run import write_config
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from apt.cli import main
from apt.runs.config import RunConfig, load_config
from apt.runs.estimate.dry_run import build_on_meta
from apt.runs.estimate.estimate import Estimate, estimate
from apt.runs.estimate.footprint import forward_flops, measure_step
from apt.runs.estimate.simulation import batch_for
from apt.surgery import patch_model

ROOT = Path(__file__).parents[2]
SHAPE = {
    "model_type": "bert",
    "vocab_size": 99,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "max_position_embeddings": 64,
}
TRAIN = """
import os, sys, torch, apt, apt.runs.run
from apt.runs.config import load_config
from apt.runs.estimate.dry_run import build_on_meta
from apt.runs.estimate.simulation import batch_for

def kilobytes(field):
    return int(open("/proc/self/status").read().split(field + ":")[1].split()[0])

def steps(config, count):
    model = apt.patch_model(build_on_meta(config, "cpu"), config.apt_config()).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    run = apt.Controller(model, optimizer, 1000)
    rows, length = config.training.batch_size, config.data.max_length
    for _ in range(count):
        batch = batch_for(config, model, rows, length)
        run.loss(model(**batch), batch).backward()
        run.after_backward()
        optimizer.step()
        run.after_step()
        optimizer.zero_grad()

for path in sys.argv[1:]:  # each in a process of its own, forked before anything is computed
    if os.fork():
        assert os.wait()[1] == 0
        continue
    steps(load_config(path, ["training.batch_size=1", "data.max_length=4"]), 2)
    before = kilobytes("VmRSS")
    steps(load_config(path), 3)
    print((kilobytes("VmHWM") - before) * 1024, flush=True)
    os._exit(0)
"""
PEAKS = {  # rows, tokens, width, and whether there is a teacher
    "most rows": (64, 64, 128, False),
    "most width": (128, 32, 256, False),
    "taught": (64, 64, 256, True),
}


def config_of(folder: Path, *overrides: str, **sections: dict[str, Any]) -> Path:
    document: dict[str, Any] = {
        "output_dir": str(folder / "run"),
        "model": {"name": "none", "shape": SHAPE, "target_modules": ["q", "v", "up", "down"], "num_labels": 2},
        "data": {"datasets": "none.csv", "max_length": 16},
        "training": {"batch_size": 8, "max_steps": 100},
        "pruning": {"target_sparsity": 0.5, "num_events": 3},
        "distillation": {"use_self_distillation": False},
        "hardware": {"device": "cpu"},
    }
    for name, section in sections.items():
        document[name] = document[name] | section
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(document), encoding="utf-8")
    return path


def loaded(folder: Path, **sections: dict[str, Any]) -> RunConfig:
    return load_config(config_of(folder, **sections))


def test_every_kind_of_a_network_counted_by_hand() -> None:
    with FakeTensorMode():
        model = nn.Sequential(nn.Linear(8, 16, bias=False), nn.ReLU(), nn.Linear(16, 4, bias=False))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        x = torch.zeros(5, 8)

        def forward() -> tuple[Tensor, list[Tensor]]:
            logits = model(x)
            return logits.sum(), [logits]

        found = measure_step(model, optimizer, forward, {"temporaries": [x]})
    params = 4 * (8 * 16 + 16 * 4)
    assert found.bytes_of["weights"] == params
    assert found.bytes_of["moments"] == params
    assert found.saved == 4 * 5 * 16  # the output of the ReLU, for itself and for the second layer
    assert found.flops == 2 * 5 * (8 * 16 + 16 * 4) + 2 * 5 * (8 * 16 + 2 * 16 * 4)
    # Most is there when the ReLU is undone: its output, the gradients on both sides of it and of the second weight.
    assert found.bytes_of["gradients"] == 4 * 16 * 4
    assert found.bytes_of["activations"] == 4 * 5 * 16


def test_what_gets_no_gradient_has_no_moments() -> None:
    with FakeTensorMode():
        used, idle, x = nn.Linear(8, 4), nn.Linear(8, 4), torch.zeros(5, 8)
        model = nn.ModuleList([used, idle])
        optimizer = torch.optim.AdamW(model.parameters())
        footprints = [measure_step(model, optimizer, lambda: (used(x).sum(), []), {}) for _ in range(2)]
    # Two moments of each number, and a counter of steps, of float32, for the weight and for the bias.
    assert [found.bytes_of["moments"] for found in footprints] == [4 * (2 * (8 * 4 + 4) + 2)] * 2


def test_fake_tensors_keep_what_real_ones_keep(tmp_path: Path) -> None:
    config = loaded(tmp_path)
    counts = []
    for fake in (True, False):
        with FakeTensorMode() if fake else torch.random.fork_rng():
            model = patch_model(build_on_meta(config, "cpu"), config.apt_config()).train()
            batch = batch_for(config, model, 8, 16)
            own = {t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers(), *batch.values())}
            kept: dict[int, torch.UntypedStorage] = {}  # alive, so that no address comes twice

            def keep(tensor: Tensor, kept: Any = kept) -> Tensor:
                kept[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
                return tensor

            with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
                output = model(**batch)
            counts.append(sum(storage.nbytes() for address, storage in kept.items() if address not in own))
            del output
    found = estimate(config, baseline=False).phases["before pruning"]
    assert counts[0] == counts[1]
    # One scalar more or less: the loss is told from what is saved for it.
    assert found.saved == pytest.approx(counts[1], rel=1e-3)


def test_parts_are_exact(tmp_path: Path) -> None:
    config = loaded(tmp_path, model={"shape": SHAPE | {"num_hidden_layers": 3}})  # enough units to meet a goal by
    found = estimate(config, baseline=False)
    first, last = found.phases["before pruning"], found.phases["after the last event"]
    plan = found.plan
    assert first.bytes_of["adapters"] == 4 * plan.adapter_params
    assert first.bytes_of["adapters"] + first.bytes_of["head"] == 4 * plan.trainable_params
    # Two moments and a step counter of each parameter that trains.
    assert 0 <= first.bytes_of["moments"] - 8 * plan.trainable_params <= 4 * 100
    removed = first.bytes_of["weights"] - last.bytes_of["weights"]
    assert removed / 4 == pytest.approx(0.5 * plan.block_params, rel=0.05)
    budget = max(event.rank_budget or 0 for event in plan.events)
    assert 0.8 * budget <= last.bytes_of["adapters"] / 4 <= budget
    assert found.step_speedup == first.flops / last.flops
    assert found.inference_speedup > 1.5
    assert found.baseline is None
    assert found.training_peak == max(phase.peak for phase in found.phases.values())
    assert found.peak == max(found.training_peak, found.measuring)


def test_flops_of_an_encoder_by_closed_form(tmp_path: Path) -> None:
    config = loaded(tmp_path)
    with FakeTensorMode():
        model = build_on_meta(config, "cpu")
        found = forward_flops(model, batch_for(config, model, 8, 16))
    tokens, width, inner = 8 * 16, 64, 128
    layer = 2 * tokens * (4 * width * width + 2 * width * inner) + 2 * 2 * tokens * 16 * width
    assert found == 2 * layer + 2 * 8 * (width * width + 2 * width)


def test_lora_is_its_own_measure(tmp_path: Path) -> None:
    found = estimate(loaded(tmp_path, model={"method": "lora"}), baseline=False)
    assert list(found.phases) == ["before pruning"]
    assert (found.step_speedup, found.inference_speedup, found.run_over_lora) == (1.0, 1.0, 1.0)


def test_a_teacher_adds_its_forward_and_keeps_dense_weights(tmp_path: Path) -> None:
    def found(**settings: Any) -> Estimate:
        return estimate(loaded(tmp_path, distillation=settings), baseline=False)

    alone = found()
    ends, stays = (found(use_self_distillation=True, distill_end=end) for end in (0.9, 1.0))
    assert list(ends.phases) == ["before pruning", "masks fall", "first with a teacher", "after the last event"]
    taught = ends.phases["first with a teacher"].bytes_of["weights"]
    dense, small = (alone.phases[name].bytes_of["weights"] for name in ("before pruning", "after the last event"))
    first, second = (ends.phases[name].bytes_of for name in ("before pruning", "first with a teacher"))
    assert taught - dense == pytest.approx(first["adapters"], rel=0.1)  # of the snapshot; masks of what is gone are not
    assert second["head"] - first["head"] == alone.phases["before pruning"].bytes_of["head"]
    assert ends.phases["after the last event"].bytes_of["weights"] == small
    assert stays.phases["after the last event"].bytes_of["weights"] >= dense
    assert (ends.step_speedup, ends.inference_speedup) == (alone.step_speedup, alone.inference_speedup)
    assert stays.step_speedup < ends.step_speedup
    # A step of LoRA is a forward and the gradients of what comes in, as many products: a forward is half of it.
    seldom = found(use_self_distillation=True, distill_every=2, distill_end=1.0)
    often, half = (teaching.run_over_lora - alone.run_over_lora for teaching in (stays, seldom))
    assert stays.plan.distilled_steps is not None
    assert 0.45 < often / (1.0 - stays.plan.distilled_steps[0] / 100) < 0.55
    assert half == pytest.approx(often / 2, rel=0.05)


# One of each kind of block: the others are made of the same. Two layers are of every kind that a model has.
@pytest.mark.parametrize(
    "name", ["distilbert", "opt_350m", "llama_cls", "qwen2_mixed", "gemma3", "gpt2_cls", "phi3_sliding", "t5_gated"]
)
def test_families_with_a_teacher(tmp_path: Path, name: str) -> None:
    kinds = {"SequenceClassification": "classification", "ConditionalGeneration": "summarization"}
    task = next((task for end, task in kinds.items() if MODELS[name].model.endswith(end)), "language_modeling")
    shape = {"model_type": getattr(transformers, MODELS[name].config).model_type, **SIZES, **MODELS[name].settings}
    shape["num_hidden_layers"] = 2
    if "layer_types" in shape:
        shape["layer_types"] = shape["layer_types"][:2]
    for key in ("num_labels", "decoder_start_token_id"):  # the first is the task's, the second nobody has to know
        shape.pop(key, None)
    config = loaded(
        tmp_path,
        model={"shape": shape, "task": task, "num_labels": 2 if task == "classification" else None},
        data={"max_target_length": 8, "block_length": 16} if task != "classification" else {},
        distillation={"use_self_distillation": True},
    )
    found = estimate(config, baseline=False)
    assert all(phase.flops > 0 and phase.saved > 0 for phase in found.phases.values())
    assert found.inference_speedup > 1.0
    assert "first with a teacher" in found.phases


def test_a_model_that_computes_by_its_input_is_refused(tmp_path: Path) -> None:
    shape = {"model_type": "deberta-v2", **SIZES, **MODELS["deberta"].settings, "num_labels": 2}
    with pytest.raises(ValueError, match="deberta-v2 computes by the values of its input"):
        estimate(loaded(tmp_path, model={"shape": shape}), baseline=False)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, int]]:
    """The config of each of `PEAKS`, and the memory that training by it took, in bytes."""
    configs = [config_of_peak(tmp_path_factory.mktemp("peak"), *sizes) for sizes in PEAKS.values()]
    # Freed blocks go back to the system, so that the peak is that of the tensors and not of the allocator's history.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", TRAIN, *map(str, configs)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return dict(zip(PEAKS, zip(configs, map(int, done.stdout.split()), strict=True), strict=True))


def config_of_peak(folder: Path, rows: int, length: int, width: int, taught: bool) -> Path:
    early = {"target_sparsity": 0.1, "prune_start": 0.0, "prune_end": 1, "num_events": 1}  # so the teacher is the peak
    late = {"target_sparsity": 0.5, "prune_start": 0.9, "prune_end": 0.95, "num_events": 1}
    return config_of(
        folder,
        model={"shape": SHAPE | {"num_hidden_layers": 3, "hidden_size": width, "intermediate_size": 4 * width}},
        data={"max_length": length},
        training={"batch_size": rows},
        pruning=early if taught else late,
        distillation={"use_self_distillation": taught},
    )


@pytest.mark.timeout(900)  # all of them train before the first
@pytest.mark.parametrize("name", PEAKS)
def test_the_peak_of_a_process_that_trains(name: str, trained: dict[str, tuple[Path, int]]) -> None:
    config, taken = trained[name]
    phase = "first with a teacher" if PEAKS[name][-1] else "before pruning"
    expected = estimate(load_config(config), baseline=False).phases[phase].peak
    assert taken == pytest.approx(expected, rel=0.12)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["estimate", str(write_config(tmp_path))]) == 0
    printed = capsys.readouterr().out
    assert "process, libraries" in printed
    assert "peak memory of the run" in printed
    assert not (tmp_path / "run").exists()
    assert not (tmp_path / "run.partial").exists()
