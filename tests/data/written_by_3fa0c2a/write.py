"""Runs on commit 3fa0c2a alone: there it wrote the files beside it, which every later version must still read.

From the root of the repository, with OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 PYTHONPATH=.:tests:tests/apt:
``python tests/data/written_by_3fa0c2a/write.py``. `tests/system/test_old_files.py` reads what it wrote; the answers
that it must get are stored beside each file.
"""

import dataclasses
import json
import os
import platform
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import peft
import torch
import transformers
import yaml
from apt.times import LatencyTable
from check import Unrounded, close
from safetensors.torch import save_file
from test_dynacsg import spread
from tiny_models import GENERATORS, fill_adapters, free_heads, random_plan, tiny_batch, tiny_model
from tiny_run import SPECIAL, WORDS, sentences, tiny_tokenizer, write_csv
from torch import Tensor

import apt
from apt.checkpoint import save_controller
from apt.surgery import apply_prune_plan

COMMIT = "3fa0c2a"
HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[2]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT)}
HIDDEN_TOO = ["head", "neuron", "hidden"]
VOCABULARY = 24
SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "intermediate_size": 16, "max_position_embeddings": 16}
FAMILIES: dict[str, dict[str, Any]] = {  # a name of `tiny_models.MODELS` -> what is smaller still
    "bert": {},
    "deberta": {},
    "llama_gqa": {"num_attention_heads": 4, "num_key_value_heads": 2},
    "gpt2": {"n_inner": 16},
    "phi3": {"num_attention_heads": 4, "num_key_value_heads": 2, "original_max_position_embeddings": 16},
    "t5_gated": {"d_ff": 16, "d_kv": 2, "num_decoder_layers": 1},
}

# Runs in loops of their own, stopped after step 9: the second of three events is due at 10, its masks have half fallen.
STOP, TOTAL = 9, 16
SHRINK = {"target_sparsity": 0.5, "num_events": 3, "prune_start": 2, "prune_end": 14, "round_to": 4, "rank": 2}
TEACH = {"use_self_distillation": True, "distill_end": 13, "num_teacher_layers": 2, "transform_rank": 2}
AT_ONCE = {
    "prune_before_tuning": True,
    "calibration_batches": 2,
    "round_to": 4,
    "rank": 2,
    "tune_start": 2,
    "tune_end": 14,
    "num_tuning_events": 3,
}
FEW = {"rank": 2, "target_modules": ["q"], "svd_cache": None}
PROMPT = {"num_virtual_tokens": 3, "hidden_dimension": 8}
LOOPS: dict[str, tuple[str, dict[str, Any]]] = {  # name -> base, settings of `apt.patch_model`
    "apt": ("gpt2", SHRINK),
    "apt_with_hidden_and_teacher": ("bert", {**SHRINK, **TEACH, "unit_types": HIDDEN_TOO}),
    "apt_of_t5": ("t5_gated", {**SHRINK, "salience": "gate_taylor", "layout": "uniform"}),
    "apt_to_a_speedup": ("llama_gqa", {**SHRINK, "target_speedup": 1.5}),
    "apt_at_once": ("llama_gqa", AT_ONCE),
    "adalora": ("llama_gqa", {**FEW, "method": "adalora", "rank": 3, "tinit": 2, "tfinal": 3, "deltaT": 2}),
    "adalora_trimmed": ("llama_gqa", {**FEW, "method": "adalora", "rank": 3, "tinit": 2, "tfinal": 8}),
    "adalora_simple": ("llama_gqa", {**FEW, "method": "adalora_simple", "rank": 3}),
    "gsa": ("llama_gqa", {**FEW, "method": "gsa"}),
    "spectral_a": ("llama_gqa", {**FEW, "method": "spectral_a"}),
    "spectral_r": ("llama_gqa", {**FEW, "method": "spectral_r", "idx": 1}),
    "dynacsg": ("llama_gqa", {**FEW, "method": "dynacsg", "hyper_params": 200}),
    "p_tuning": ("gpt2", {"method": "p_tuning", **PROMPT}),
    "prefix_tuning": ("llama_gqa", {"method": "prefix_tuning", **PROMPT, "prefix_projection": True}),
}
LATENCY = LatencyTable(  # as if measured: ms by units left
    device="cpu",
    batch_size=32,
    length=64,
    dense_ms=11.0,
    rest_ms=1.0,
    parts={"layers.heads": [[0, 0.0], [1, 1.0], [2, 3.0]], "layers.neurons": [[0, 0.0], [8, 1.2], [16, 2.0]]},
)
RUN: dict[str, Any] = {  # of the command line; paths are relative, so that the folder may lie anywhere
    "output_dir": "run",
    "model": {"name": "./tiny", "task": "regression", "target_modules": ["q", "v", "up", "down"]},
    "data": {"datasets": "rows.csv", "test_size": 24, "max_length": 12, "cache": None},
    "training": {
        "initial_rank": 4,
        "learning_rate": "1e-2",
        "batch_size": 8,
        "max_steps": 24,
        "save_steps": 7,
        "logging_steps": 4,
    },
    "pruning": {"target_sparsity": 0.6, "num_events": 3, "prune_end": 0.8, "round_to": 4},
    "tuning": {"max_rank": 16},
    "distillation": {"use_self_distillation": True, "distill_end": 0.9},
    "evaluation": {"inference_length": 8, "inference_repeats": 2, "event_timing_steps": 2, "score_steps": 12},
    "hardware": {"num_threads": 1, "device": "cpu"},
}
KILLED = """
import os, signal, sys
from apt.cli import main
from apt.controller import Controller

original = Controller.after_step

def after_step(controller):
    if controller.step == 11:
        os.kill(os.getpid(), signal.SIGKILL)
    original(controller)

Controller.after_step = after_step
main(sys.argv[1:])
"""
CONFIGS: list[list[str]] = [  # arguments of `python -m apt`, in this folder
    ["config", "configs/words.yaml"],
    ["config", "configs/words.yaml", "--model_type", "llama", "--sparsity_level", "0.8", "--dataset", "glue/cola"],
    ["config", "configs/questions.yaml", "seed=7"],
    ["config", "configs/adalora.yaml", "model=./other", "adapter.beta1=0.9", "filter={source: b, n: 3}"],
    ["config", "configs/ffn.yaml"],
    ["config", "configs/prompt.yaml"],
    ["config", "configs/speedup.yaml", "kurtosis=off", "report_to=[tensorboard]"],
    ["config", "configs/roberta_base_sst2.yaml", "--ablation", "w/o_AT"],
    ["config", "--model_type", "roberta", "--dataset", "sst2", "--ablation", "w/o_Ap"],
    ["config", "--model_type", "llama", "--dataset", "alpaca", "tune_end=0.5", "epochs=1"],
]


def seed(number: int) -> None:
    random.seed(number)
    np.random.seed(number)
    torch.manual_seed(number)


def write_json(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content) + "\n", encoding="utf-8")


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.detach().clone().contiguous() for name, tensor in tensors.items()}, path)


def logits_of(model: Any, batch: dict[str, Tensor]) -> Tensor:
    with torch.no_grad(), Unrounded():
        found = model.eval()(**batch).logits
    assert isinstance(found, Tensor)
    return found


def small(name: str) -> Any:
    return tiny_model(name, torch.float32, **{**SMALL, **FAMILIES[name], "vocab_size": VOCABULARY})


def batch_of(name: str, step: int) -> dict[str, Tensor]:
    """A batch in the small vocabulary; labels of classes are smaller still."""
    batch = tiny_batch(name, size=4, length=7, seed=step)
    return {key: torch.where(ids < VOCABULARY, ids, ids % (VOCABULARY - 1) + 1) for key, ids in batch.items()}


def take(model: Any, optimizer: Any, run: apt.Controller, name: str, steps: range) -> list[float]:
    """Optimizer steps of a loop of one's own; returns the losses."""
    losses = []
    for step in steps:
        batch = batch_of(name, step)
        with Unrounded():
            loss = run.loss(model(**batch), batch)
        loss.backward()
        losses.append(loss.item())
        run.after_backward()
        optimizer.step()
        run.after_step()
        optimizer.zero_grad()
    return losses


def write_bases() -> None:
    """The models that loops and adapters begin with, and one batch a step for each."""
    for name in sorted({base for base, _ in LOOPS.values()}):
        model = small(name)
        model.save_pretrained(HERE / "bases" / name)
        batches = [batch_of(name, step) for step in range(TOTAL + 1)]
        tensors = {key: torch.stack([batch[key] for batch in batches]) for key in batches[0]}
        write_tensors(HERE / "bases" / f"{name}_batches.safetensors", tensors)


def write_export(label: str, name: str, model: Any) -> None:
    """An export, and what `apt.load_model` of this commit makes of it."""
    folder = HERE / "exports" / label
    batch = batch_of(name, TOTAL)
    apt.export_model(model, folder)
    loaded: Any = apt.load_model(folder).double()
    answers = {"logits": logits_of(loaded, batch)}
    close(label, answers["logits"].float(), logits_of(model, batch))
    if name in GENERATORS:
        ids = batch["input_ids"][:1, :4]
        answers["tokens"] = loaded.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False)
    write_tensors(folder.with_suffix(".safetensors"), {**batch, **answers})


def shrunk(name: str, *, hidden: bool = False, **settings: Any) -> Any:
    """A patched model with trained adapters after an event; a layer has no heads, another no neurons."""
    model = fill_adapters(apt.patch_model(small(name), rank=2, **settings))
    empty = [*free_heads(model)[-1:], next(key for key in apt.summary(model).units if key.endswith("neurons"))]
    apply_prune_plan(model, random_plan(model, empty=empty, hidden=hidden, seed=1))
    return model


def trained(name: str, **settings: Any) -> Any:
    """A model after a short run, all of whose events are done."""
    model = apt.patch_model(small(name), **settings).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    run = apt.Controller(model, optimizer, TOTAL)
    take(model, optimizer, run, name, range(TOTAL))
    return model


def write_exports() -> None:
    uniform = {**SHRINK, "layout": "uniform"}
    write_export("llama_uniform", "llama_gqa", trained("llama_gqa", **uniform))
    write_export("llama_uniform_hidden", "llama_gqa", trained("llama_gqa", **uniform, unit_types=HIDDEN_TOO))
    write_export("bert_free_hidden", "bert", shrunk("bert", hidden=True))
    families = {"llama": "llama_gqa", "t5": "t5_gated", "gpt2": "gpt2", "phi3": "phi3", "deberta": "deberta"}
    for label, name in families.items():
        write_export(f"{label}_free", name, shrunk(name))
    prompts = {"p_tuning": "bert", "prefix_tuning": "llama_gqa"}
    for method, name in prompts.items():
        write_export(f"{name}_{method}", name, trained(name, method=method, **PROMPT))
    settings = {**SHRINK, "method": "dynacsg", "prune": True, "svd_cache": None, "hyper_params": 200, "gate_alpha": 0.5}
    gated = trained("bert", **settings)
    with torch.no_grad():
        gated.apt_gates.open.weight.normal_()
    spread(gated.eval(), batch_of("bert", TOTAL))  # so that examples differ in the gates they open
    write_export("bert_dynacsg", "bert", gated)
    assert 0.2 < sum(apt.summary(gated).active.values()) / sum(apt.summary(gated).ranks.values()) < 0.8


def write_loop(label: str, base: str, settings: dict[str, Any]) -> None:
    """A checkpoint as docs/own_loop.md writes it, and how the run goes on from there."""
    folder = HERE / "own_loop" / label
    seed(3)
    model = apt.patch_model(small(base).double(), **settings).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    run = apt.Controller(model, optimizer, TOTAL, latency=LATENCY if "target_speedup" in settings else None)
    if settings.get("prune_before_tuning"):
        run.prune_before_tuning([batch_of(base, step) for step in range(TOTAL)])
    take(model, optimizer, run, base, range(STOP))
    save_controller(run, folder)
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, folder / "training.pt")
    seed(5)
    losses = take(model, optimizer, run, base, range(STOP, TOTAL))
    answers = {
        "events": [event.to_json() for event in run.events],
        "losses": losses,
        "summary": dataclasses.asdict(apt.summary(model)),
    }
    write_json(folder / "case.json", {"base": base, "settings": settings, "stop": STOP, "total": TOTAL, **answers})
    write_tensors(folder / "answers.safetensors", {"logits": logits_of(model, batch_of(base, TOTAL))})


def write_adapters() -> None:
    """PEFT folders of one model, padded to one rank and as they are, and files of the manager."""
    base = "bert"
    batch = batch_of(base, TOTAL)
    settings = {"method": "lora", "rank": 2, "rank_pattern": {"layer.1.attention.self.query": 4}}
    model = fill_adapters(apt.patch_model(small(base).double(), target_modules=["q", "v", "up"], **settings))
    with torch.no_grad():
        model.classifier.weight.add_(0.1)
    answers = {"logits": logits_of(model.float().double(), batch)}
    for label, compact in (("padded", False), ("compact", True)):
        apt.save_adapter(model, HERE / "peft" / label, compact=compact)
    write_tensors(HERE / "peft/answers.safetensors", answers)
    write_json(HERE / "peft/ranks.json", apt.summary(model).ranks)
    for label in ("lora_and_ptuning", "adalora_and_prefix"):
        seed(6)
        model = small(base)
        manager = apt.EfficientFineTuningManager(model)
        if label == "lora_and_ptuning":
            manager.apply_lora(["query", "value"], rank=2, share_parameters=True)
            manager.apply_ptuning(num_virtual_tokens=3, hidden_dimension=8)
        else:
            manager.apply_adalora(["query", "value"], rank=3, rank_allocation="importance")
            manager.apply_prefix_tuning(prefix_length=3)
        with torch.no_grad():
            for parameter in manager.get_trainable_parameters():
                parameter.add_(0.1 * torch.randn(parameter.shape))
        manager.save_efficient_weights(HERE / "efficient" / f"{label}.safetensors")
        answers = {"logits": logits_of(model.double(), batch)}
        write_tensors(HERE / "efficient" / f"{label}_answers.safetensors", answers)


def command(*arguments: str) -> str:
    whole = [sys.executable, "-m", "apt", *arguments]
    done = subprocess.run(whole, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def write_run() -> None:
    """Folders of the command line: a run that was killed between two events, and the same one left alone."""
    folder = HERE / "command_line"
    folder.mkdir()
    os.chdir(folder)
    torch.manual_seed(0)
    settings = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 24}
    settings |= {"vocab_size": len(SPECIAL) + len(WORDS), "max_position_embeddings": 16, "initializer_range": 0.2}
    transformers.BertModel(transformers.BertConfig(**settings)).save_pretrained("tiny")
    tiny_tokenizer().save_pretrained("tiny")
    write_csv(Path("rows.csv"), sentences(120))
    Path("config.yaml").write_text(yaml.safe_dump(RUN), encoding="utf-8")
    command("train", "config.yaml")
    os.rename("run", "finished")
    killed = [sys.executable, "-c", KILLED, "train", "config.yaml"]
    assert subprocess.run(killed, env=ENVIRONMENT, check=False).returncode == -signal.SIGKILL
    shutil.copytree("run.partial", "unfinished")  # git leaves names out that end as the first does
    command("train", "config.yaml", "--resume")
    whole = Path("finished/model/model.safetensors").read_bytes()
    assert Path("run/model/model.safetensors").read_bytes() == whole, "a resumed run is not the one left alone"
    shutil.rmtree("run")
    Path("report.txt").write_text(command("report", "finished"), encoding="utf-8")
    write_json(Path("pictures.json"), sorted(path.name for path in Path("finished/report").iterdir()))
    shutil.rmtree("finished/report")
    os.remove("finished/report.html")
    Path("scores.json").write_text(command("eval", "finished/model", "config.yaml"), encoding="utf-8")
    grid = {"output_dir": "grid", "config": "config.yaml", "methods": ["apt"], "sparsities": [0.6], "seeds": [0]}
    Path("grid.yaml").write_text(yaml.safe_dump(grid), encoding="utf-8")
    shutil.copytree("finished", "grid/apt-60-seed0")
    command("experiment", "grid.yaml")
    os.rename("grid/runs.csv", "grid_runs.csv")
    shutil.rmtree("grid")
    os.chdir(HERE)


def write_configs() -> None:
    """What each command line resolves to; the files themselves are written by hand, or copies of presets."""
    for name in ("roberta_base_sst2", "llama2_7b_alpaca"):
        shutil.copy(ROOT / "configs" / f"{name}.yaml", HERE / "configs")
    os.chdir(HERE)
    rows = [{"arguments": arguments, "resolved": yaml.safe_load(command(*arguments))} for arguments in CONFIGS]
    write_json(HERE / "configs/resolved.json", rows)


def main() -> None:
    same = ["git", "diff", "--quiet", COMMIT, "--", "apt", "apt_kernels", "configs", "tests/apt", ":(glob)tests/*.py"]
    if subprocess.run(same, cwd=ROOT, check=False).returncode:
        sys.exit(f"write.py: the code is not that of {COMMIT}; check it out first")
    for name in ("bases", "exports", "own_loop", "peft", "efficient", "command_line"):
        shutil.rmtree(HERE / name, ignore_errors=True)
    write_bases()
    write_exports()
    for label, (base, settings) in LOOPS.items():
        write_loop(label, base, settings)
    write_adapters()
    write_run()
    write_configs()
    versions = {"python": platform.python_version()} | {m.__name__: m.__version__ for m in (torch, transformers, peft)}
    write_json(HERE / "made_with.json", {"commit": COMMIT, "cpu": torch.backends.cpu.get_cpu_capability(), **versions})


if __name__ == "__main__":
    main()
