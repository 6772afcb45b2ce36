"""Scores of hidden dimensions against brute force and scipy, the search with them against slow ones, and whole runs."""

import copy
import json
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from check import Unrounded, close
from own_loop import BRIEF, ONCE, Loop, equal_bits, take_both
from own_loop import patched as in_training
from scipy.stats import kurtosis as scipy_kurtosis
from tiny_models import (
    GENERATORS,
    NAMES,
    fill_adapters,
    free_heads,
    has_hidden_table,
    random_plan,
    tiny_batch,
    tiny_model,
)
from torch import Tensor, nn
from unit_groups import ADVERSARIAL

import apt
from apt.export import CARD
from apt.families import anatomy_of
from apt.families.hidden_parts import HiddenPart
from apt.pruning import PruningConfig, UnitSearch
from apt.pruning.dimensions import find_dimensions
from apt.pruning.salience import OutlierTerm, unit_scores
from apt.pruning.units import block_params, find_units
from apt.records import PrunePlan
from apt.runs.config import load_config
from apt.surgery.prune import apply_prune_plan

HIDDEN = [name for name in NAMES if has_hidden_table(name)]
ALL = ("head", "neuron", "hidden")
WIDE = torch.float64
OF_SITE = {  # from what is read and the gradient of what leaves the gate, [valid tokens, D]
    "product_of_sums": lambda h, g: h.abs().mean(0) * g.abs().sum(0),
    "sum_of_products": lambda h, g: (h * g).abs().sum(0),
    "gate_taylor": lambda h, g: (h * g).sum(0),
}


def collecting(name: str, salience: str, sites: str) -> tuple[Any, Any]:
    """A model whose hidden dimensions collect, in float64 as the rest."""
    model = fill_adapters(apt.patch_model(tiny_model(name), rank=2))
    group = find_dimensions(anatomy_of(model))
    gate = group.mask
    gate.sums, gate.count = gate.sums.to(WIDE), gate.count.to(WIDE)
    gate.collecting, gate.sites, gate.products = True, sites, salience != "product_of_sums"
    return model, group


def tokens(h: Tensor, batch: dict[str, Tensor]) -> Tensor:
    """The valid tokens, of either side, flattened or not; all of what is one token a row."""
    masks = [batch["attention_mask"].bool(), *([batch["labels"] != -100] if batch["labels"].dim() == 2 else [])]
    for mask in masks:
        if h.shape[:-1] in (mask.shape, (mask.numel(),)):
            return h.reshape(mask.numel(), -1)[mask.flatten()]
    return h


SCORED = [(name, "product_of_sums") for name in HIDDEN]
SHARPER = ("sum_of_products", "gate_taylor")
SCORED += [(name, salience) for name in ("bert", "opt_350m", "t5") for salience in SHARPER]


@pytest.mark.parametrize("masked", [False, True], ids=["open", "masks on their way"])
@pytest.mark.parametrize(("name", "salience"), SCORED)
def test_read_scores_equal_brute_force(name: str, masked: bool, salience: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """From what goes into every gate and comes out of it, padding left out, site by site."""
    model, group = collecting(name, salience, "read")
    if masked:
        group.mask.set_mask(torch.randint(1, 3, (32,)) / 2)
    passed: list[tuple[Tensor, Tensor]] = []
    read = group.mask.read

    def watched(h: Tensor, site: Any) -> Tensor:
        y = read(h, site)
        if site is not None:
            y.retain_grad()
            passed.append((h.detach(), y))
        return y

    monkeypatch.setattr(group.mask, "read", watched)
    batch = tiny_batch(name)
    model(**batch).loss.backward()
    sites = [OF_SITE[salience](tokens(h, batch), tokens(y.grad, batch)) for h, y in passed]
    reads = sum(len(layer.stack.parts) for layer in anatomy_of(model).layers)  # attention, FFN
    # And the head; of an MLM head its transform too; of an encoder what the cross-attentions read.
    assert len(sites) == reads + (2 if name.startswith(("bert_mlm", "t5", "mt5")) else 1)
    wanted = torch.stack(sites).sum(0)
    wanted = wanted.abs() if salience == "gate_taylor" else wanted
    assert wanted.min() > 0
    close("scores", unit_scores(group, salience=salience), wanted)


@pytest.mark.parametrize("name", ["bert", "llama_gqa", "gemma2", "opt_350m", "t5_gated"])
def test_write_scores_equal_brute_force(name: str) -> None:
    model, group = collecting(name, "product_of_sums", "write")
    seen: dict[nn.Module, Tensor] = {}

    def keep(module: nn.Module, inputs: Any, output: Tensor) -> None:
        output.retain_grad()
        seen[module] = output

    for writer in group.writers:
        writer.register_forward_hook(keep)
    batch = tiny_batch(name)
    model(**batch).loss.backward()
    found = [OF_SITE["product_of_sums"](tokens(y.detach(), batch), tokens(y.grad, batch)) for y in seen.values()]
    assert len(found) == sum(len(layer.stack.parts) for layer in anatomy_of(model).layers)
    close("scores", unit_scores(group), torch.stack(found).sum(0))


@pytest.mark.parametrize("name", ["bert", "llama_bias", "gemma2", "opt"])
def test_magnitude_is_what_the_layers_lose_with_a_dimension(name: str) -> None:
    model = apt.patch_model(tiny_model(name))
    apply_prune_plan(model, random_plan(model, hidden=True, empty=free_heads(model)[-1:], seed=1))
    anatomy = anatomy_of(model)
    scores = unit_scores(find_dimensions(anatomy), salience="magnitude")

    def norm(of: Any) -> Tensor:
        inside = nn.ModuleList(layer.module for layer in anatomy_of(of).layers)
        return sum(p.detach().abs().sum() for key, p in inside.named_parameters() if "lora_" not in key)

    for dimension in (0, 7, len(scores) - 1):
        without = copy.deepcopy(model)
        kept = {"hidden": [i for i in range(len(scores)) if i != dimension]}
        apply_prune_plan(without, PrunePlan(step=1, target_sparsity=0.0, kept=kept, round_to=1))
        close(f"dimension {dimension}", scores[dimension], norm(model) - norm(without))


def test_gate_taylor_is_the_slope_of_the_loss_in_the_read_gates() -> None:
    """Of an open model; norms weigh by the mask as well, which the slope of the whole would contain."""
    model, group = collecting("llama_cls", "gate_taylor", "read")
    leaf = torch.ones(32, dtype=WIDE, requires_grad=True)
    model(**tiny_batch("llama_cls")).loss.backward()
    got, read = unit_scores(group, salience="gate_taylor"), group.mask.read
    group.mask.read = lambda h, site: read(h, None) * leaf
    group.mask.collecting = False
    model(**tiny_batch("llama_cls")).loss.backward()
    close("slope", got, leaf.grad.abs())


@pytest.mark.parametrize("roles", [("q", "v"), ("q", "o", "down")], ids=["frozen", "adapted"])
@pytest.mark.parametrize("mode", ["paper", "original"])
def test_kurtosis_of_a_dimension_is_scipys_over_every_row(mode: str, roles: tuple[str, ...]) -> None:
    model = fill_adapters(apt.patch_model(tiny_model("llama_gqa"), rank=2, target_modules=roles))
    group, term = find_dimensions(anatomy_of(model)), OutlierTerm(mode)
    inputs: dict[nn.Module, Tensor] = {}
    assert len(term.inputs([group])) == 6
    for writer, gate in zip(group.writers, term.inputs([group]), strict=True):
        gate.sums, gate.total, gate.count = gate.sums.to(WIDE), gate.total.to(WIDE), gate.count.to(WIDE)
        gate.collecting = gate.totals = True
        gate.register_forward_hook(lambda g, x, y, key=writer: inputs.update({key: x[0].detach()}))
        writer.weight.data.pow_(3).mul_(10)  # heavy tails
    batch = tiny_batch("llama_gqa")
    model(**batch).loss.backward()
    wanted = torch.zeros(32, dtype=WIDE)
    for writer in group.writers:
        rows = (writer.merged_weight() * inputs[writer][batch["attention_mask"].bool()].mean(0)).numpy()
        excess, n = scipy_kurtosis(rows, axis=1), rows.shape[1]
        if mode == "original":  # its z-scores divide by the deviation of the sample
            excess = (excess + 3) * ((n - 1) / n) ** 2 - 3
        wanted += torch.from_numpy(np.sqrt(excess.clip(min=0))) / batch["attention_mask"].sum()
    assert wanted.max() > 0.05
    scores = {"hidden": torch.rand(32, dtype=WIDE)}
    close("term", term.add([group], scores)["hidden"] - scores["hidden"], wanted)


@pytest.mark.parametrize("scores", [key for key in ADVERSARIAL if "NaN" not in key])
@pytest.mark.parametrize("round_to", [1, 8])
@pytest.mark.parametrize("balance", ["type", "none"])
@pytest.mark.parametrize("name", ["bert", "llama_gqa"])
def test_a_plan_keeps_its_budget(name: str, balance: str, round_to: int, scores: str) -> None:
    """Counted on the cut model itself: at most the budget, and less below it than the next entry of the ranking costs.

    That is a head or a bundle of neurons; a bundle of dimensions where all of these are there.
    """
    start = apt.patch_model(tiny_model(name))
    anatomy = anatomy_of(start)
    total = block_params(anatomy)
    config = PruningConfig(balance=balance, round_to=round_to, unit_types=ALL)
    for sparsity in (0.0, 0.5, 0.9):
        model = copy.deepcopy(start)
        torch.manual_seed(1)
        groups = [*find_units(anatomy_of(model)), find_dimensions(anatomy_of(model), min_hidden=8)]
        given = {group.name: ADVERSARIAL[scores](group.num_units) for group in groups}
        plan = UnitSearch(total, config).plan(groups, given, total, 1, sparsity)
        dims, hidden = len(plan.kept["hidden"]), groups.pop()
        price = [round_to ** (g.kind == "neuron") * (g.cost() - (32 - dims) * g.slope()) for g in groups]
        whole = all(len(plan.kept[g.name]) == g.num_units for g in groups)
        dear = round_to * hidden.cost() if whole else max(price)
        apply_prune_plan(model, plan)
        left = block_params(anatomy_of(model))
        assert dims >= 8
        assert not dims % round_to
        assert left <= (1 - sparsity) * total
        assert left > (1 - sparsity) * total - dear


def slow_plan(groups: list[Any], scores: dict[str, Tensor], live: int, budget: float) -> dict[str, int]:
    """The ranking taken unit by unit, the cost counted anew from the formula of a layer's parameters each time."""
    hidden = groups[-1]
    own = hidden.cost() - sum(g.num_units * g.slope() for g in groups[:-1])
    fixed = live - hidden.num_units * own - sum(g.num_units * g.cost() for g in groups[:-1])
    units = [(float(s) / g.cost(), k, g) for k, g in enumerate(groups) for s in scores[g.name]]
    units.sort(key=lambda unit: (-unit[0], unit[1]))
    kept, open_dims = dict.fromkeys((g.name for g in groups), 0), True
    for _, _, group in units:
        if group is hidden and not open_dims:
            continue
        kept[group.name] += 1
        d = kept["hidden"]
        spent = fixed + d * own
        for g in groups[:-1]:
            spent += kept[g.name] * (g.cost() - g.slope() * (hidden.num_units - d))
        if spent > budget:
            kept[group.name] -= 1
            if group is not hidden:
                break
            open_dims = False
    return kept


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("sparsity", [0.2, 0.5, 0.8])
def test_the_search_equals_one_that_counts_anew(seed: int, sparsity: float) -> None:
    model = apt.patch_model(tiny_model("llama_bias"))
    anatomy = anatomy_of(model)
    groups = [*find_units(anatomy), find_dimensions(anatomy)]
    for group in groups[:-1]:
        object.__setattr__(group, "floor", 0)
    live, draw = block_params(anatomy), torch.Generator().manual_seed(seed)
    scores = {g.name: torch.rand(g.num_units, generator=draw, dtype=WIDE) * g.cost() for g in groups}
    config = PruningConfig(balance="none", round_to=1, unit_types=ALL)
    plan = UnitSearch(live, config).plan(groups, scores, live, 1, sparsity)
    wanted = slow_plan(groups, scores, live, (1 - sparsity) * live)
    assert {name: len(kept) for name, kept in plan.kept.items()} == wanted
    assert 0 < wanted["hidden"] < 32
    for group in groups:  # and those that stay are the best of each group
        best = scores[group.name].argsort(descending=True)[: wanted[group.name]]
        assert plan.kept[group.name] == sorted(best.tolist())


def test_no_counts_within_the_budget_are_worth_much_more() -> None:
    """Every combination of heads, neuron bundles and dimension bundles of a layer that has few."""
    model = apt.patch_model(tiny_model("bert", num_hidden_layers=1))
    anatomy = anatomy_of(model)
    groups = [*find_units(anatomy), find_dimensions(anatomy)]
    live = block_params(anatomy)
    torch.manual_seed(2)
    scores = {g.name: torch.rand(g.num_units, dtype=WIDE).sort(descending=True)[0] * g.cost() for g in groups}
    config = PruningConfig(balance="none", round_to=8, unit_types=ALL, min_hidden=8)
    worth = {g.name: np.append(0, scores[g.name].cumsum(0)) for g in groups}
    heads, neurons, hidden = groups
    own = hidden.cost() - sum(g.num_units * g.slope() for g in groups[:2])
    fixed = live - 32 * own - sum(g.num_units * g.cost() for g in groups[:2])
    for sparsity in (0.3, 0.5, 0.7):
        best = 0.0
        for h, n, d in product(range(5), range(0, 41, 8), range(8, 33, 8)):
            units = ((h, heads), (n, neurons))
            spent = fixed + d * own + sum(k * (g.cost() - g.slope() * (32 - d)) for k, g in units)
            if spent <= (1 - sparsity) * live:
                best = max(best, worth[heads.name][h] + worth[neurons.name][n] + worth["hidden"][d])
        plan = UnitSearch(live, config).plan(groups, scores, live, 1, sparsity)
        assert sum(worth[name][len(kept)] for name, kept in plan.kept.items()) >= 0.7 * best


def test_a_uniform_layout_has_its_dimensions_too() -> None:
    model = apt.patch_model(tiny_model("llama_bias"))
    anatomy = anatomy_of(model)
    groups, total = (
        [*find_units(anatomy), find_dimensions(anatomy)],
        block_params(anatomy),
    )
    torch.manual_seed(0)
    scores = {g.name: torch.rand(g.num_units) for g in groups}
    pruner = UnitSearch(total, PruningConfig(layout="uniform", unit_types=ALL, target_sparsity=0.6))
    pruner.check(groups, total)
    plan = pruner.plan(groups, scores, total, 1, 0.6)
    counts = [{len(plan.kept[g.name]) for g in groups if g.kind == kind} for kind in ALL]
    assert all(len(found) == 1 for found in counts)
    apply_prune_plan(model, plan)
    assert 0.6 <= 1 - block_params(anatomy) / total < 0.75
    assert apt.summary(model).hidden in (8, 16, 24)


def test_a_target_below_the_floors_is_refused() -> None:
    model = in_training("bert")
    with pytest.raises(ValueError, match=r"min_hidden=32 at most 0\.\d+ can go; lower"):
        Loop("bert", model, 30, target_sparsity=0.999, unit_types=ALL, min_hidden=32, **BRIEF)
    with pytest.raises(ValueError, match=r"min_heads=4 and min_neurons=40, min_hidden=16 at most 0\.(49|50)"):
        Loop("bert", model, 30, target_sparsity=0.6, unit_types=ALL, min_hidden=16, min_heads=4, min_neurons=40)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"unit_types": ()}, r"unit_types must be some of \['head', 'neuron', 'hidden', 'layer'\], got \[\]"),
        ({"unit_types": ("heads",)}, r"unit_types must be some of .* got \['heads'\]"),
        ({"hidden_sites": "both"}, r"hidden_sites must be one of \['read', 'write'\], got 'both'"),
        ({"min_hidden": 0}, "round_to, min_hidden and min_layers must be at least 1"),
    ],
)
def test_bad_settings(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=f"pruning: {words}"):
        PruningConfig(**settings)


RUNS = [
    ("bert", {}),
    ("llama_gqa", {"unit_types": ("neuron", "hidden")}),
    ("gemma2", {"hidden_sites": "write"}),
    ("opt_350m", {"kurtosis": "normalized"}),
    ("t5", {"unit_types": ("neuron", "hidden")}),
]


@pytest.mark.parametrize(("name", "settings"), RUNS)
def test_a_run_prunes_all_three(name: str, settings: dict[str, Any], tmp_path: Path) -> None:
    settings = {"target_sparsity": 0.6, "unit_types": ALL, "verify_events": True, **settings, **BRIEF}
    loop = Loop(name, in_training(name), 30, **settings).take(30)
    run, counts = loop.run, apt.summary(loop.model)
    assert len(run.events) == 3
    for event in run.events:
        assert event.target_sparsity <= event.sparsity <= event.target_sparsity + 0.06
    assert 8 <= counts.hidden < 32
    assert counts.hidden % 4 == 0
    assert counts.hidden == len(run.events[-1].prune.kept["hidden"])
    assert not any(gate.collecting or gate.masked for gate in run.pruning.units.masks)
    listed = {id(p) for group in loop.optimizer.param_groups for p in group["params"]}
    assert listed == {id(p) for p in loop.model.parameters() if p.requires_grad}
    loop.model.eval()
    with torch.no_grad(), Unrounded():
        wanted = loop.model(**tiny_batch(name)).logits
        apt.export_model(loop.model, tmp_path / "small")
        loaded = apt.load_model(tmp_path / "small")
        close("logits", loaded(**tiny_batch(name)).logits, wanted)
    assert sum(p.numel() for p in loaded.parameters()) == counts.params_after


@pytest.mark.parametrize("kinds", [("hidden",), ("head", "hidden"), ("neuron",)])
def test_only_the_kinds_named_are_pruned(kinds: tuple[str, ...]) -> None:
    loop = Loop("llama", in_training("llama"), 40, target_sparsity=0.4, unit_types=kinds, **ONCE).take(20)
    counts = apt.summary(loop.model)
    heads = {count for name, count in counts.units.items() if "heads" in name}
    neurons = {count for name, count in counts.units.items() if "neurons" in name}
    assert (heads != {4}) == ("head" in kinds)
    assert (neurons != {40}) == ("neuron" in kinds)
    assert (counts.hidden != 32) == ("hidden" in kinds)


def test_hidden_dimensions_fall_with_the_others_and_rest_at_zero_or_one() -> None:
    loop = Loop("bert", in_training("bert"), 40, target_sparsity=0.5, unit_types=ALL, **ONCE).take(10)
    loop.run.pruning.salience.update = lambda new: None  # scores that hold still
    gate = loop.run.groups[-1].mask
    last = gate.values.clone()
    for step in range(11, 20):
        loop.take(1)
        assert (gate.values <= last).all()
        last = gate.values.clone()
        if step < 15:
            falling = torch.tensor(1.0 - 0.2 * (step - 10))
            assert ((last == 1) | ((last - falling).abs() < 1e-6)).all()
            assert (last < 1).any()
        else:
            assert ((last == 0) | (last == 1)).all()


def test_a_run_resumes_bit_for_bit(tmp_path: Path) -> None:
    """From a checkpoint in the middle of the second decay, hidden masks half down and some dimensions gone."""
    settings = {"target_sparsity": 0.7, "unit_types": ("neuron", "hidden"), **BRIEF}
    whole = Loop("llama_cls", in_training("llama_cls", torch.float32), 30, **settings).take(10)
    mask = whole.run.groups[-1].mask.values
    assert ((mask > 0) & (mask < 1)).any()
    assert len(mask) < 32
    resumed = whole.resumed(in_training("llama_cls", torch.float32), tmp_path, 30, **settings)
    take_both(whole, resumed, 12)
    assert [event.prune for event in whole.run.events] == [event.prune for event in resumed.run.events]
    assert equal_bits(whole.model, resumed.model)


@pytest.mark.parametrize("keep_tail", [False, True], ids=["freed", "tail kept"])
@pytest.mark.parametrize("name", HIDDEN)
def test_an_export_loads_again(name: str, keep_tail: bool, tmp_path: Path) -> None:
    model = fill_adapters(apt.patch_model(tiny_model(name, torch.float32), rank=3))
    plan = random_plan(model, hidden=True, empty=free_heads(model)[-1:], seed=1)
    apply_prune_plan(model, plan, keep_tail=keep_tail)
    with torch.no_grad():
        wanted = model(**tiny_batch(name)).logits
        apt.export_model(model, tmp_path / "small")
        loaded = apt.load_model(tmp_path / "small")
        close("logits", loaded(**tiny_batch(name)).logits, wanted)
    counts, card = apt.summary(model), json.loads((tmp_path / "small" / CARD).read_text())
    assert (card["hidden"], card["format"]) == (len(plan.kept["hidden"]), 2)
    assert sum(p.numel() for p in loaded.parameters()) == counts.params_after
    again = apt.patch_model(loaded, rank=3)
    assert apt.summary(again).hidden == counts.hidden
    apply_prune_plan(again, random_plan(again, hidden=True, seed=2))
    apt.export_model(again, tmp_path / "smaller")
    with torch.no_grad():
        close(
            "logits", apt.load_model(tmp_path / "smaller")(**tiny_batch(name)).logits, again(**tiny_batch(name)).logits
        )


@pytest.mark.filterwarnings("error:export")
@pytest.mark.parametrize("name", ["llama", "llama_gqa", "llama_cls", "mistral", "qwen2_mixed", "qwen3", "phi3"])
def test_auto_model_loads_fewer_dimensions(name: str, tmp_path: Path) -> None:
    model = uniform(name)
    apt.export_model(model, tmp_path / "export")
    card = json.loads((tmp_path / "export" / CARD).read_text())
    assert (card["stock"], card["format"], "hidden" in card) == (True, 1, False)
    auto = transformers.AutoModelForCausalLM if name in GENERATORS else transformers.AutoModelForSequenceClassification
    stock, report = auto.from_pretrained(tmp_path / "export", output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert stock.config.hidden_size == 24
    with torch.no_grad():
        wanted = model(**tiny_batch(name)).logits
        for other in (stock.eval(), apt.load_model(tmp_path / "export")):
            close("logits", other(**tiny_batch(name)).logits, wanted)


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("gemma2", "Gemma2Config derives the scale of the embeddings from the hidden size, so it cannot say 24 of 32"),
        ("bert", "BertConfig derives the size of a head from the hidden size, so it cannot say 24"),
        ("opt", "OPTConfig derives the size of a head from the hidden size"),
    ],
)
def test_what_a_config_cannot_say_is_said(name: str, why: str, tmp_path: Path) -> None:
    model = uniform(name)
    with pytest.warns(UserWarning, match=f"AutoModel alone cannot load it: {why}"):
        apt.export_model(model, tmp_path / "export")
    with torch.no_grad():
        loaded = apt.load_model(tmp_path / "export")
        close("logits", loaded(**tiny_batch(name)).logits, model(**tiny_batch(name)).logits)


def uniform(name: str) -> Any:
    """24 of 32 dimensions, 24 neurons, every head."""
    model = fill_adapters(apt.patch_model(tiny_model(name, torch.float32), rank=3, layout="uniform"))
    plan = random_plan(model, seed=1)
    neurons = {key: list(range(1, 25)) for key in plan.kept if key.endswith("neurons")}
    kept = {"hidden": sorted(torch.randperm(32, generator=torch.Generator().manual_seed(1))[:24].tolist())}
    apply_prune_plan(model, PrunePlan(step=1, target_sparsity=0.0, kept=neurons | kept, round_to=8))
    return model


def test_unit_types_in_a_config(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("{output_dir: out, model: {name: tiny}, data: {datasets: rows.csv}}")
    given = load_config(path, ["unit_types=[head, hidden]", "hidden_sites=write"])
    assert given.apt_config().pruning.unit_types == ("head", "hidden")
    path.write_text(given.to_yaml())
    assert load_config(path) == given
    with pytest.raises(ValueError, match="unit_types must be a list of names, got 'head'"):
        load_config(path, ["unit_types=head"])


def test_parts_name_each_module_once() -> None:
    for name in HIDDEN:
        model = apt.patch_model(tiny_model(name))
        parts: list[HiddenPart] = list(find_dimensions(anatomy_of(model)).parts)
        owners = [part.name for part in parts if part.kind != "mask"]
        assert len(owners) == len(set(owners)), name
