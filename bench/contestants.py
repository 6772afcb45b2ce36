"""Ways to fine-tune one model, ready to take a step: what the training benchmarks compare."""

import copy
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

import apt
from apt.families import anatomy_of
from apt.pruning import PruningConfig, UnitSearch
from apt.pruning.units import block_params, find_units
from apt.surgery.prune import apply_prune_plan

RANK, SCALE, LEARNING_RATE = 8, 2.0, 1e-4
NEVER = 10_000_000  # steps of a run whose first event is not reached


@dataclass
class Contestant:
    """A model in training and its step."""

    model: nn.Module
    step: Callable[[], None]
    compiled: bool = False  # by torch.compile, which hides its products from who counts them
    backend: str = ""  # that every op of ours is forced onto; empty: what selection picks


def full(model: nn.Module, batch: Mapping[str, Tensor], targets: tuple[str, ...]) -> Contestant:
    """Every parameter trains."""
    return _plain(model.requires_grad_(True), batch)


def frozen(model: nn.Module, batch: Mapping[str, Tensor], targets: tuple[str, ...]) -> Contestant:
    """The limit of any adapter: forward, and the gradient of the input alone, through frozen weights.

    Adapters of the first layer need no gradient of its input, so of a model with one layer they can be faster."""
    model = model.requires_grad_(False).train()
    tokens: Any = model.get_input_embeddings()  # type: ignore[operator]
    for module in model.modules():  # an encoder and its decoder have each their own, with the same weight
        if isinstance(module, nn.Embedding) and module.weight is tokens.weight:
            module.register_forward_hook(lambda module, args, output: output.requires_grad_())
    return Contestant(model, lambda: model(**batch).loss.backward())


def peft_lora(model: nn.Module, batch: Mapping[str, Tensor], targets: tuple[str, ...]) -> Contestant:
    """PEFT's LoRA at its defaults, on the same modules: adapters in float32, so a 16-bit base runs under autocast."""
    return _plain(peft_model(model, targets), batch, autocast=True)


def peft_lora_compiled(model: nn.Module, batch: Mapping[str, Tensor], targets: tuple[str, ...]) -> Contestant:
    """PEFT's LoRA under `torch.compile`."""
    whole = peft_model(model, targets)
    return replace(_plain(whole, batch, call=torch.compile(whole), autocast=True), compiled=True)


def peft_lora_low(model: nn.Module, batch: Mapping[str, Tensor], targets: tuple[str, ...]) -> Contestant:
    """PEFT's LoRA with adapters in the dtype of the base (``autocast_adapter_dtype=False``)."""
    return _plain(peft_model(model, targets, autocast_adapter_dtype=False), batch)


def peft_lora_patched(model: nn.Module, batch: Mapping[str, Tensor], targets: tuple[str, ...]) -> Contestant:
    """PEFT's LoRA by PEFT's own model, its linears on the fused op: `apt.patch_model(peft_model)`."""
    return _plain(apt.patch_model(peft_model(model, targets)), batch, autocast=True)


def lora(model: nn.Module, batch: Mapping[str, Tensor], targets: tuple[str, ...]) -> Contestant:
    """`apt.patch_model(method="lora")`."""
    return _plain(
        apt.patch_model(model, method="lora", rank=RANK, scale=SCALE, target_modules=linear_names(model, targets)),
        batch,
    )


def pruned(sparsity: float, *, salience: bool = False) -> Callable[..., Contestant]:
    """APT after an event that brought it to a sparsity, by random scores; with statistics towards the next, or not."""

    def build(model: nn.Module, batch: Mapping[str, Tensor], targets: tuple[str, ...]) -> Contestant:
        apt.patch_model(model, rank=RANK, scale=SCALE, target_modules=targets)
        if sparsity:
            prune(model, sparsity)
        if not salience:
            return _plain(model, batch)
        optimizer = _optimizer(model.train())
        run = apt.Controller(model, optimizer, NEVER, num_events=1, prune_start=0, target_sparsity=0.9)
        return Contestant(model, controlled_step(run, model, batch, optimizer))

    return build


def distilled(sparsity: float) -> Callable[..., Contestant]:
    """APT after its event, taught by the dense model it was: its memory holds that of the steps up to the event."""

    def build(model: nn.Module, batch: Mapping[str, Tensor], targets: tuple[str, ...]) -> Contestant:
        apt.patch_model(model, rank=RANK, scale=SCALE, target_modules=targets)
        optimizer = _optimizer(model.train())
        run = apt.Controller(model, optimizer, NEVER, target_sparsity=sparsity, **TAUGHT)
        step = controlled_step(run, model, batch, optimizer)
        while not run.events:
            step()
        return Contestant(model, step)

    return build


def controlled_step(
    run: apt.Controller, model: nn.Module, batch: Mapping[str, Tensor], optimizer: torch.optim.Optimizer
) -> Callable[[], None]:
    """One optimizer step of a run."""

    def step() -> None:
        run.loss(model(**batch), batch).backward()
        run.after_backward()
        optimizer.step()
        run.after_step()
        optimizer.zero_grad()

    return step


# One event after the second step, and a teacher from then on.
TAUGHT: dict[str, Any] = {"use_self_distillation": True, "distill_end": NEVER - 1, "adaptive_rank_update": False}
TAUGHT |= {"num_events": 1, "prune_start": 0, "prune_end": 2, "decay": 0, "settle": 0}

CONTESTANTS: dict[str, Callable[..., Contestant]] = {
    "full": full,
    "peft lora": peft_lora,
    "peft lora, base dtype": peft_lora_low,
    "peft lora, compiled": peft_lora_compiled,
    "peft lora, patched": peft_lora_patched,
    "apt lora": lora,
    "apt 0%": pruned(0.0),
    "apt 0%, statistics": pruned(0.0, salience=True),
    **{f"apt {sparsity:.0%}": pruned(sparsity) for sparsity in (0.3, 0.6, 0.8)},
    **{f"apt {sparsity:.0%}, statistics": pruned(sparsity, salience=True) for sparsity in (0.3, 0.6, 0.8)},
    **{f"apt {sparsity:.0%}, teacher": distilled(sparsity) for sparsity in (0.3, 0.6, 0.8)},
}


def prune(model: nn.Module, sparsity: float) -> None:
    """Bring a patched model to a sparsity, by random scores, at multiples of 8 neurons."""
    state = model._apt
    groups = find_units(anatomy_of(model))
    draw = torch.Generator().manual_seed(0)
    scores = {group.name: torch.rand(group.num_units, generator=draw) for group in groups}
    live = block_params(anatomy_of(model))
    settings = PruningConfig(target_sparsity=sparsity, layout=state.config.pruning.layout)  # type: ignore[union-attr]
    plan = UnitSearch(live, settings).plan(groups, scores, live, 1, sparsity)
    apply_prune_plan(model, plan)


def peft_model(model: nn.Module, targets: tuple[str, ...], **settings: Any) -> Any:
    from peft import LoraConfig, get_peft_model

    ends = ("pooler", "classifier", "score")
    saved = [end for end in ends if any(name.endswith(end) for name, _ in model.named_modules())]
    config = LoraConfig(
        r=RANK, lora_alpha=RANK * SCALE, target_modules=linear_names(model, targets), modules_to_save=saved or None
    )
    return get_peft_model(model, config, **settings)


def linear_names(model: nn.Module, targets: tuple[str, ...] | None) -> list[str]:
    """Full names of the linears that get an adapter, for PEFT, which knows no roles."""
    meta: dict[int, Any] = {id(p): nn.Parameter(p.to("meta"), p.requires_grad) for p in model.parameters()}
    meta |= {id(buffer): buffer.to("meta") for buffer in model.buffers()}
    twin = copy.deepcopy(model, meta)  # no numbers, which would count as memory of whoever asks
    return list(apt.summary(apt.patch_model(twin, method="lora", target_modules=targets)).ranks)


def _plain(
    model: nn.Module,
    batch: Mapping[str, Tensor],
    call: Callable[..., Any] | None = None,
    *,
    autocast: bool = False,
) -> Contestant:
    """A model and its step; with `autocast`, a base of 16 bits computes under it, as the Trainer has it do."""
    optimizer = _optimizer(model.train())
    forward = model if call is None else call
    device, dtype = _base_of(model)
    inside = torch.autocast(device, dtype) if autocast and dtype != torch.float32 else nullcontext()

    def step() -> None:
        with inside:
            loss = forward(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return Contestant(model, step)


def _base_of(model: nn.Module) -> tuple[str, torch.dtype]:
    """Where most of the model is, and in what: adapters may be wider."""
    largest = max(model.parameters(), key=lambda parameter: parameter.numel())
    return largest.device.type, largest.dtype


def _optimizer(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=LEARNING_RATE)
