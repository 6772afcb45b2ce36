"""What a pass knows belongs to it: whoever calls whom, however often, also where layers are computed anew.

Statistics are compared with those of the model as it came, run without checkpointing, by hooks that know the real
tokens of each pass; and the counts with tokens counted by hand.
"""

import copy
import pickle
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from check import close
from own_loop import BRIEF, Loop, equal_bits, patched
from tiny_models import tiny_batch, tiny_model
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

import apt
from apt.families import anatomy_of
from apt.pruning.units import find_units

REAL = (9 + 8 + 7 + 6, 5 + 4 + 3 + 2)  # tokens of `tiny_batch` in four rows of 9, and of 5

Batch = dict[str, Tensor]
Run = Callable[[Any], Tensor]  # passes of a model, and the sum of their losses


def collecting(model: nn.Module, **settings: Any) -> Any:
    """A patched model that trains and collects statistics of every unit."""
    patched = apt.patch_model(model, rank=3, **settings).train()
    for group in find_units(anatomy_of(patched)):
        group.mask.collecting = True
    return patched


def without_labels(name: str, **sizes: int) -> Batch:
    return {key: value for key, value in tiny_batch(name, **sizes).items() if key != "labels"}


def sums_of(model: nn.Module, plain: nn.Module, run: Run, real: list[Tensor] | dict[str, list[Tensor]]) -> None:
    """Compare what a patched model collected with the sums over the real tokens of each pass of the plain one.

    Args:
        model: patched, after the same passes and their backward.
        plain: the model before the patch.
        run: the passes.
        real: the mask of each pass, or of each stack those of its passes.
    """
    plain.train()
    parts = anatomy_of(plain).parts
    seen: dict[str, list[Tensor]] = {part.name: [] for part in parts}

    def keep(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            if args[0].requires_grad:
                args[0].retain_grad()
                seen[name].append(args[0])

        return hook

    for part in parts:
        part.reader.register_forward_pre_hook(keep(part.name))  # type: ignore[union-attr]
    run(plain).backward()
    for group in find_units(anatomy_of(model)):
        masks = real[group.part.layer.stack.name] if isinstance(real, dict) else real
        wanted = torch.zeros_like(group.mask.sums)
        assert len(seen[group.name]) == len(masks) > 0
        for h, mask in zip(seen[group.name], masks, strict=True):
            rows = mask.reshape(-1, 1)
            wanted[0] += (h.detach().reshape(len(rows), -1).abs() * rows).sum(0)
            wanted[1] += (h.grad.reshape(len(rows), -1).abs() * rows).sum(0)  # type: ignore[union-attr]
        assert group.mask.count == sum(int(mask.sum()) for mask in masks)
        close(group.name, group.mask.sums, wanted)


def checked(name_or_model: str | nn.Module, run: Run, real: Any, count: int | None = None, **enable: Any) -> None:
    """Run passes on a patched model and on the same one unpatched, and compare; `enable` turns checkpointing on."""
    plain = tiny_model(name_or_model) if isinstance(name_or_model, str) else name_or_model
    model = collecting(copy.deepcopy(plain))
    if enable:
        model.gradient_checkpointing_enable(enable)
    run(model).backward()
    if count is not None:
        assert {int(group.mask.count) for group in find_units(anatomy_of(model))} == {count}
    sums_of(model, plain, run, real)


def bare(name: str) -> Any:
    """The base model alone, as sentence encoders use it."""
    model = tiny_model(name)
    return getattr(model, model.base_model_prefix)


@pytest.mark.parametrize("name", ["bert", "distilbert", "deberta", "llama_gqa", "gpt2", "opt"])
@pytest.mark.parametrize("call", [lambda model: model, lambda model: model.forward], ids=["called", "forward"])
def test_the_base_model_may_be_all_there_is(name: str, call: Any) -> None:
    """As in sentence-transformers, which calls `forward` of what `AutoModel` gives."""
    batch = without_labels(name)

    def run(model: Any) -> Tensor:
        return call(model)(**batch).last_hidden_state.square().sum()

    checked(bare(name), run, [batch["attention_mask"]], REAL[0])


@pytest.mark.parametrize("name", ["bert", "llama_gqa", "opt"])
def test_the_base_model_may_be_called_past_the_whole(name: str) -> None:
    """After a pass of the whole of the same shape, whose mask is another."""
    batch = without_labels(name)
    other = tiny_batch(name, seed=7)
    other["attention_mask"] = other["attention_mask"].flip(0)

    def run(model: Any) -> Tensor:
        inner = getattr(model, model.base_model_prefix)
        whole = model(**other).loss
        positional = inner(batch["input_ids"], batch["attention_mask"]).last_hidden_state
        return whole + positional.square().sum() + inner.forward(**batch).last_hidden_state.square().sum()

    checked(name, run, [other["attention_mask"], *[batch["attention_mask"]] * 2], 3 * REAL[0])


@pytest.mark.parametrize("reentrant", [None, False, True])
@pytest.mark.parametrize("lengths", [(9, 9), (9, 5)])
@pytest.mark.parametrize("name", ["bert", "llama_gqa", "t5"])
def test_several_passes_before_one_backward(name: str, lengths: tuple[int, int], reentrant: bool | None) -> None:
    """With a pass without gradients between and behind, and masks that differ: right padding and left."""
    first, second = (tiny_batch(name, length=length, seed=seed) for seed, length in enumerate(lengths))
    second["attention_mask"] = second["attention_mask"].flip(0)
    between = tiny_batch(name, size=2, length=7)

    def run(model: Any) -> Tensor:
        loss = model(**first).loss
        with torch.no_grad():
            model(**between)
        loss = loss + model.forward(**second).loss
        with torch.no_grad():
            model(**between)
        return loss

    real: Any = [batch["attention_mask"] for batch in (first, second)]
    if name == "t5":
        real = {"encoder": real, "decoder": [batch["labels"] != -100 for batch in (first, second)]}
    checked(name, prepared(run), real, **({} if reentrant is None else {"use_reentrant": reentrant}))


def prepared(run: Run) -> Run:
    """Reentrant checkpointing wants an input that asks for a gradient."""

    def with_inputs(model: Any) -> Tensor:
        model.enable_input_require_grads()
        return run(model)

    return with_inputs


def test_a_layer_that_the_user_checkpoints() -> None:
    """By `torch.utils.checkpoint`, which no function of transformers stands around: here that of FSDP's wrapper."""
    first, second = tiny_batch("bert"), tiny_batch("bert", length=5)
    plain = tiny_model("bert")

    def run(model: Any) -> Tensor:
        return model(**first).loss + model(**second).loss

    model = collecting(copy.deepcopy(plain))
    for layer in model.bert.encoder.layer:
        layer.forward = lambda *args, own=layer.forward, **kwargs: checkpoint(own, *args, use_reentrant=False, **kwargs)
    run(model).backward()
    sums_of(model, plain, run, [first["attention_mask"], second["attention_mask"]])


@pytest.mark.parametrize("name", ["t5", "mt5"])
def test_targets_that_were_taken_out_before_the_forward(name: str) -> None:
    """As for label smoothing and `compute_loss_func`: the decoder gets ids, made of labels it never sees."""
    plain = tiny_model(name, eos_token_id=1)
    batch = tiny_batch(name, seed=3)
    labels = batch.pop("labels")
    for row in labels:
        row[(row != -100).sum() - 1] = 1  # where the text ends
    ids = plain.prepare_decoder_input_ids_from_labels(labels=labels)

    def run(model: Any) -> Tensor:
        return model(**batch, decoder_input_ids=ids).logits.square().sum()

    real = labels != -100
    assert real.sum() == 4 * 7 - (1 + 2 + 0 + 1)
    checked(plain, run, {"encoder": [batch["attention_mask"]], "decoder": [real]})


def test_a_classifier_of_t5_counts_its_last_token() -> None:
    """Its decoder reads the text, shifted by one; the last token has no target and is the one that is classified."""
    import transformers

    config = tiny_model("t5", eos_token_id=1, num_labels=3).config
    torch.manual_seed(1)
    plain = transformers.T5ForSequenceClassification(config).double()
    batch = without_labels("t5")
    for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
        ids[mask.sum() - 1] = 1

    def run(model: Any) -> Tensor:
        return model(**batch).logits.square().sum()

    shifted = torch.nn.functional.pad(batch["attention_mask"][:, :-1], (1, 0), value=1)
    checked(plain, run, {"encoder": [batch["attention_mask"]], "decoder": [shifted]})


@pytest.mark.parametrize("kind", ["boolean", "additive", "lowest"])
def test_masks_of_pairs_of_tokens(kind: str) -> None:
    batch = without_labels("llama_gqa")
    padding = batch["attention_mask"].bool()
    seen = torch.ones(9, 9).tril().bool() & padding[:, None, None, :]
    lowest = {"additive": -1e4, "lowest": torch.finfo(torch.float64).min}
    mask = seen if kind == "boolean" else torch.zeros(seen.shape, dtype=torch.float64).masked_fill(~seen, lowest[kind])

    def run(model: Any) -> Tensor:
        hidden = model.model(batch["input_ids"], attention_mask=mask, position_ids=torch.arange(9)[None])
        return hidden.last_hidden_state[padding].square().sum()

    checked("llama_gqa", run, [batch["attention_mask"]], REAL[0])


def test_a_mask_that_covers_a_cache_too() -> None:
    batch = without_labels("llama_gqa")
    mask = batch["attention_mask"].flip(1)  # padding on the left, as in generation
    cached = slice(None), slice(0, 4)
    new = slice(None), slice(4, None)

    def run(model: Any) -> Tensor:
        with torch.no_grad():
            cache = model(batch["input_ids"][cached], attention_mask=mask[cached], use_cache=True).past_key_values
        return model(batch["input_ids"][new], attention_mask=mask, past_key_values=cache).logits.square().sum()

    checked("llama_gqa", run, [mask[new]], 4 * 5)


def test_a_failed_pass_leaves_nothing_behind() -> None:
    model = collecting(tiny_model("bert"))
    batch = tiny_batch("bert")
    with pytest.raises(IndexError):
        model(**{**batch, "input_ids": batch["input_ids"] + 1000})
    passes = model._apt.valid["layers"].passes
    assert passes.current is None
    assert passes.here.labels is None
    assert not model.apt_around._here.inside
    model(**batch).loss.backward()
    assert {int(group.mask.count) for group in find_units(anatomy_of(model))} == {REAL[0]}


def test_unpatched_every_module_has_its_own_class_and_checkpointing() -> None:
    plain = tiny_model("bert")
    kinds = {name: type(module) for name, module in plain.named_modules()}
    plain.gradient_checkpointing_enable()
    function = plain.bert.encoder.layer[0]._gradient_checkpointing_func
    model = collecting(plain)
    model(**tiny_batch("bert")).loss.backward()
    assert type(model).__name__ == "BertForSequenceClassification"
    assert str(type(model)) == str(kinds[""])  # by which transformers knows what a model can record
    apt.unpatch_model(model)
    assert {name: type(module) for name, module in model.named_modules()} == kinds
    assert model.bert.encoder.layer[0]._gradient_checkpointing_func is function
    assert "apt_around" not in vars(model)


def at_once(work: Callable[[Any], Any], items: list[Any]) -> list[Any]:
    """What a function makes of each item, in as many threads, which take turns as often as the interpreter can."""
    start = threading.Barrier(len(items))

    def begin(item: Any) -> Any:
        start.wait()
        return work(item)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(len(items)) as pool:
            return list(pool.map(begin, items))
    finally:
        sys.setswitchinterval(interval)


def trained_with(method: str, kind: str) -> Any:
    """A model of a method whose answers depend on what it holds."""
    settings = {"rank": 3, "target_modules": ["q", "k", "v"]} if method in ("lora", "dynacsg") else {}
    torch.manual_seed(5)
    model = apt.patch_model(tiny_model(kind), method=method, **settings)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(0.0, 0.5)
    return model


@pytest.mark.parametrize(
    ("method", "kind"),
    [
        ("lora", "llama_gqa"),
        ("dynacsg", "bert"),
        ("dynacsg", "llama_gqa"),
        ("dynacsg", "t5"),
        ("p_tuning", "llama_gqa"),
        ("prefix_tuning", "llama_gqa"),
        ("prefix_tuning", "t5"),
    ],
)
def test_threads_get_the_answers_that_each_gets_alone(method: str, kind: str) -> None:
    """Four threads with a batch each, of other sizes and lengths, on one model."""
    model = trained_with(method, kind)
    batches = [tiny_batch(kind, size=size, length=length) for size, length in ((4, 9), (2, 9), (4, 6), (3, 8))]

    @torch.no_grad()
    def answer(batch: Batch) -> Tensor:
        return model(**batch).logits

    alone = [answer(batch) for batch in batches]
    found = at_once(lambda batch: [answer(batch) for _ in range(12)], batches)
    for wanted, answers in zip(alone, found, strict=True):
        assert all(torch.equal(given, wanted) for given in answers)


def test_threads_that_train_collect_their_own_tokens() -> None:
    """One stands still in the middle of its pass while another runs a whole one, with another mask."""
    model = collecting(tiny_model("bert"))
    first, second = tiny_batch("bert"), tiny_batch("bert", seed=5)
    second["attention_mask"] = torch.ones_like(second["attention_mask"])
    passed = threading.Event()

    def stand_still(*_: Any) -> None:
        if threading.current_thread().name == "slow":
            assert passed.wait(30)

    handle = model.bert.encoder.layer[0].register_forward_hook(stand_still)
    losses: list[Tensor] = []
    slow = threading.Thread(target=lambda: losses.append(model(**first).loss), name="slow")
    slow.start()
    loss = model(**second).loss
    passed.set()
    slow.join()
    handle.remove()
    loss.backward()
    assert {int(group.mask.count) for group in find_units(anatomy_of(model))} == {4 * 9}
    losses[0].backward()
    assert {int(group.mask.count) for group in find_units(anatomy_of(model))} == {4 * 9 + REAL[0]}


@pytest.mark.parametrize("reentrant", [None, False, True])
@pytest.mark.parametrize("kind", ["bert", "t5"])
def test_gates_of_the_example_are_those_of_its_pass(kind: str, reentrant: bool | None) -> None:
    """Two passes of as many examples before one backward: gradients as of one pass after the other."""
    batches = [tiny_batch(kind, seed=seed) for seed in (2, 5)]

    def gradients(model: Any, together: bool) -> dict[str, Tensor]:
        model = copy.deepcopy(model).train()
        model.enable_input_require_grads()
        if reentrant is not None and together:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        torch.manual_seed(8)
        losses = [model(**batches[0]).loss]
        if not together:
            losses[0].backward()
        losses.append(model(**batches[1]).loss)
        (sum(losses) if together else losses[1]).backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    model = trained_with("dynacsg", kind)
    wanted, found = gradients(model, False), gradients(model, True)
    assert wanted.keys() == found.keys()
    for name, gradient in wanted.items():
        close(name, found[name], gradient)


@pytest.mark.parametrize("kind", ["llama_gqa", "gpt2"])
def test_a_cache_goes_on_with_the_gates_of_its_own_beginning(kind: str) -> None:
    """Two texts in turns, each with its cache."""
    model = trained_with("dynacsg", kind)
    ids = [tiny_batch(kind, size=3, seed=seed)["input_ids"] for seed in (2, 5)]

    def run(turns: list[int]) -> list[Tensor]:
        caches: list[Any] = [None, None]
        given = [0, 0]
        found: list[list[Tensor]] = [[], []]
        for text in turns:
            length = 4 if caches[text] is None else 1
            new = ids[text][:, given[text] : given[text] + length]
            with torch.no_grad():
                output = model(new, past_key_values=caches[text], use_cache=True)
            caches[text] = output.past_key_values
            given[text] += length
            found[text].append(output.logits)
        return [torch.cat(logits, 1) for logits in found if logits]

    alone = [*run([0, 0, 0]), *run([1, 1, 1])]
    for mine, wanted in zip(run([0, 1, 0, 1, 0, 1]), alone, strict=True):
        assert torch.equal(mine, wanted)


@pytest.mark.parametrize("method", ["p_tuning", "prefix_tuning"])
@pytest.mark.parametrize("kind", ["bert", "llama_gqa", "gpt2", "opt"])
def test_a_prompt_acts_whoever_calls(kind: str, method: str) -> None:
    """Where the base model is all there is, and its `forward` is called: as sentence-transformers does."""
    if method == "prefix_tuning" and kind == "bert":
        pytest.skip("an encoder takes no cache")
    model = apt.patch_model(bare(kind), method=method, num_virtual_tokens=3).train()
    batch = without_labels(kind)
    hidden = model.forward(**batch).last_hidden_state
    assert torch.equal(hidden, model(**batch).last_hidden_state)
    with torch.no_grad():
        inside = getattr(model, "decoder", model)  # of OPT, which embeds the tokens there
        assert torch.equal(hidden, inside.forward(**batch).last_hidden_state)
    hidden[batch["attention_mask"].bool()].square().sum().backward()
    assert all(parameter.grad.abs().max() > 0 for parameter in model.apt_prompt.parameters())


def test_a_model_of_a_teacher_can_be_copied_and_pickled() -> None:
    """Model, optimizer and controller in the middle of a run go on alike; a copied model alone catches nothing."""
    settings = {"use_self_distillation": True, "num_teacher_layers": 2, "target_sparsity": 0.6, **BRIEF}
    loop = Loop("bert", patched("bert"), 30, **settings).take(12)
    assert loop.run.distillation.distiller.has_teacher
    twin = copy.deepcopy(loop)
    again = pickle.loads(pickle.dumps(loop.model))
    for one in (loop, twin):
        torch.manual_seed(4)
        one.take(6)
    assert equal_bits(twin.model, loop.model)
    assert len(twin.run.events) == len(loop.run.events) > 0
    assert type(again.bert.encoder.layer[0]).__name__ == "BertLayer"
    batch = tiny_batch("bert")
    before = copy.deepcopy(again.state_dict())
    again(**batch).loss.backward()
    assert all(torch.equal(tensor, before[key]) for key, tensor in again.state_dict().items())


@pytest.mark.parametrize("settings", [{"method": "lora", "target_modules": ["q", "k", "v"]}, {}])
@pytest.mark.parametrize("kind", ["bert", "llama_gqa"])
def test_a_patched_model_can_be_exported_as_a_program(kind: str, settings: dict[str, Any]) -> None:
    model = apt.patch_model(tiny_model(kind, torch.float32), rank=3, **settings)
    batch = without_labels(kind)
    more = {"use_cache": False} if kind == "llama_gqa" else {}
    with torch.no_grad():
        wanted = model(**batch, **more).logits
        program = torch.export.export(model, (), {**batch, **more})
        close("program", program.module()(**batch, **more).logits, wanted)
        close("afterwards", model(**batch, **more).logits, wanted)


def test_a_replica_computes_with_its_own_weights() -> None:
    """`DataParallel` gives each device modules whose weights are copies, one thread each."""
    model = trained_with("lora", "bert")
    attention = model.bert.encoder.layer[0].attention.self
    x = torch.randn(2, 5, 32, dtype=torch.float64)
    for name in ("query", "key", "value"):
        member = getattr(attention, name)
        replica = member._replicate_for_data_parallel()
        replica.weight = member.weight.detach().clone() * 2.0
        replica.bias, replica.lora_A, replica.lora_B = (
            tensor.detach().clone() for tensor in (member.bias, member.lora_A, member.lora_B)
        )
        close(name, replica(x) - member(x), x @ member.weight.T)


def replica_of(model: nn.Module) -> Any:
    """What `DataParallel` calls on another device: every module copied, its tensors of no use to the first."""
    copies = {module: module._replicate_for_data_parallel() for module in model.modules()}
    for module, twin in copies.items():
        for name, child in module.named_children():
            twin._modules[name] = copies[child]
        for name, tensor in {**module._parameters, **module._buffers}.items():
            setattr(twin, name, None if tensor is None else tensor.clone())
    return copies[model]


@pytest.mark.parametrize("settings", [{}, {"method": "dynacsg"}, {"method": "lora", "prune": True}])
@pytest.mark.parametrize("name", ["bert", "llama_gqa", "t5"])
def test_a_replica_whose_statistics_would_be_lost_is_refused(name: str, settings: dict[str, Any]) -> None:
    model = apt.patch_model(tiny_model(name), **settings)
    replica = replica_of(model)
    for call in (replica, getattr(replica, "model", replica).forward):
        with pytest.raises(ValueError, match=r"this model is in DataParallel; .*: give model\.module, unwrapped"):
            call(**tiny_batch(name))
    model(**tiny_batch(name))


def test_a_replica_that_prunes_nothing_answers() -> None:
    model = apt.patch_model(tiny_model("llama_gqa"), method="lora")
    batch = tiny_batch("llama_gqa")
    close("loss", replica_of(model)(**batch).loss, model(**batch).loss)


@pytest.mark.parametrize("by_layer", [False, True])
def test_compiled_passes_know_their_tokens(by_layer: bool) -> None:
    """Of the whole model, in one graph, and of layers alone, which read what the pass around them knows."""
    torch._dynamo.reset()
    plain = tiny_model("llama_gqa", num_hidden_layers=2)
    model, counter = collecting(copy.deepcopy(plain)), CompileCounterWithBackend("eager")
    layers = anatomy_of(model).layers
    if by_layer:
        for layer in layers:
            layer.module.compile(backend=counter)
    compiled = model if by_layer else torch.compile(model, backend=counter)
    batches = [tiny_batch("llama_gqa", seed=seed) for seed in (2, 5)]
    batches[1]["attention_mask"] = batches[1]["attention_mask"].flip(0)

    def run(model: Any) -> Tensor:
        return torch.stack([model(**batch).loss for batch in batches]).sum()

    real = [batch["attention_mask"] for batch in batches]
    run(compiled).backward()
    assert counter.frame_count == (len(layers) if by_layer else 1)
    torch._dynamo.reset()
    sums_of(model, plain, run, real)
