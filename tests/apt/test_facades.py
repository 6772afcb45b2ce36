"""The parts on their own, in loops that have no Controller: the same functions, the same results."""

import copy
from typing import Any

import pytest
import torch
from check import close
from own_loop import Loop, patched
from tiny_models import fill_adapters, tiny_batch, tiny_model
from torch import Tensor, nn

import apt
from apt.layers import APTAdapter, adapted
from apt.pruning import PruningConfig
from apt.pruning.ranks import TuningConfig
from apt.pruning.salience import SALIENCES

NAMES = ["bert", "llama_gqa"]


def stepped(name: str, *, seed: int = 2) -> Any:
    """A patched model with gradients of one batch."""
    model = fill_adapters(patched(name))
    model(**tiny_batch(name, seed=seed)).loss.backward()
    return model


def pruner_of(model: Any, sparsity: float = 0.5, **settings: Any) -> apt.AdaptivePruner:
    scheduler = apt.SparsityScheduler(100, sparsity, "cubic")
    config = {key: settings.pop(key) for key in list(settings) if key in PruningConfig.__dataclass_fields__}
    return apt.AdaptivePruner(model, scheduler, config=PruningConfig(round_to=1, **config), **settings)


def adapter_params(model: Any) -> int:
    return sum(m.rank * (m.n_in + m.n_out) for _, m in adapted(model) if m.rank)


# The tuner.


@pytest.mark.parametrize("name", NAMES)
def test_salience_of_an_adapter_is_equation_7(name: str) -> None:
    model = stepped(name)
    found = apt.AdaptiveTuner(model, 10**9).compute_adapter_salience(model.named_parameters())
    wanted = {
        key.removesuffix(".lora_B"): (p * p.grad).abs().sum().item()
        for key, p in model.named_parameters()
        if key.endswith(".lora_B")
    }
    assert found == pytest.approx(wanted)
    assert len(found) == len(wanted) > 4
    signed = apt.AdaptiveTuner(model, 10**9, config=TuningConfig())
    less = signed.compute_adapter_salience(model.named_parameters())
    assert all(less[key] < found[key] for key in found)


def test_ranks_grow_to_the_target_and_no_further_than_the_maximum() -> None:
    model = stepped("bert")
    start, before = adapter_params(model), copy.deepcopy(model)
    tuner = apt.AdaptiveTuner(model, 2 * start)
    assert tuner.current_params == start
    salience = tuner.compute_adapter_salience(model.named_parameters())
    widest = max(m.n_in + m.n_out for _, m in adapted(model))
    for target, allowed in ((int(1.5 * start), int(1.5 * start)), (5 * start, 2 * start), (start, 2 * start)):
        reached = tuner.adjust_ranks(salience, target)
        assert allowed - widest < reached == adapter_params(model) <= allowed
    grown = {key for key, module in adapted(model) if module.rank > 3}
    half = sorted(salience, key=lambda key: -salience[key])[: len(salience) // 2]
    assert grown == set(half)
    batch = tiny_batch("bert")
    close("logits", model.eval()(**batch).logits, before.eval()(**batch).logits)


def test_the_moments_of_an_optimizer_follow_growth() -> None:
    model = patched("bert")
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    tuner = apt.AdaptiveTuner(model, 10**9, optimizer=optimizer)
    for step in range(3):
        model(**tiny_batch("bert", seed=step)).loss.backward()
        optimizer.step()
        tuner.adjust_ranks(tuner.compute_adapter_salience(model.named_parameters()), tuner.current_params + 500)
        optimizer.zero_grad()
    moments = [state["exp_avg"].shape == p.shape for p, state in optimizer.state.items()]
    assert all(moments)
    assert len(moments) > 8


def test_what_the_tuner_refuses() -> None:
    model = patched("bert")
    with pytest.raises(ValueError, match="max_params must be at least 1, got 0"):
        apt.AdaptiveTuner(model, 0)
    with pytest.raises(ValueError, match=r"no adapters; call apt\.patch_model\(model\) first"):
        apt.AdaptiveTuner(tiny_model("bert"), 100)
    tuner = apt.AdaptiveTuner(model, 10**9)
    with pytest.raises(ValueError, match=r"no adapter has a gradient; call .* after loss\.backward"):
        tuner.compute_adapter_salience(model.named_parameters())
    with pytest.raises(ValueError, match="names 'nowhere', which is no adapter of this model"):
        tuner.adjust_ranks({"nowhere": 1.0}, 10**6)


@pytest.mark.parametrize("init_type", ["lora", "gaussian"])
def test_increase_rank_leaves_the_output(init_type: str) -> None:
    torch.manual_seed(0)
    adapter = APTAdapter(nn.Linear(6, 5), rank=2)
    adapter.lora_B.data.normal_()
    x = torch.randn(3, 6)
    before, rows = adapter(x), adapter.lora_A.detach().clone()
    adapter.increase_rank(7, init_type)
    assert (adapter.rank, adapter.lora_A.shape, adapter.lora_B.shape) == (7, (7, 6), (5, 7))
    close("output", adapter(x), before)
    assert torch.equal(adapter.lora_A[:2], rows)
    assert adapter.lora_A[2:].std() > 0.05
    default = APTAdapter(nn.Linear(6, 5), rank=2)
    default.increase_rank(4)
    assert default.lora_A[2:].abs().max() <= 1.0 / 6**0.5  # LoRA's uniform start has a bound, a Gaussian has none
    with pytest.raises(ValueError, match="new_rank must be above the present rank 7, got 7"):
        adapter.increase_rank(7)


# The pruner.


@pytest.mark.parametrize("salience", [name for name in SALIENCES if name != "obs"])  # that goes with a repair
@pytest.mark.parametrize("name", NAMES)
def test_the_first_cut_is_the_controllers(name: str, salience: str) -> None:
    """Statistics of the same batches, no moving average: the same units stay."""
    start, settings = patched(name), {"salience": salience, "kurtosis": "off"}
    loop = Loop(name, copy.deepcopy(start), 30, prune_before_tuning=True, target_sparsity=0.5, round_to=1, **settings)
    loop.run.prune_before_tuning([tiny_batch(name)])
    pruner = pruner_of(start, **settings)
    start(**tiny_batch(name)).loss.backward()
    plan = pruner.apply_mask(pruner.generate_mask(pruner.compute_salience(), 0.5))
    assert plan is not None
    assert plan.kept == loop.run.events[0].prune.kept
    assert apt.summary(start).sparsity == apt.summary(loop.model).sparsity >= 0.5


@pytest.mark.parametrize("salience", ["product_of_sums", "sum_of_products", "gate_taylor"])
def test_salience_from_activations_that_one_has_kept(salience: str) -> None:
    """Handed in, as tensors of every token or as sums, they give what the gates collect themselves."""
    model = patched("llama", target_modules=["q", "v"])
    pruner = pruner_of(model, salience=salience, kurtosis="paper")
    kept: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Tensor], out: Tensor) -> None:
            out.retain_grad()
            kept[name] = out

        return hook

    hooks = [group.mask.register_forward_hook(keep(group.name)) for group in pruner.groups]
    batch = tiny_batch("llama", length=5) | {"attention_mask": torch.ones(4, 5, dtype=torch.long)}
    model(**batch).loss.backward()
    for hook in hooks:
        hook.remove()
    own = pruner.compute_salience()
    values = {name: value.detach() for name, value in kept.items()}
    grads: dict[str, Any] = {name: value.grad for name, value in kept.items()}
    handed = pruner.compute_salience(values, grads)
    assert own.keys() == handed.keys()
    for name in own:
        close(name, handed[name], own[name])
    if salience == "product_of_sums":
        pruner = pruner_of(model, kurtosis="off")
        sums = [{name: t.abs().sum((0, 1)) for name, t in table.items()} for table in (values, grads)]
        for name, score in pruner.compute_salience(*sums).items():
            products = sums[0][name] * sums[1][name]
            close(name, score, products.view(len(score), -1).sum(1).float())


def test_masks_fall_evenly_and_then_are_cut() -> None:
    model = stepped("bert")
    pruner = pruner_of(model)
    model(**tiny_batch("bert")).loss.backward()
    masks = pruner.generate_mask(pruner.compute_salience(), 0.5)
    for alpha in (0.25, 0.5):
        assert pruner.apply_mask(masks, alpha) is None
    for group in pruner.groups:
        assert torch.equal(group.mask.values, torch.where(masks[group.name] > 0, 1.0, 0.25))
    pruner.apply_mask(masks, 0.25)
    batch = tiny_batch("bert")
    masked = model.eval()(**batch).logits
    pruner.apply_mask(masks)
    close("logits", model(**batch).logits, masked)
    assert 0.5 <= apt.summary(model).sparsity < 0.55
    assert all(group.mask.collecting for group in pruner.groups)
    pruner.close()
    assert not any(group.mask.collecting for group in pruner.groups)


def test_a_moving_average_follows_the_cut() -> None:
    model = patched("bert")
    pruner = pruner_of(model, momentum=0.5)
    for seed in (1, 2):
        model(**tiny_batch("bert", seed=seed)).loss.backward()
        salience = pruner.compute_salience()
        pruner.apply_mask(pruner.generate_mask(salience, 0.2 * seed))
        assert all(len(pruner._average.values[g.name]) == g.num_units for g in pruner.groups)
    assert 0.4 <= apt.summary(model).sparsity < 0.45


def test_what_the_pruner_refuses() -> None:
    with pytest.raises(ValueError, match=r"not patched; call apt\.patch_model"):
        pruner_of(tiny_model("bert"))
    with pytest.raises(ValueError, match=r"target_sparsity 0\.9 is not reachable; with min_heads=3"):
        pruner_of(patched("bert"), 0.9, min_heads=3)
    pruner = pruner_of(patched("bert"))
    with pytest.raises(ValueError, match="give activations and gradients, or neither"):
        pruner.compute_salience({})
    with pytest.raises(ValueError, match=r"layers\.0\.heads needs an activation and a gradient of shape \[.*, 32\]"):
        pruner.compute_salience({}, {})
    with pytest.raises(ValueError, match=r"masks are missing for \['layers\.0\.heads', "):
        pruner.apply_mask({})
    masks = {group.name: torch.ones(group.num_units) for group in pruner.groups}
    with pytest.raises(ValueError, match=r"alpha must be in \(0, 1\], got 1\.5"):
        pruner.apply_mask(masks, 1.5)


def test_the_scheduler_takes_the_three_arguments_of_the_seeds() -> None:
    scheduler = apt.SparsityScheduler(1000, 0.6, "cubic")
    asked = [scheduler.get_current_sparsity(step) for step in (0, 200, 400, 1000)]
    assert asked[0] == 0.0 < asked[1] < asked[2] == asked[3] == 0.6


def test_the_example_prunes_and_tunes() -> None:
    from examples.parts import train

    model = patched("bert", torch.float32)
    start = adapter_params(model)
    losses = train(
        model, [tiny_batch("bert", seed=seed) for seed in range(4)] * 15, target_sparsity=0.5, learning_rate=1e-2
    )
    assert 0.5 <= apt.summary(model).sparsity < 0.65
    assert start < adapter_params(model) <= 2 * start
    assert sum(losses[-4:]) < 0.2 * sum(losses[:4])
    assert not any(module.unit_mask.collecting for _, module in adapted(model) if module.unit_mask is not None)
