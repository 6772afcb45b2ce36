"""The step and inference benchmarks at toy size: what they compare is what they say, and the tables are of the rows."""

import pytest
import torch

import apt
from bench import inference, train_step
from bench.contestants import CONTESTANTS, frozen, linear_names, prune
from bench.memory import PeakMemory
from bench.shapes import DECODER, ENCODER, SHAPES, Shape, _bert, _llama, _t5

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


def test_peak_memory_of_a_known_size() -> None:
    with PeakMemory() as peak:
        torch.ones(30_000_000).sum()
    assert 115 < peak.mb < 200
