"""The step and inference benchmarks at toy size: what they compare is what they say, and the tables are of the rows."""

import argparse
import os
from pathlib import Path
from typing import Any

import pytest
import torch

import apt
import apt_kernels
from apt_kernels import _triton
from bench import inference, train_step
from bench.contestants import CONTESTANTS, frozen, linear_names, prune
from bench.forced import GPU_CONTESTANTS, find
from bench.memory import PeakMemory
from bench.rows import read_rows
from bench.shapes import DECODER, ENCODER, GPU_SHAPES, SHAPES, Shape, _bert, _llama, _t5
from bench.timing import Clock

TOY = {
    "encoder": Shape(_bert(32, 4, vocab=50), ENCODER, batch=2, tokens=5, layers=2, of=2),
    "decoder": Shape(_llama(32, 4, 2, 64, 50), DECODER, batch=2, tokens=5, layers=2, of=2, language_model=True),
    "both": Shape(_t5(32, 4, 64, vocab=50), ENCODER, batch=2, tokens=5, layers=2, of=2),
}


@pytest.fixture(autouse=True)
def _toy_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, shape in TOY.items():
        monkeypatch.setitem(SHAPES, name, shape)


@pytest.mark.parametrize("shape", list(TOY))
@pytest.mark.parametrize("name", [name for name in CONTESTANTS if name != "peft lora, compiled"])
def test_every_contestant_learns_what_it_should(shape: str, name: str) -> None:
    model = TOY[shape].model()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    contestant = CONTESTANTS[name](model, TOY[shape].inputs(model), TOY[shape].targets)
    contestant.step()
    contestant.step()  # B is zero before the first
    trained = {key for key, p in contestant.model.named_parameters() if p.requires_grad}
    assert any("lora" in key for key in trained) == (name != "full")
    frozen_ones = {key: p for key, p in contestant.model.named_parameters() if key not in trained and key in before}
    same_shape = {key: p for key, p in frozen_ones.items() if p.shape == before[key].shape}
    if name.endswith("teacher"):  # which keeps what is pruned, behind what stays
        same_shape, before = ({key: p.flatten().sort()[0] for key, p in side.items()} for side in (same_shape, before))
    assert all(torch.equal(p, before[key]) for key, p in same_shape.items())
    assert (len(same_shape) == 0) == (name == "full" or name.startswith("peft"))


@pytest.mark.parametrize(("shape", "inputs"), [("decoder", 1), ("both", 2)])
def test_the_limit_trains_nothing_and_reaches_every_input(shape: str, inputs: int) -> None:
    model = TOY[shape].model()
    tokens = model.get_input_embeddings()
    seen: list[torch.Tensor] = []
    contestant = frozen(model, TOY[shape].inputs(model), TOY[shape].targets)
    for module in model.modules():
        if getattr(module, "weight", None) is tokens.weight and isinstance(module, torch.nn.Embedding):
            module.register_forward_hook(lambda module, args, output: seen.append(output) or output.retain_grad())
    contestant.step()
    assert len(seen) == inputs
    assert all(embedded.grad is not None for embedded in seen)
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("shape", list(TOY))
def test_names_for_peft_cost_it_no_copy_of_the_model(shape: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = TOY[shape].model()
    targets = TOY[shape].targets
    wanted = list(apt.summary(apt.patch_model(TOY[shape].model(), method="lora", target_modules=targets)).ranks)
    monkeypatch.setattr(torch.nn.Parameter, "__deepcopy__", lambda *_: pytest.fail("numbers were copied"))
    assert linear_names(model, targets) == wanted != []


def test_prune_reaches_its_sparsity() -> None:
    model = apt.patch_model(SHAPES["minilm"].model(1))
    prune(model, 0.6)
    assert 0.6 <= apt.summary(model).sparsity < 0.62


@pytest.mark.parametrize("shape", list(TOY))
def test_a_row_of_each_and_their_tables(shape: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [train_step.measure(shape, name, 5, torch.float32, None) for name in ("peft lora", "apt 0%")]
    assert rows[0]["over_peft"] == 1.0
    assert rows[1]["gflop"] == pytest.approx(rows[0]["gflop"], rel=0.05)
    text = train_step.table([{key: str(value) for key, value in row.items()} for row in rows])
    assert "| peft lora |" in text
    assert "| 1.000 |" in text
    monkeypatch.setattr(inference, "SPARSITIES", (0.3,))
    monkeypatch.setattr(inference, "BATCHES", (2,))
    rows = inference.measure(shape, 5)
    writes = f"prefill and {inference.NEW_TOKENS} tokens"
    phases = {"encoder": ["forward"], "decoder": ["prefill", writes], "both": [writes]}[shape]
    assert [row["phase"] for row in rows] == [phase for phase in phases for _ in range(4)]
    assert rows[2]["flop_ratio"] > 1.0
    assert f"| apt 30% free | {phases[0]} |" in inference.table([{k: str(v) for k, v in row.items()} for row in rows])


def test_a_wrong_model_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(model, batch, targets):
        contestant = CONTESTANTS["apt 0%"](model, batch, targets)
        with torch.no_grad():
            model.model.layers[0].self_attn.o_proj.weight.mul_(1.5)
        return contestant

    monkeypatch.setitem(CONTESTANTS, "full", wrong)
    with pytest.raises(RuntimeError, match="differs from the plain model"):
        train_step.measure("decoder", "full", 5, torch.float32, None)


def test_the_backend_of_a_name_is_what_runs_and_ends_with_the_step(device: str) -> None:
    shape = TOY["decoder"]
    for backend in ("torch", "split_cublas"):
        model = shape.model(device=device)
        contestant = find(f"apt lora by {backend}")(model, shape.inputs(model, device), shape.targets)
        apt_kernels.reset_calls()
        contestant.step()
        assert set(apt_kernels.calls()["masked_lora_linears"]) == {backend}  # q and v share their input
        assert "APT_BACKEND" not in os.environ
    with pytest.raises(ValueError, match="no contestant 'peft'"):
        find("peft by torch")


def test_peft_as_users_call_it_multiplies_in_the_dtype_of_a_narrow_base() -> None:
    shape = TOY["decoder"]
    seen: list[tuple[torch.dtype, torch.dtype]] = []
    model = shape.model().to(torch.bfloat16)
    contestant = CONTESTANTS["peft lora"](model, shape.inputs(model), shape.targets)
    for name, module in contestant.model.named_modules():
        if name.endswith("lora_A.default"):
            module.register_forward_hook(lambda module, args, out: seen.append((module.weight.dtype, out.dtype)))
    contestant.step()
    assert set(seen) == {(torch.float32, torch.bfloat16)}


def test_contestants_together_each_have_a_row_whatever_became_of_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def raises(*_: Any) -> None:
        raise torch.OutOfMemoryError("planted")

    monkeypatch.setitem(CONTESTANTS, "apt 30%", raises)
    monkeypatch.setattr(_triton, "interpreted", lambda: False)
    names = ("peft lora", "frozen", "apt 30%", "apt lora by triton", "apt lora by torch")
    units = [{"shape": "toy llama", "contestant": name, "dtype": "float32", "layers": "2"} for name in names]
    options = argparse.Namespace(out=tmp_path / "train_step.csv", runs=5, seconds=1.0)
    found = train_step.together(units, options)
    assert found == {"ok": 3, "failed": 1, "unavailable": 1}
    rows = read_rows(options.out)
    assert [row["status"] for row in rows] == ["ok", "ok", "failed", "unavailable", "ok"]
    assert "OutOfMemoryError: planted" in rows[2]["note"]
    text = train_step.table(rows)
    assert "| apt lora by torch |" in text
    assert "- failed: toy llama, apt 30%: OutOfMemoryError: planted" in text
    assert "\n- unavailable: toy llama, apt lora by triton: " in text


def test_time_on_the_wall_has_its_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    times = Clock(torch.device("cpu"), runs=5, wall=True).interleaved({"a": [lambda: None], "b": [lambda: None]})
    assert len(times["a"].wall_ms) == len(times["a"].device_ms) == 5
    row = train_step.measure("toy llama", "peft lora", 5, torch.float32, None)
    assert "wall_ms_p50" not in row  # a CPU has one clock
    walled = row | {"wall_ms_p50": 20.0, "wall_over_peft": 1.0, "contestant": "apt lora by torch"}
    text = train_step.table([{key: str(value) for key, value in each.items()} for each in (walled,)])
    assert "| wall ms | wall over PEFT |" in text
    assert "| 20.0 | 1.000 |" in text


def test_shapes_of_a_gpu_are_those_it_is_bought_for() -> None:
    decoder, encoder = GPU_SHAPES.values()
    with torch.device("meta"):
        config: Any = decoder.model(1, "meta").config
    assert (config.hidden_size, config.num_attention_heads, config.intermediate_size) == (4096, 32, 11008)
    assert (decoder.batch, decoder.tokens, encoder.batch, encoder.tokens) == (4, 2048, 32, 128)
    assert all(callable(find(name)) for name in GPU_CONTESTANTS)


def test_peak_memory_of_a_known_size() -> None:
    with PeakMemory() as peak:
        torch.ones(30_000_000).sum()
    assert 115 < peak.mb < 200
