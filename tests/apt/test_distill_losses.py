"""The distillation loss against plain loops over hooks; which layers are compared; Tr; gradient checkpointing."""

import copy
from collections import Counter
from typing import Any

import pytest
import torch
from check import close
from test_teacher import patched, seen_by, train_a_little
from tiny_models import free_heads, random_plan, tiny_batch
from torch import Tensor
from torch.distributions import Categorical, kl_divergence

from apt.distillation import DistillationConfig, SelfDistiller, TeacherOutput
from apt.distillation.losses import prediction_loss
from apt.distillation.taps import matching_layers, sample_layers
from apt.layers import LayerTransform
from apt.surgery.prune import apply_prune_plan

TAU = 0.7


def rms(h: Tensor) -> Tensor:
    return h / (h.square().mean() + 1e-6).sqrt()


def mean_error(student: Tensor, teacher: Tensor, mask: Tensor, normalize: bool) -> Tensor:
    """Token by token, those of the padding mask alone."""
    errors = []
    for row, column in mask.nonzero().tolist():
        ours, theirs = student[row, column], teacher[row, column]
        if normalize:
            ours, theirs = rms(ours), rms(theirs)
        errors.append((ours - theirs).pow(2).mean())
    return torch.stack(errors).mean()


def kl(student: Tensor, teacher: Tensor) -> Tensor:
    divergence: Tensor = kl_divergence(Categorical(logits=teacher / TAU), Categorical(logits=student / TAU))
    return divergence * TAU**2


@pytest.mark.parametrize("mapping", ["nearest", "cofi"])
@pytest.mark.parametrize("name", ["bert", "llama_gqa", "llama_cls"])
def test_loss_and_gradients_against_plain_loops(name: str, mapping: str) -> None:
    """The student has moved, and its middle layer is empty; the teacher is the model it was."""
    model = patched(name, num_hidden_layers=4).train()
    batch = tiny_batch(name)
    if batch["labels"].dim() == 2:
        batch["labels"][:, :3] = -100
    start = copy.deepcopy(model)
    config = DistillationConfig(teacher_layer_mapping=mapping, tau=TAU, w_pred=0.3, w_layer=0.6, num_teacher_layers=3)
    distiller = SelfDistiller(model, config=config, seed=1)
    distiller.snapshot()
    train_a_little(model, name)
    apply_prune_plan(model, random_plan(model, empty=["layers.2.heads", "layers.1.neurons"], seed=1), keep_tail=True)
    distiller.follow()
    with torch.no_grad():
        distiller.transform.lora_B.normal_(0.0, 0.1)
    distiller.sampled = [0, 1, 3]
    distiller.follow()
    loss = distiller.compute_distill_loss(model(**batch), distiller.forward_teacher(batch), batch)
    trained = {key: p for key, p in model.named_parameters() if p.requires_grad}
    ours = torch.autograd.grad(loss, list(trained.values()))

    outputs: list[Any] = []
    layers = model.model.layers if name != "bert" else model.bert.encoder.layer
    hooks = [layer.register_forward_hook(lambda *a: outputs.append(a[2])) for layer in layers]
    student, hidden = model(**batch).logits, [o[0] if isinstance(o, tuple) else o for o in outputs]
    for hook in hooks:
        hook.remove()
    teacher, theirs = seen_by(start, batch)
    mask, normalize = batch["attention_mask"], name != "bert"
    a, b = distiller.transform.lora_A, distiller.transform.lora_B
    moved = [h + 2.0 * (h @ a.T) @ b.T for h in hidden]
    matches = {0: [0], 1: [0, 3], 3: [3]} if mapping == "nearest" else {i: [0, 3] for i in (0, 1, 3)}
    layer = torch.stack(
        [
            min((mean_error(moved[j], theirs[i], mask, normalize) for j in found), key=Tensor.item)
            for i, found in matches.items()
        ]
    ).sum()
    if name != "llama_gqa":
        prediction = kl(student, teacher).mean()
    else:
        rows = [(r, t) for r in range(4) for t in range(8) if batch["labels"][r, t + 1] != -100 and mask[r, t + 1]]
        prediction = torch.stack([kl(student[r, t], teacher[r, t]) for r, t in rows]).mean()
    plain = 0.3 * prediction + 0.6 * layer
    close("loss", loss.detach(), plain.detach())
    close("prediction", distiller.terms.prediction, prediction.detach())
    wanted = torch.autograd.grad(plain, list(trained.values()))
    for key, got, want in zip(trained, ours, wanted, strict=True):
        close(key, got, want)
        assert want.any() or "lora_A" not in key


def test_encoder_and_decoder_count_alike() -> None:
    """Each with its own padding and its own blocks of layers; predictions are not shifted."""
    model = patched("t5").train()
    batch, start = tiny_batch("t5"), copy.deepcopy(model)
    depth = len(model.encoder.block)
    distiller = SelfDistiller(model, config=DistillationConfig(num_teacher_layers=2, tau=TAU))
    distiller.snapshot()
    train_a_little(model, "t5")
    sampled = distiller.sampled
    assert [place >= depth for place in sampled] == [False, False, True, True]
    loss = distiller.compute_distill_loss(model(**batch), distiller.forward_teacher(batch), batch).detach()
    ours, theirs = seen_by(copy.deepcopy(model), batch), seen_by(start, batch)
    masks = [batch["attention_mask"], (batch["labels"] != -100).long()]
    tr = distiller.transform
    layer = sum(mean_error(tr(ours[1][i]), theirs[1][i], masks[i >= depth], True) for i in sampled) / 2
    counted = masks[1].bool()
    prediction = kl(ours[0][counted], theirs[0][counted]).mean()
    close("loss", loss, (0.1 * prediction + 0.9 * layer).detach())


def test_padding_is_ignored() -> None:
    """What stands in padding changes neither the loss nor a gradient, in hidden states and in predictions."""
    model = patched("llama_gqa").train()
    distiller = SelfDistiller(model)
    distiller.snapshot()
    train_a_little(model, "llama_gqa")
    results = []
    for noise in (0.0, 5.0):
        batch = tiny_batch("llama_gqa")
        output, teacher = model(**batch), distiller.forward_teacher(batch)
        padding = (batch["attention_mask"] == 0)[..., None] * noise
        for i in list(teacher.layers):
            teacher.layers[i] = teacher.layers[i] + padding
        output["logits"] = output.logits + padding * torch.arange(60)
        distiller.sampled = [0, 1, 2]
        loss = distiller.compute_distill_loss(output, teacher, batch)
        loss.backward()
        results.append((loss.detach(), distiller.transform.lora_B.grad.clone()))
        model.zero_grad()
    close("loss", results[1][0], results[0][0])
    close("gradient", results[1][1], results[0][1])


def fields(shape: tuple[int, ...], names: tuple[str, ...] = ("logits",), seed: int = 0) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=draw, dtype=torch.float64) for name in names}


def of(student: dict[str, Tensor], teacher: dict[str, Tensor], **settings: Any) -> Tensor:
    known: dict[str, Any] = {"labels": None, "valid": None, "loss_type": None, "problem_type": None, "tau": TAU}
    return prediction_loss(student, teacher, **{**known, **settings})


def test_predictions_of_every_kind() -> None:
    spans = ("start_logits", "end_logits")
    student, teacher = fields((2, 5), spans), fields((2, 5), spans, seed=1)
    valid = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    terms = [
        kl(student[name][row][valid[row] == 1], teacher[name][row][valid[row] == 1]) for name in spans for row in (0, 1)
    ]
    close("spans", of(student, teacher, valid=valid), torch.stack(terms).mean())

    student, teacher = fields((6, 1)), fields((6, 1), seed=1)
    squares = (student["logits"] - teacher["logits"]).pow(2).mean()
    close("regression", of(student, teacher), squares)
    close(
        "regression",
        of(fields((6, 2)), fields((6, 2)), problem_type="regression"),
        torch.zeros((), dtype=torch.float64),
    )

    student, teacher = fields((6, 3)), fields((6, 3), seed=1)
    chances = [torch.sigmoid(each["logits"] / TAU) for each in (teacher, student)]
    several = sum(p * (p / q).log() for p, q in (chances, [1 - chance for chance in chances])).mean() * TAU**2
    close("several labels", of(student, teacher, problem_type="multi_label_classification"), several)

    student, teacher = fields((2, 5, 7)), fields((2, 5, 7), seed=1)
    labels = torch.tensor([[-100, 3, 4, -100, -100], [1, 1, 1, 1, -100]])
    chosen = (labels != -100) & (valid == 1)
    close(
        "tokens",
        of(student, teacher, labels=labels, valid=valid, loss_type="ForMaskedLM"),
        kl(student["logits"][chosen], teacher["logits"][chosen]).mean(),
    )
    close("all tokens", of(student, teacher), kl(student["logits"], teacher["logits"]).mean())
    none = of(student, teacher, labels=torch.full((2, 5), -100))
    assert none == 0.0


@pytest.mark.parametrize("reentrant", [False, True], ids=["saved tensors", "reentrant"])
@pytest.mark.parametrize("name", ["bert", "llama_gqa", "t5"])
def test_gradient_checkpointing_changes_nothing(name: str, reentrant: bool) -> None:
    model = patched(name).train()
    start = copy.deepcopy(model)
    results = []
    for checkpointing in (False, True):
        student = copy.deepcopy(start)
        distiller = SelfDistiller(student, seed=2)
        distiller.snapshot()
        train_a_little(student, name)
        apply_prune_plan(student, random_plan(student, empty=free_heads(student)[-1:], seed=1), keep_tail=True)
        distiller.follow()
        with torch.no_grad():
            distiller.transform.lora_B.normal_(0.0, 0.1, generator=torch.Generator().manual_seed(1))
        if checkpointing:
            student.gradient_checkpointing_enable({"use_reentrant": reentrant})
            student.enable_input_require_grads()
        batch = tiny_batch(name)
        output = student(**batch)
        loss = distiller.compute_distill_loss(output, distiller.forward_teacher(batch), batch) + output.loss
        loss.backward()
        grads = {key: p.grad for key, p in student.named_parameters() if p.requires_grad}
        results.append((loss.detach(), grads))
    close("loss", results[1][0], results[0][0])
    assert results[1][1].keys() == results[0][1].keys()
    for key, wanted in results[0][1].items():
        close(key, results[1][1][key], wanted)
        assert wanted.any()


def test_transform_starts_as_the_identity_and_always_trains() -> None:
    model = patched("bert").train()
    distiller = SelfDistiller(model)
    assert dict(model.named_parameters())["apt_transform.lora_A"] is distiller.transform.lora_A
    h = torch.randn(2, 3, 32, dtype=torch.float64)
    assert torch.equal(distiller.transform(h), h)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
    for step in range(6):
        if step in (2, 4):
            apply_prune_plan(model, random_plan(model, seed=step), optimizer, keep_tail=True)
            distiller.follow()
        batch = tiny_batch("bert", seed=step)
        output = model(**batch)
        (distiller.compute_distill_loss(output, distiller.forward_teacher(batch), batch) + output.loss).backward()
        grad = distiller.transform.lora_B.grad
        assert grad is not None
        assert bool(grad.any()) == (step > 0)  # at first the student is its teacher
        optimizer.step()
        optimizer.zero_grad()
    assert distiller.transform.lora_B.abs().max() > 0
    assert not torch.equal(distiller.transform(h), h)


def test_its_start_leaves_the_random_state_alone() -> None:
    model = patched("bert")
    before = torch.get_rng_state()
    distiller = SelfDistiller(model, seed=3)
    distiller.draw()
    assert torch.equal(torch.get_rng_state(), before)
    twin = SelfDistiller(patched("bert"), seed=3)
    twin.draw()
    assert (twin.sampled, twin.transform.lora_A.tolist()) == (distiller.sampled, distiller.transform.lora_A.tolist())


@pytest.mark.parametrize(
    ("layers", "blocks", "expected"),
    [
        (12, 4, [range(3), range(3, 6), range(6, 9), range(9, 12)]),
        (6, 4, [{0}, {1, 2}, {3}, {4, 5}]),
        (3, 4, [{0}, {1}, {2}]),
    ],
)
def test_one_layer_of_each_block_is_drawn(layers: int, blocks: int, expected: list[Any]) -> None:
    draw = torch.Generator().manual_seed(0)
    drawn = [sample_layers(layers, blocks, draw) for _ in range(300)]
    for place, block in enumerate(expected):
        counts = Counter(sample[place] for sample in drawn)
        assert set(counts) == set(block)
        assert min(counts.values()) > 200 / len(block)


@pytest.mark.parametrize(
    ("layer", "alive", "nearest", "cofi"),
    [
        (2, [0, 1, 2, 3], [2], [0, 1, 2, 3]),
        (2, [0, 1, 3], [1, 3], [0, 1, 3]),
        (2, [0, 5], [0, 5], [0, 5]),
        (0, [3, 4], [3], [3, 4]),
        (5, [1, 3], [3], [1, 3]),
        (1, [], [1], [1]),
    ],
)
def test_who_learns_from_a_layer(layer: int, alive: list[int], nearest: list[int], cofi: list[int]) -> None:
    assert matching_layers(layer, alive, "nearest") == nearest
    assert matching_layers(layer, set(alive), "cofi") == cofi


def test_only_what_is_compared_is_kept_and_only_until_the_loss() -> None:
    model = patched("bert", num_hidden_layers=6).train()
    distiller = SelfDistiller(model, config=DistillationConfig(num_teacher_layers=2))
    batch = tiny_batch("bert")
    output = model(**batch)
    taps = distiller._taps
    assert set(taps.seen) == set(distiller.sampled)
    assert len(taps.seen) == 2
    teacher = distiller.forward_teacher(batch)
    assert set(taps.seen) == set(teacher.layers)
    assert all(taps.seen[i] is not teacher.layers[i] for i in teacher.layers)
    distiller.compute_distill_loss(output, teacher)
    assert taps.seen == {}
    with torch.no_grad():
        model(**batch)
    assert taps.seen == {}
    distiller.listen(False)
    model(**batch)
    assert taps.seen == {}


def test_mistakes_are_told() -> None:
    model = patched("bert").train()
    distiller = SelfDistiller(model)
    batch = tiny_batch("bert")
    teacher = distiller.forward_teacher(batch)
    with pytest.raises(ValueError, match="did not pass layer 0 since its last loss; call the model with gradients"):
        distiller.compute_distill_loss({"logits": torch.zeros(4, 3)}, teacher)
    with pytest.raises(ValueError, match="needs the predictions of the student, got Tensor; hand in what the model"):
        distiller.compute_distill_loss(torch.zeros(()), teacher)
    with pytest.raises(ValueError, match=r"teacher_layer_mapping must be one of \['nearest', 'cofi'\], got 'far'"):
        SelfDistiller(model, "far")


def test_an_emptied_layer_is_taught_by_the_nearer_of_its_neighbours() -> None:
    model = patched("bert").train()
    distiller = SelfDistiller(model)
    distiller.snapshot()
    apply_prune_plan(model, random_plan(model, empty=free_heads(model)[1:2], seed=1), keep_tail=True)
    distiller.sampled = [1]
    distiller.follow()
    batch = tiny_batch("bert")
    output = model(**batch)
    near, far = distiller._taps.seen[0], distiller._taps.seen[2]
    teacher = TeacherOutput(distiller.forward_teacher(batch).predictions, {1: near.detach() + 1e-3})
    grads = torch.autograd.grad(
        distiller.compute_distill_loss(output, teacher), [near, far, distiller.transform.lora_B], allow_unused=True
    )
    assert distiller.terms is not None
    assert distiller.terms.layer.item() == pytest.approx(1e-6)
    assert isinstance(distiller.transform, LayerTransform)
    assert grads[2].any()
