"""Whole layers as units, in every family: masked as shrunk, what they are worth, runs, teachers, exports."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from check import Unrounded, close
from own_loop import BRIEF, Loop, equal_bits, take_both
from test_teacher import seen_by, train_a_little
from tiny_models import (
    GENERATORS,
    NAMES,
    SEQ2SEQ,
    fill_adapters,
    has_hidden_table,
    random_plan,
    tiny_batch,
    tiny_model,
)
from torch import Tensor

import apt
from apt.distillation import SelfDistiller
from apt.families import EmptyLayer, anatomy_of
from apt.layers.derived import plain_class
from apt.layers.layer_mask import layer_mask
from apt.pruning import PruningConfig, UnitScores
from apt.pruning.layers import find_layers
from apt.pruning.units import block_params
from apt.records import PrunePlan
from apt.surgery.event import apply_event
from apt.surgery.prune import apply_prune_plan
from apt.surgery.tails import free_tails
from apt.training.controller.calibration import static_scores

KINDS = ("head", "neuron", "layer")
FAMILIES = ["bert", "deberta", "distilbert", "llama_gqa", "qwen2_mixed", "gemma3", "gpt2", "phi3", "opt", "opt_350m"]
FAMILIES += ["t5", "mt5"]
STATES = ("hidden_states", "encoder_hidden_states", "decoder_hidden_states")


def deep(name: str, dtype: torch.dtype = torch.float64, **settings: Any) -> Any:
    """A plain model in which a layer of every stack may go, and one with sliding attention where there are such."""
    if name == "gpt2":  # as it is, its layers cannot go
        settings["scale_attn_by_inverse_layer_idx"] = False
    if name in SEQ2SEQ:
        settings["num_decoder_layers"] = 3
    return tiny_model(name, dtype, **settings)


def layers_plan(model: Any, **mixed: Any) -> PrunePlan:
    """A plan by which the first layer of each stack that may goes; `mixed`: heads and neurons too, as `random_plan`."""
    plan = random_plan(model, **mixed) if mixed else PrunePlan(step=1, target_sparsity=0.1, kept={}, round_to=1)
    gone: dict[str, str] = {}
    for group in find_layers(anatomy_of(model)):
        if not group.floor:
            gone.setdefault(group.layer.stack.name, group.holder)
    assert gone
    for name in gone.values():
        plan.kept.update({key: [] for key in [*plan.kept, f"{name}.layers"] if key.startswith(f"{name}.")})
    return plan


def shut(model: Any, plan: PrunePlan) -> None:
    """Shut with masks what the plan removes."""
    units = UnitScores(anatomy_of(model), PruningConfig(unit_types=("head", "neuron", "layer")))
    for group in units.groups:
        if group.name in plan.kept:
            mask = torch.zeros(group.num_units)
            mask[plan.kept[group.name]] = 1.0
            group.mask.set_mask(mask)


def outputs(model: Any, name: str) -> Any:
    with torch.no_grad():
        return model(**tiny_batch(name), output_hidden_states=True, output_attentions=True)


@pytest.mark.parametrize(("name", "mixed"), [*((n, True) for n in NAMES), *((n, False) for n in FAMILIES)])
def test_a_masked_layer_computes_what_none_does(name: str, mixed: bool) -> None:
    """What is listed of every layer too: its state is the one before it, and it has no attention weights."""
    model = fill_adapters(apt.patch_model(deep(name, attn_implementation="eager"), prune=True)).eval()
    outputs(model, name)  # as then transformers has its hooks on the layers
    plan = layers_plan(model, **({"seed": 1} if mixed else {}))
    shut(model, plan)
    masked = outputs(model, name)
    before = len(list(model.parameters()))
    apply_prune_plan(model, plan)
    assert len(list(model.parameters())) < before
    cut = outputs(model, name)

    assert (cut.logits - masked.logits).abs().max() <= 1e-10
    listed = [key for key in STATES if getattr(masked, key, None) is not None]
    assert listed
    for key in listed:
        for index, (own, other) in enumerate(zip(getattr(cut, key), getattr(masked, key), strict=True)):
            close(f"{key} {index}", own, other)
    gone = anatomy_of(model).gone
    if cut.get("attentions") is not None:
        assert [f"layers.{i}" for i, weights in enumerate(cut.attentions) if weights is None] == gone


@pytest.mark.parametrize("name", [name for name in FAMILIES if name in GENERATORS])
def test_it_generates_with_a_cache_and_padding_on_the_left(name: str) -> None:
    model = fill_adapters(apt.patch_model(deep(name), prune=True)).eval()
    masked = copy.deepcopy(model)
    plan = layers_plan(model)
    shut(masked, plan)
    apply_prune_plan(model, plan)
    ids = tiny_batch(name)["input_ids"][:3, :6].clone()
    ids[1, :2] = 0
    settings: Any = {"attention_mask": (ids != 0).long(), "max_new_tokens": 8, "do_sample": False}
    made = masked.generate(ids, **settings)
    assert torch.equal(model.generate(ids, **settings), made)
    assert torch.equal(model.generate(ids, use_cache=False, **settings), made)


@pytest.mark.parametrize(("name", "mixed"), [*((n, False) for n in NAMES), *((n, True) for n in FAMILIES)])
def test_an_export_numbers_layers_anew(name: str, mixed: bool, tmp_path: Path) -> None:
    """Where only layers went it is a stock model."""
    model = fill_adapters(apt.patch_model(deep(name, torch.float32), prune=True)).eval()
    config = model.config.to_dict()
    apply_prune_plan(model, layers_plan(model, **({"seed": 1} if mixed else {})))
    apt.export_model(model, tmp_path / "small")
    assert model.config.to_dict() == config
    card = json.loads((tmp_path / "small/apt_export.json").read_text())
    small: Any = apt.load_model(tmp_path / "small")
    assert not any(isinstance(module, EmptyLayer) for module in small.modules())
    found = [small]
    if not mixed:
        assert (card["stock"], card["why_not_stock"]) == (True, None)
        stock, report = plain_class(model).from_pretrained(tmp_path / "small", output_loading_info=True)
        assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        found.append(stock.eval())
    batch = tiny_batch(name)
    for other in found:
        with torch.no_grad():
            close("logits", other(**batch).logits, model(**batch).logits)
        if name in GENERATORS and name in FAMILIES:
            ids = batch["input_ids"][::4, :6]
            settings: Any = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 8, "do_sample": False}
            assert torch.equal(other.generate(ids, **settings), model.generate(ids, **settings))
    again = apt.patch_model(apt.load_model(tmp_path / "small"), prune=True)
    assert not anatomy_of(again).gone


def plain_influence(name: str, model: Any, batches: list[dict[str, Tensor]]) -> dict[str, float]:
    """1 - cos between what layers of a plain model are given and answer, over the tokens that are no padding."""
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def hook(key: str) -> Any:
        def keep(module: Any, args: Any, kwargs: Any, output: Any) -> None:
            seen[key] = (args[0], output[0] if isinstance(output, tuple) else output)

        return keep

    layers = anatomy_of(model).layers
    for layer in layers:
        layer.module.register_forward_hook(hook(layer.name), with_kwargs=True)
    sums = dict.fromkeys((layer.name for layer in layers), 0.0)
    for batch in batches:
        with torch.no_grad():
            model(**batch)
        for layer in layers:
            mask = batch["labels"] != -100 if layer.stack.name == "decoder" else batch["attention_mask"] == 1
            given, answer = (side[mask] for side in seen[layer.name])
            cosines = (given * answer).sum(-1) / given.norm(dim=-1) / answer.norm(dim=-1)
            sums[layer.name] += float((1.0 - cosines).mean())
    return sums


@pytest.mark.parametrize(
    ("name", "checkpointed"), [*((n, False) for n in NAMES), *((n, True) for n in ("bert", "llama", "t5"))]
)
def test_block_influence_is_that_of_the_plain_model(name: str, checkpointed: bool) -> None:
    batches = [tiny_batch(name, seed=seed) for seed in (2, 3)]
    wanted = plain_influence(name, deep(name), batches)
    model = apt.patch_model(deep(name), prune=True)
    if checkpointed:
        model.gradient_checkpointing_enable()
        model.train()
    units = UnitScores(anatomy_of(model), PruningConfig(unit_types=("layer",)))
    units.collect(True)
    found = static_scores(model, batches, units.take)
    assert found.keys() == {f"{layer}.layers" for layer in wanted}
    for layer, value in wanted.items():
        assert float(found[f"{layer}.layers"]) == pytest.approx(value, abs=2e-6)
        assert value > 1e-3


def test_a_mask_that_falls_is_between_and_the_score_is_of_the_open_layer() -> None:
    model = apt.patch_model(deep("llama"), prune=True).eval()
    batch = tiny_batch("llama")
    layer = anatomy_of(model).layers[1].module
    given = torch.randn(2, 5, 32, dtype=torch.float64, requires_grad=True)
    mask = layer_mask(layer)
    assert mask is not None
    rotary = model.model.rotary_emb(given, torch.arange(5)[None])
    whole = layer(given, position_embeddings=rotary)
    mask.set_mask(torch.full((1,), 0.25))
    close("a quarter", layer(given, position_embeddings=rotary), given + 0.25 * (whole - given))
    mask.collecting = True
    layer(given, position_embeddings=rotary).sum().backward()
    cosines = torch.nn.functional.cosine_similarity(given, whole, dim=-1)
    assert float(mask.influence()) == pytest.approx(float(1 - cosines.mean().detach()), abs=1e-6)
    with torch.no_grad():
        model(**batch)
    assert float(mask.sums[1]) == 10  # of a pass without gradients nothing is collected


@pytest.mark.parametrize("name", ["bert", "llama_gqa", "gpt2_cls", "t5", "opt_350m"])
def test_a_run_takes_layers_with_heads_and_neurons(name: str, tmp_path: Path) -> None:
    """Masks fall, events are checked, and the sparsity is that of what is left."""
    model = apt.patch_model(deep(name, num_hidden_layers=4), rank=3, prune=True, method="apt").train()
    total = block_params(anatomy_of(model))
    settings = {"target_sparsity": 0.7, "unit_types": KINDS, "verify_events": True, **BRIEF}
    loop = Loop(name, model, 30, event_log=tmp_path / "events.jsonl", **settings).take(30)
    event = loop.run.events[-1]
    assert 0.7 <= event.sparsity == 1 - block_params(anatomy_of(model)) / total
    assert len(anatomy_of(model).gone) > 0
    gone = [layer for layer, left in apt.summary(model).layers.items() if not left]
    assert gone == anatomy_of(model).gone
    again = apt.patch_model(deep(name, num_hidden_layers=4), rank=3, prune=True, method="apt")
    for row in loop.run.events:
        apply_event(again, row)
    assert {k: p.shape for k, p in again.named_parameters()} == {k: p.shape for k, p in model.named_parameters()}
    held = {id(p) for group in loop.optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in model.parameters() if p.requires_grad}
    small = apt.load_model(apt.export_model(model.eval(), tmp_path / "small"))
    with torch.no_grad():
        close("export", small(**tiny_batch(name)).logits, model(**tiny_batch(name)).logits)


@pytest.mark.parametrize("step", [13, 22])
@pytest.mark.parametrize("taught", [False, True], ids=["", "with a teacher"])
def test_a_run_that_takes_layers_resumes_bit_for_bit(step: int, taught: bool, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"target_sparsity": 0.7, "unit_types": KINDS, **BRIEF}
    settings |= {"use_self_distillation": True, "distill_end": 28} if taught else {}

    def fresh() -> Any:
        return apt.patch_model(deep("bert", torch.float32, num_hidden_layers=4), rank=3).train()

    whole = Loop("bert", fresh(), **settings).take(step)
    other = whole.resumed(fresh(), tmp_path / "checkpoint", **settings)
    take_both(whole, other, 30 - step)
    assert equal_bits(other.model, whole.model)
    assert anatomy_of(whole.model).gone == anatomy_of(other.model).gone != []


@pytest.mark.parametrize("name", FAMILIES)
def test_the_teacher_still_runs_the_layers_that_went(name: str) -> None:
    """After an event that cuts in all layers, and one that takes a layer too, with hidden dimensions where they go."""
    with Unrounded():
        model = fill_adapters(apt.patch_model(deep(name), prune=True, method="apt"))
        batch, start = tiny_batch(name), copy.deepcopy(model)
        distiller = SelfDistiller(model.train())
        distiller.snapshot()
        wanted = seen_by(start, batch)
        hidden = has_hidden_table(name)
        for event in (1, 2):
            train_a_little(model, name)
            mixed = {"seed": event, "hidden": hidden}
            plan = random_plan(model, **mixed) if event == 1 else layers_plan(model, **mixed)
            apply_prune_plan(model, plan, keep_tail=True)
            distiller.follow()
            order = (
                slice(None)
                if not hidden
                else UnitScores(anatomy_of(model), PruningConfig(unit_types=("hidden",))).groups[-1].mask.order
            )
            for _ in range(3):  # layers are drawn
                distiller.draw()
                found = distiller.forward_teacher(batch)
                close("logits", found.predictions["logits"], wanted[0])
                for index, state in found.layers.items():
                    close(f"layer {index}", state, wanted[1][index][..., order])
        assert anatomy_of(model).gone
        logits = seen_by(copy.deepcopy(model), batch)[0]
        assert (logits - wanted[0]).abs().max() > 1e-2
        distiller.drop()
        free_tails(model)
        close("student without its teacher", seen_by(model, batch)[0], logits)
        assert all(not module.dense for module in model.modules() if isinstance(module, EmptyLayer))
