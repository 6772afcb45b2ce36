"""What `patch_model` leaves on a model, for the controller, the export and `unpatch_model`."""

import copy
import sys
import weakref
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

import apt_kernels
from apt.apt_config import APTConfig
from apt.families import Found
from apt.families.own_method import OwnMethod
from apt.layers import unit_sums
from apt.layers.passes import ValidTokens, spread
from apt.records import Event

# Wrappers that spread a model over devices, by name: most are of modules that nobody else loads.
SPREADING = ("DataParallel", "DistributedDataParallel", "FullyShardedDataParallel", "DeepSpeedEngine")


@dataclass
class PatchState:
    """What `patch_model` leaves on the model: how it was built, and what `unpatch_model` and the export put back."""

    config: APTConfig
    found: Found | None  # where things are, which `anatomy_of` binds to the model; None where its family is not known
    requires_grad: dict[str, bool]  # of every parameter before the patch
    use_cache: bool | None  # of the model's config before the patch
    block_params: int  # of the original model, the denominator of sparsity; 0 without a family
    params_before: int  # of the whole original model
    valid: dict[str, ValidTokens] = field(default_factory=dict)  # by stack, where units may go
    init_seconds: float = 0.0  # that the adapters' start took, decompositions included
    dtypes: dict[str, torch.dtype] = field(default_factory=dict)  # of the task head before the patch, where widened
    hidden: bool = False  # whether the masks of hidden dimensions are in
    next_event: int | None = None  # step of the event that a controller of this model has still to carry out
    hooks: list[Any] = field(default_factory=list)
    past: list[Event] = field(default_factory=list)  # the events that were carried out on this model
    targets: list[str] = field(default_factory=list)  # full names of the linears that got an adapter
    adapter_params: int | None = None  # when tuning started, before any rank grew
    copies: list[Any] = field(default_factory=list)  # weak references to the states of copies of the model
    saver: OwnMethod | None = None  # by which the model was saved before the patch
    distilled: bool = False  # a checkpoint is being taken up from after the end of distillation: no Tr is put in again

    def __deepcopy__(self, memo: dict[int, Any]) -> "PatchState":
        """The state of a copied model; the model remembers that there is one."""
        twin = object.__new__(type(self))
        memo[id(self)] = twin
        for name, value in self.__getstate__().items():
            setattr(twin, name, copy.deepcopy(value, memo))
        self.copies.append(weakref.ref(twin))
        return twin

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "copies": []}

    @property
    def num_repaired(self) -> int:
        """Projections whose columns took over what went beside them."""
        notes = [event.prune.repair or {} for event in self.past if event.prune is not None]
        return len({name for note in notes for name, found in note.items() if found.changed})

    @property
    def built(self) -> dict[str, Any]:
        """What a checkpoint must have in common with the model that takes it up, as JSON."""
        return {"method": self.config.method, "rank": self.config.rank, "target_modules": self.targets}


def uncompiled(model: nn.Module) -> nn.Module:
    """The model itself, where ``torch.compile`` has wrapped it: parts are named and replaced there."""
    inner = getattr(model, "_orig_mod", None)
    return inner if isinstance(inner, nn.Module) else model


def bare_model(model: nn.Module) -> nn.Module:
    """The model that a patch goes into, out of what is around it: ``torch.compile``, sentence-transformers.

    Raises:
        ValueError: it is spread over devices, or a model of sentence-transformers holds no transformer.
    """
    model = uncompiled(model)
    if any(cls.__name__ in SPREADING for cls in type(model).__mro__):
        raise ValueError(spread(type(model).__name__))
    if not any(cls.__module__.startswith("sentence_transformers.") for cls in type(model).__mro__):
        return model
    from transformers import PreTrainedModel

    found = next((module for module in model.modules() if isinstance(module, PreTrainedModel)), None)
    if found is None:
        raise ValueError(f"this {type(model).__name__} holds no transformer; there is nothing to patch in it")
    return found


def keep_ops_whole() -> None:
    """Have ``torch.compile`` take each op that has a backward of its own as one call, which it does not look into.

    What it makes of such a backward when it looks into it stays in memory for good, with every graph around it (torch
    2.13: 5 MB for 36 linears), and each event compiles anew.
    """
    if "torch._dynamo" in sys.modules:
        for op in (*apt_kernels.WITH_BACKWARD, *unit_sums.WITH_BACKWARD):
            torch.compiler.allow_in_graph(op)


def forget_graphs() -> None:
    """Drop what ``torch.compile`` has compiled in this process, and with it the count towards its recompile limit."""
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()
        keep_ops_whole()


def patch_state(model: nn.Module) -> PatchState:
    """The state that `patch_model` left. Raises ValueError on a model that is not patched."""
    state = getattr(model, "_apt", None)
    if isinstance(state, PatchState):
        return state
    if isinstance(getattr(model, "peft_config", None), dict):
        raise ValueError(
            "this is a model of PEFT, of which apt.patch_model replaces the op under its LoRA layers and nothing else: "
            "train it with the trainer you have, and export it with merge_and_unload(); to prune it while it trains, "
            "give apt.patch_model(model.unload())"
        )
    raise ValueError("this model is not patched; call apt.patch_model(model) first")
