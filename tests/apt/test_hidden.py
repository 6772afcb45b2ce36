"""Hidden dimensions: masked equals shrunk in every family, with heads and neurons; continuous masks; exact costs."""

from typing import Any

import pytest
import torch
from check import Unrounded, close
from test_surgery import EVERYWHERE, groups_of, patched
from tiny_models import (
    GENERATORS,
    NAMES,
    SEQ2SEQ,
    free_heads,
    has_hidden_table,
    random_plan,
    set_masks,
    tiny_batch,
    tiny_model,
)
from torch import Tensor, nn

import apt
import apt_kernels
from apt.families import anatomy_of
from apt.layers import adapted
from apt.layers.hidden import HiddenNorm
from apt.pruning.dimensions import HiddenGroup, find_dimensions
from apt.pruning.units import block_params, find_units
from apt.records import PrunePlan
from apt.surgery.prune import apply_prune_plan

HIDDEN = [name for name in NAMES if has_hidden_table(name)]


def dimensions(model: Any) -> HiddenGroup:
    return find_dimensions(anatomy_of(model))


def of_hidden(kept: list[int]) -> PrunePlan:
    return PrunePlan(step=1, target_sparsity=0.0, kept={"hidden": kept}, round_to=1)


def responses(model: Any, name: str) -> list[Tensor]:
    """Logits, and the gradients of a random upstream at the embeddings of both sides."""
    batch, embed = tiny_batch(name), model.get_input_embeddings()
    inputs = {"inputs_embeds": embed(batch["input_ids"]), "attention_mask": batch["attention_mask"]}
    if name in SEQ2SEQ:
        inputs["decoder_inputs_embeds"] = embed(model.prepare_decoder_input_ids_from_labels(batch["labels"]))
        inputs["decoder_attention_mask"] = (batch["labels"] != -100).long()
    inputs |= {key: x.detach().requires_grad_() for key, x in inputs.items() if key.endswith("embeds")}
    with Unrounded():
        logits = model(**inputs, use_cache=False).logits
    upstream = torch.randn(logits.shape, dtype=logits.dtype, generator=torch.Generator().manual_seed(7))
    leaves = [x for key, x in inputs.items() if key.endswith("embeds")]
    return [logits.detach(), *torch.autograd.grad(logits, leaves, upstream)]


def of_kept(masked: Tensor, shrunk: Tensor, kept: list[int]) -> Tensor:
    """The kept dimensions of the masked model's gradient; the others have none. (OPT may project its embeddings.)"""
    if masked.shape == shrunk.shape:
        return masked
    gone = [i for i in range(masked.shape[-1]) if i not in kept]
    assert not masked[..., gone].any()
    return masked[..., kept]


@pytest.mark.filterwarnings("ignore:`inputs_embeds`")
@pytest.mark.parametrize("keep_tail", [False, True], ids=["freed", "tail kept"])
@pytest.mark.parametrize("name", HIDDEN)
def test_masked_equals_shrunk(name: str, keep_tail: bool) -> None:
    """Two events of all three kinds; in the end no layer that needs none has heads, and two have no neurons."""
    model = patched(name)
    heads, neurons = free_heads(model), [name for name in groups_of(model) if name.endswith("neurons")]
    for seed, empty in enumerate(([heads[-1], neurons[0]], [*heads, neurons[-1]]), 1):
        plan = random_plan(model, hidden=True, empty=empty, seed=seed)
        whole = responses(model, name)
        set_masks(model, of_hidden(plan.kept["hidden"]))
        assert (responses(model, name)[0] - whole[0]).abs().max() > 1e-2  # otherwise nothing is tested
        set_masks(model, plan)
        masked = responses(model, name)
        apply_prune_plan(model, plan, keep_tail=keep_tail)
        for what, ours, theirs in zip(
            ("logits", "gradient", "of decoder"), responses(model, name), masked, strict=False
        ):
            close(f"event {seed}: {what}", ours, of_kept(theirs, ours, plan.kept["hidden"]))
    counts = apt.summary(model)
    assert (counts.hidden, counts.masked) == (len(plan.kept["hidden"]), 0)
    stored = sum(p.numel() for key, p in model.named_parameters() if "lora_" not in key)
    assert (counts.params_after < stored) if keep_tail else (counts.params_after == stored)


@pytest.mark.parametrize("method", ["gsa", "spectral_a", "spectral_r"])
@pytest.mark.parametrize("name", ["bert", "llama_gqa"])
def test_masked_equals_shrunk_under_any_method(name: str, method: str) -> None:
    model = apt.patch_model(tiny_model(name), method=method, prune=True, rank=3, target_modules=EVERYWHERE)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(**tiny_batch(name)).loss.backward()
    optimizer.step()
    for seed in (1, 2):
        plan = random_plan(model, hidden=True, empty=free_heads(model)[-1:], seed=seed)
        set_masks(model, plan)
        masked = responses(model, name)[0]
        apply_prune_plan(model, plan, optimizer)
        close(f"event {seed}", responses(model, name)[0], masked)


@pytest.mark.parametrize("name", HIDDEN)
def test_masks_of_one_change_nothing_and_cost_no_op(name: str) -> None:
    plain, model = tiny_model(name), apt.patch_model(tiny_model(name))
    apt_kernels.reset_calls()
    with torch.no_grad():
        ours, theirs = (m(**tiny_batch(name)).logits for m in (model, plain))
    if name.startswith("gpt2"):  # its Conv1D adds in another order than a linear
        close("logits", ours, theirs)
    else:
        assert torch.equal(ours, theirs)
    assert not {"gate", "masked_norm"} & set(apt_kernels.calls())


@pytest.mark.parametrize("name", HIDDEN)
def test_a_mask_falls_without_a_jump(name: str) -> None:
    """In steps of 0.01 from 1 to 0: the logits move by little in each, by no more at the ends than between."""
    model = apt.patch_model(tiny_model(name))
    gate, chosen = dimensions(model).mask, torch.rand(32, generator=torch.Generator().manual_seed(1)) < 0.3
    moves, last = [], None
    with torch.no_grad(), Unrounded():
        for mask in torch.linspace(1.0, 0.0, 101):
            gate.set_mask(torch.where(chosen, mask, 1.0))
            logits = model(**tiny_batch(name)).logits
            moves.append(0.0 if last is None else float((logits - last).norm()))
            last = logits
    typical = sorted(moves[1:])[50]
    assert sum(moves) > 0.1
    assert max(moves[1], moves[-1]) <= 6 * typical  # dropping a dimension from a norm at 0 moves it by 50 and more
    assert max(moves) <= 12 * typical


def test_the_norm_that_forgets_its_mask_at_zero_would_jump() -> None:
    """The measure above can tell: with a dimension counted until its mask is 0, as in the authors' code."""
    model = apt.patch_model(tiny_model("llama"))
    gate = dimensions(model).mask
    chosen = torch.rand(32, generator=torch.Generator().manual_seed(1)) < 0.3
    norms = [module for module in model.modules() if isinstance(module, HiddenNorm)]
    outputs = []
    with torch.no_grad(), Unrounded():
        for mask in (0.02, 0.01, 0.0):
            gate.set_mask(torch.where(chosen, mask, 1.0))
            for norm in norms:
                norm.forward = lambda x, n=norm: (  # type: ignore[method-assign]
                    apt_kernels.masked_norm(x, n.weight, mask=(gate.values > 0).double(), eps=n.eps, kind="rms")
                    * gate.values
                )
            outputs.append(model(**tiny_batch("llama")).logits)
    assert (outputs[2] - outputs[1]).norm() > 12 * (outputs[1] - outputs[0]).norm()


def live_params(model: nn.Module) -> int:
    """Every number inside the layers but the adapters'."""
    layers = nn.ModuleList(layer.module for layer in anatomy_of(model).layers)
    return sum(p.numel() for name, p in layers.named_parameters() if "lora_" not in name)


@pytest.mark.parametrize("name", HIDDEN)
def test_a_dimension_costs_what_goes_with_it(name: str) -> None:
    """Exactly, at the sizes of then; and the price of heads and neurons falls by their slope with each dimension."""
    model = apt.patch_model(tiny_model(name))
    anatomy = anatomy_of(model)
    for seed in (1, 2):
        group = dimensions(model)
        before, cost = live_params(model), group.cost()
        prices = {other.name: (other.cost(), other.slope()) for other in find_units(anatomy)}
        apply_prune_plan(model, of_hidden(list(range(1, group.num_units))))
        assert before - live_params(model) == cost == before - block_params(anatomy)
        for other in find_units(anatomy):
            old, slope = prices[other.name]
            assert other.cost() == old - slope
        apply_prune_plan(model, random_plan(model, empty=free_heads(model)[-1:], seed=seed))


@pytest.mark.parametrize("name", HIDDEN)
def test_heads_neurons_and_dimensions_make_up_the_layers(name: str) -> None:
    """``C = d H + sum n (A d + B)`` and norms of a head's features, which are what is left."""
    model = apt.patch_model(tiny_model(name))
    group, others = dimensions(model), find_units(anatomy_of(model))
    own = group.cost() - sum(other.num_units * other.slope() for other in others)
    units = sum(other.num_units * other.cost() for other in others)
    beside = ("q_norm.weight", "k_norm.weight", "relative_attention_bias.weight")
    of_heads = sum(p.numel() for key, p in model.named_parameters() if key.endswith(beside))
    assert units + group.num_units * own + of_heads == live_params(model)
    assert own > 0


def test_costs_by_hand() -> None:
    """d = 32, 3 layers: BERT has 4 heads of 8, 40 neurons, two norms and two biases a layer; Llama two norms."""
    bert, llama = (dimensions(apt.patch_model(tiny_model(name))) for name in ("bert", "llama"))
    assert bert.cost() == 3 * (4 * 32 + 2 * 40 + 2 * 2 + 2)
    assert llama.cost() == 3 * (4 * 32 + 3 * 40 + 2)


@pytest.mark.parametrize("name", [name for name in HIDDEN if name in GENERATORS])
def test_cached_generation(name: str) -> None:
    model = patched(name)
    apply_prune_plan(model, random_plan(model, hidden=True, empty=free_heads(model), seed=1))
    ids = tiny_batch(name)["input_ids"][::4, :6]  # a row without padding
    settings = {"max_new_tokens": 8, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    cached, plain = (
        model.generate(ids, attention_mask=torch.ones_like(ids), use_cache=use, **settings) for use in (True, False)
    )
    assert torch.equal(cached.sequences, plain.sequences)
    for ours, theirs in zip(cached.logits, plain.logits, strict=True):
        close("logits of a step", ours, theirs)


@pytest.mark.parametrize("name", ["llama", "llama_gqa", "gemma2", "bert_mlm", "opt"])
def test_a_teacher_still_finds_the_model_as_it_was(name: str) -> None:
    """With tails kept, full widths and no masks the very function of before: stream, embeddings, norms, tied heads."""
    model = apt.patch_model(tiny_model(name))  # B is zero: dropped adapters change nothing
    batch, full, gate = tiny_batch(name), widths(model), dimensions(model).mask
    for _, module in adapted(model):
        module.drop_adapter()
    with torch.no_grad(), Unrounded():
        before = model(**batch).logits
        for seed in (1, 2):
            plan = of_hidden(random_plan(model, hidden=True, seed=seed).kept["hidden"])
            apply_prune_plan(model, plan, keep_tail=True)
            student, live = model(**batch).logits, widths(model)
            assert (student - before).abs().max() > 1e-2
            set_widths(full)
            gate.dense = True
            close(f"teacher after event {seed}", model(**batch).logits, before)
            set_widths(live)
            gate.dense = False
            close("student", model(**batch).logits, student)


def widths(model: nn.Module) -> dict[Any, tuple[int, int]]:
    return {module: (module.n_out, module.n_in) for _, module in adapted(model)}


def set_widths(found: dict[Any, tuple[int, int]]) -> None:
    for module, (n_out, n_in) in found.items():
        module.n_out, module.n_in = n_out, n_in


def test_a_dense_pass_sees_no_mask_and_collects_nothing() -> None:
    model = apt.patch_model(tiny_model("bert"))
    gate = dimensions(model).mask
    before = model(**tiny_batch("bert")).logits
    gate.set_mask(torch.linspace(0, 1, 32))
    gate.dense = gate.collecting = True
    output = model(**tiny_batch("bert"))
    output.loss.backward()
    assert torch.equal(output.logits, before)
    assert not gate.count.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["bert", "llama_gqa", "gemma2", "opt_350m"])
def test_masked_and_shrunk_agree_in_lower_precision(name: str, dtype: torch.dtype) -> None:
    model = apt.patch_model(tiny_model(name, dtype))
    plan = random_plan(model, hidden=True, seed=1)
    set_masks(model, plan)
    with torch.no_grad():
        masked = model(**tiny_batch(name)).logits
        apply_prune_plan(model, plan)
        shrunk = model(**tiny_batch(name)).logits
    assert masked.dtype == shrunk.dtype
    apart = float((masked - shrunk).abs().max() / masked.abs().max())
    assert apart < (2e-5 if dtype == torch.float32 else 0.1)


def test_moments_of_adapters_and_head_follow() -> None:
    model = patched("bert")
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model(**tiny_batch("bert")).loss.backward()
    optimizer.step()
    query, pooler = model.bert.encoder.layer[0].attention.self.query, model.bert.pooler.dense
    followed = {query.lora_A: 1, pooler.weight: 1, model.bert.encoder.layer[0].output.dense.lora_B: 0}
    old = {p: (p.detach().clone(), p.grad.clone(), optimizer.state[p]["exp_avg_sq"].clone()) for p in followed}
    kept = random_plan(model, hidden=True, seed=1).kept["hidden"]
    apply_prune_plan(model, of_hidden(kept), optimizer, keep_tail=True)
    for parameter, dim in followed.items():
        now = (parameter.detach(), parameter.grad, optimizer.state[parameter]["exp_avg_sq"])
        for ours, theirs in zip(now, old[parameter], strict=True):
            assert torch.equal(ours, theirs.index_select(dim, torch.tensor(kept)))
    assert pooler.weight.shape == (32, len(kept))
    optimizer.zero_grad()
    model(**tiny_batch("bert")).loss.backward()
    optimizer.step()


def test_an_optimizer_that_cannot_follow_is_refused_before_anything_is_cut() -> None:
    model = patched("bert")
    optimizer = torch.optim.Adafactor([p for p in model.parameters() if p.requires_grad])
    model(**tiny_batch("bert")).loss.backward()
    optimizer.step()
    with pytest.raises(ValueError, match="Adafactor"):
        apply_prune_plan(model, of_hidden(list(range(8))), optimizer)
    assert dimensions(model).num_units == 32


@pytest.mark.parametrize("keep_tail", [False, True], ids=["freed", "tail kept"])
@pytest.mark.parametrize("name", HIDDEN)
def test_unpatching_leaves_a_plain_model_that_answers_the_same(name: str, keep_tail: bool) -> None:
    model = patched(name)
    apply_prune_plan(model, random_plan(model, hidden=True, empty=free_heads(model)[-1:], seed=1), keep_tail=keep_tail)
    with torch.no_grad(), Unrounded():
        before = model(**tiny_batch(name)).logits
        size = apt.summary(model).params_after
        apt.unpatch_model(model, merge=True)
        close("logits", model(**tiny_batch(name)).logits, before)
    assert not any(type(module).__module__.startswith("apt.layers.hidden") for module in model.modules())
    hooks = [hook for m in model.modules() for hook in (*m._forward_hooks.values(), *m._forward_pre_hooks.values())]
    assert not any(type(hook).__module__ == "apt.layers.hidden" for hook in hooks)
    assert sum(p.numel() for p in model.parameters()) == size
    if model.get_output_embeddings() is not None and model.config.tie_word_embeddings:
        assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


@pytest.mark.parametrize(
    ("name", "settings", "words"),
    [
        ("deberta", {"norm_rel_ebd": "none"}, "with norm_rel_ebd='none' cannot be removed"),
        ("deberta", {"conv_kernel_size": 3}, "with conv_kernel_size=3 cannot be removed"),
        ("opt", {"_remove_final_layer_norm": True}, "with _remove_final_layer_norm=True cannot be removed"),
    ],
)
def test_a_model_whose_dimensions_cannot_go(name: str, settings: dict[str, Any], words: str) -> None:
    model = apt.patch_model(tiny_model(name, **settings), rank=3)
    assert apt.summary(model).hidden == 0
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    with pytest.raises(ValueError, match=words):
        apt.Controller(model, optimizer, 100, unit_types=("head", "hidden"))
    apt.Controller(model, optimizer, 100, unit_types=("head", "neuron"))


def test_a_module_that_no_table_names_is_not_taken_for_granted() -> None:
    model = tiny_model("llama")
    model.model.extra = nn.Linear(32, 4).double()
    apt.patch_model(model)
    with pytest.raises(ValueError, match=r"it is not known whether model\.extra reads them"):
        dimensions(model)
