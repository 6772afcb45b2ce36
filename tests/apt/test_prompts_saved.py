"""Prompts in state dicts, checkpoints and exports."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from check import Unrounded, close
from own_loop import Loop, equal_bits, take_both
from test_prompts import KINDS, METHODS, P, prompted, pruned
from tiny_models import tiny_batch
from torch import Tensor

import apt

NETWORKS: list[tuple[str, dict[str, Any]]] = [
    ("p_tuning", {"dropout_probability": 0.1}),
    ("prefix_tuning", {}),
    ("prefix_tuning", {"prefix_projection": True, "dropout_probability": 0.1}),
]


def logits(model: Any, kind: str) -> Tensor:
    with torch.no_grad(), Unrounded():
        found = model(**tiny_batch(kind)).logits
    assert isinstance(found, Tensor)
    return found


@pytest.mark.parametrize(("method", "network"), NETWORKS)
@pytest.mark.parametrize("smaller", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_an_export_keeps_the_prompt(
    kind: str, smaller: bool, method: str, network: dict[str, Any], tmp_path: Path
) -> None:
    if smaller:
        model = apt.patch_model(pruned(kind)[0], method=method, num_virtual_tokens=P, **network)
    else:
        model = prompted(kind, method, **network)
    before, counts = logits(model, kind), apt.summary(model)
    apt.export_model(model, tmp_path / "small")
    card = json.loads((tmp_path / "small/apt_export.json").read_text())
    assert card["format"] == 4
    assert not card["stock"]
    loaded: Any = apt.load_model(tmp_path / "small").double()
    close("export", logits(loaded, kind), before)
    assert sum(p.numel() for p in loaded.parameters()) == counts.params_after == card["params_after"]
    assert "mlp" not in str(loaded.apt_prompt.state_dict().keys())
    if kind in ("llama_gqa", "t5"):
        ids = tiny_batch(kind)["input_ids"][:1]
        assert torch.equal(loaded.generate(ids, max_new_tokens=5), model.generate(ids, max_new_tokens=5))


@pytest.mark.parametrize("method", METHODS)
def test_a_loaded_prompt_goes_along(method: str, tmp_path: Path) -> None:
    apt.export_model(prompted("llama_gqa", method), tmp_path / "first")
    model = apt.load_model(tmp_path / "first").double()
    before = logits(model, "llama_gqa")
    for settings in ({"method": "apt"}, {"method": method}):
        with pytest.raises(ValueError, match="came with a prompt"):
            apt.patch_model(model, **settings)
    apt.patch_model(model, method="lora")
    assert not any(parameter.requires_grad for parameter in model.apt_prompt.parameters())  # type: ignore[union-attr]
    close("lora", logits(model, "llama_gqa"), before)
    apt.export_model(model, tmp_path / "second")
    close("again", logits(apt.load_model(tmp_path / "second").double(), "llama_gqa"), before)
    with pytest.raises(ValueError, match="a prompt is no LoRA"):
        apt.save_adapter(prompted("bert", method), tmp_path / "lora")


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ["bert", "llama_gqa", "t5"])
def test_a_run_resumes_where_it_stopped(kind: str, method: str, tmp_path: Path) -> None:
    whole = Loop(kind, prompted(kind, method).train(), 8).take(3)
    assert any(name.startswith("apt_prompt.") for name in whole.model.state_dict())
    resumed = whole.resumed(prompted(kind, method).train(), tmp_path, 8)
    take_both(whole, resumed, 5)
    assert equal_bits(resumed.model, whole.model)
    assert not equal_bits(resumed.model, prompted(kind, method))
    with pytest.raises(ValueError, match="patched with prompt="):
        Loop(kind, resumed.model, 8, num_virtual_tokens=P + 1)


@pytest.mark.parametrize("method", METHODS)
def test_the_trainer_resumes_too(method: str, tmp_path: Path) -> None:
    from transformers import TrainingArguments

    batch = tiny_batch("bert", size=16)
    rows = [{name: value[i] for name, value in batch.items()} for i in range(16)]

    def trainer(folder: str, steps: int = 4) -> apt.APTrainer:
        args = TrainingArguments(
            str(tmp_path / folder),
            max_steps=steps,
            per_device_train_batch_size=4,
            save_steps=2,
            learning_rate=1e-2,
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
        )
        model = prompted("bert", method, torch.float32)
        return apt.APTrainer(model=model, args=args, train_dataset=rows, eval_dataset=rows)

    whole, again = trainer("whole"), trainer("again")
    whole.train()
    again.train(resume_from_checkpoint=str(tmp_path / "whole/checkpoint-2"))
    assert equal_bits(again.model, whole.model)
    assert not equal_bits(whole.model, trainer("fresh").model)
    assert whole.evaluate()["eval_loss"] == again.evaluate()["eval_loss"]
