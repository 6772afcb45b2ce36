"""A kind of units is one file and one line of `UNIT_KINDS`: a made-up one is scored, chosen, cut, saved and loaded."""

from pathlib import Path

import pytest
import torch
from neuron_pairs import NEURON_PAIR
from tiny_models import tiny_batch, tiny_model

import apt
from apt.families import anatomy_of
from apt.pruning.kinds import UNIT_KINDS
from apt.pruning.units import find_units
from apt.records import PrunePlan
from apt.surgery.prune import apply_prune_plan

STEPS = 20


@pytest.fixture(autouse=True)
def with_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(UNIT_KINDS, NEURON_PAIR.name, NEURON_PAIR)


@pytest.mark.parametrize("name", ["bert", "llama", "gpt2", "t5"])
def test_masked_pairs_compute_what_cut_pairs_do(name: str) -> None:
    model = apt.patch_model(tiny_model(name), unit_types=("neuron_pair",)).eval()
    batch = tiny_batch(name)
    kept = {}
    for group in find_units(anatomy_of(model)):
        if group.kind == NEURON_PAIR.name:
            kept[group.name] = list(range(0, group.num_units, 2))
            mask = torch.zeros(group.num_units)
            mask[kept[group.name]] = 1.0
            group.mask.set_mask(mask)

    with torch.no_grad():
        masked = model(**batch).logits
        apply_prune_plan(model, PrunePlan(step=1, target_sparsity=0.5, kept=kept, round_to=1))
        cut = model(**batch).logits

    assert kept
    torch.testing.assert_close(cut, masked, rtol=1e-9, atol=1e-9)


def test_a_run_prunes_pairs_beside_heads_and_its_export_loads(tmp_path: Path) -> None:
    model = apt.patch_model(tiny_model("llama"), unit_types=("head", "neuron_pair"), verify_events=True).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    run = apt.Controller(model, optimizer, STEPS, target_sparsity=0.5, num_events=2, prune_end=0.8)
    batch = tiny_batch("llama")

    for _ in range(STEPS):
        run.loss(model(**batch), batch).backward()
        run.after_backward()
        optimizer.step()
        run.after_step()
        optimizer.zero_grad()

    assert [event.prune is not None for event in run.events] == [True, True]
    assert run.events[-1].sparsity >= 0.5
    neurons = apt.summary(model).neurons
    assert all(count % 2 == 0 for count in neurons)
    assert sum(neurons) < sum(apt.summary(apt.patch_model(tiny_model("llama"))).neurons)
    small = apt.load_model(apt.export_model(model, tmp_path / "small"))
    with torch.no_grad():
        torch.testing.assert_close(small(**batch).logits, model.eval()(**batch).logits, rtol=1e-5, atol=1e-5)


def test_two_kinds_of_one_part_are_refused_before_anything_changes() -> None:
    model = tiny_model("bert")
    before = str(model)

    with pytest.raises(ValueError, match="'neuron' and 'neuron_pair' are units of one part"):
        apt.patch_model(model, unit_types=("neuron", "neuron_pair"))

    assert str(model) == before
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_without_its_line_it_is_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(UNIT_KINDS, NEURON_PAIR.name)
    with pytest.raises(ValueError, match="unit_types must be some of"):
        apt.patch_model(tiny_model("bert"), unit_types=("neuron_pair",))
