"""Adapters to and from PEFT's LoRA folders: what PEFT, vLLM and llama.cpp read, and where a run can start."""

import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from apt.export.peft_fields import more_than_lora
from apt.export.row_gate_files import has_row_gates
from apt.export.saved_whole import endings_in_peft, saved_whole
from apt.families.plain import is_linear_like
from apt.files.manifest import check_manifest
from apt.files.reading import UnreadableError, check_numbers, is_finite_number, read_json_table, read_tensors, shown
from apt.files.whole import find_whole, write_folder_aside
from apt.layers import APTAdapter, adapted, exchange
from apt.layers.fused import FusedLinears, replaced, scaled_factors
from apt.methods.prompts import placed_prompt
from apt.surgery import patch_state, summary

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."
RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # servers take an adapter of one of these ranks
FRACTIONS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)  # what an adapter may be stored in
# Of a pattern in a file of somebody: what makes a regular expression search for longer than anyone waits.
MOST_PATTERN = 300  # characters
MOST_REPEATS = 3  # of an unknown number of characters
REPEATED_GROUP = re.compile(r"(?<!\\)\)[*+{?]")
REPEAT = re.compile(r"(?<!\\)[*+{]")
TASKS = {
    "SequenceClassification": "SEQ_CLS",
    "TokenClassification": "TOKEN_CLS",
    "QuestionAnswering": "QUESTION_ANS",
    "CausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
    "ConditionalGeneration": "SEQ_2_SEQ_LM",
}


def save_adapter(model: nn.Module, folder: str | Path, *, compact: bool = False, overwrite: bool = False) -> Path:
    """Save the adapters of an unpruned model, its trained head and what else trains, as a PEFT LoRA folder.

    The scale is folded into B, so that the readers, which compute it in different ways, all come to 1. By default every
    adapter is padded with zeros to one rank that servers accept (``r = lora_alpha``); with `compact` each keeps its
    own, in ``rank_pattern`` and ``alpha_pattern``, which PEFT reads and llama.cpp and older vLLM do not. Embeddings,
    norms and other modules that you set to train are saved whole, as ``modules_to_save``.

    Args:
        model: patched by `apt.patch_model`.
        folder: written under a temporary name, then renamed.
        compact: keep every rank as it is.
        overwrite: replace a folder that exists.

    Returns:
        The folder.

    Raises:
        ValueError: units were pruned or are masked, the update depends on the example, there is no adapter, a
            parameter trains that such a folder has no place for, or the folder exists.
    """
    folder = Path(folder).expanduser()
    _refuse_more_than_lora(model)
    if not overwrite and (found := find_whole(folder)).exists():
        raise ValueError(f"save_adapter: {found} exists; give another folder or overwrite=True")
    adapters = _adapters_of(model)
    widest = max(len(a) for a, _ in adapters.values())
    rank = widest if compact else next((rank for rank in RANKS if rank >= widest), widest)
    tensors: dict[str, Tensor] = {}
    for name, (a, b) in adapters.items():
        padding = 0 if compact else rank - len(a)
        tensors[f"{PREFIX}{name}.lora_A.weight"] = nn.functional.pad(a, (0, 0, 0, padding))
        tensors[f"{PREFIX}{name}.lora_B.weight"] = nn.functional.pad(b, (0, padding))
    own_ranks = {name: len(a) for name, (a, _) in adapters.items() if compact and len(a) != rank}
    whole = saved_whole(model)
    for name, parts in whole.items():
        tensors |= {f"{PREFIX}{name}.{key}": value for key, value in parts.items()}
    config = _config_of(model, set(adapters), rank, own_ranks, list(whole))
    with write_folder_aside(folder, holds=CONFIG) as partial:
        save_file(tensors, partial / WEIGHTS, metadata={"format": "pt"})
        (partial / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return folder


def _refuse_more_than_lora(model: nn.Module) -> None:
    """Raise ValueError for a model that a LoRA file beside its base cannot describe."""
    counts = summary(model)
    if has_row_gates(model):
        raise ValueError(
            f"save_adapter: the update of method {patch_state(model).config.method!r} depends on the example, which a "
            f"LoRA file cannot say; use apt.export_model, which keeps its gates beside the weights"
        )
    if counts.masked or counts.sparsity > 0.0:
        raise ValueError(
            "save_adapter: a LoRA file cannot say that parts of the base are gone; use apt.export_model, which saves "
            "the small model whole"
        )


def _adapters_of(model: nn.Module) -> dict[str, tuple[Tensor, Tensor]]:
    """A and scaled B of every adapter in float32, by the full name of its linear.

    Raises:
        ValueError: there is none.
    """
    adapters = {}
    for name, module in replaced(model):
        a, b = scaled_factors(module)
        if len(a):
            adapters[name] = (a.detach().cpu().float(), b.detach().cpu().float())
    if not adapters:
        more = "; a prompt is no LoRA, apt.export_model keeps it" if placed_prompt(model) is not None else ""
        raise ValueError(f"save_adapter: the model has no adapter{more}")
    return adapters


def _config_of(
    model: nn.Module, names: set[str], rank: int, own_ranks: dict[str, int], whole: list[str]
) -> dict[str, Any]:
    """What PEFT must know beside the tensors.

    Args:
        model: whose adapters they are.
        names: linears with an adapter, in full.
        rank: of every adapter that `own_ranks` does not name; its alpha too, as the scale is folded into B.
        own_ranks: ranks of the others.
        whole: modules that are saved in full.
    """
    class_name = type(model).__name__
    return {
        "peft_type": "LORA",
        "task_type": next((task for ending, task in TASKS.items() if class_name.endswith(ending)), None),
        "base_model_name_or_path": getattr(getattr(model, "config", None), "_name_or_path", "") or None,
        "r": rank,
        "lora_alpha": rank,
        "rank_pattern": own_ranks,
        "alpha_pattern": own_ranks,
        "target_modules": _targets(model, names),
        "modules_to_save": endings_in_peft(model, whole) or None,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": all(module.conv1d for name, module in replaced(model) if name in names),
        "inference_mode": True,
    }


@torch.no_grad()
def load_adapter(model: nn.Module, folder: str | Path) -> None:
    """Start a patched model from a PEFT LoRA folder: its adapters and its head, whatever their ranks.

    Call it before the optimizer and the controller are made. Ranks that the file pads with zeros are left out.

    Args:
        model: patched with a method of plain A and B ("apt", "lora"), on the modules that the file adapts.
        folder: with ``adapter_config.json`` and ``adapter_model.safetensors``.

    Raises:
        ValueError: the folder holds no LoRA, one that is more than a LoRA (DoRA, biases), or one of another model.
    """
    folder = find_whole(Path(folder).expanduser())
    patch_state(model)
    config, tensors = _read(folder)
    place = f"load_adapter: {folder / WEIGHTS}"
    modules_of = dict(adapted(model))
    modules = {name: module for name, module in modules_of.items() if module.rank}
    if any(module.delta is not None for module in modules.values()):
        raise ValueError(
            f"load_adapter: the adapters of method {patch_state(model).config.method!r} are no plain A and B, so they "
            f"cannot start from a LoRA file; patch the model with method='lora' or 'apt'"
        )
    parameters = dict(model.named_parameters(remove_duplicate=False))
    found, heads = _sorted_by_place(folder, tensors)
    for name, factors in found.items():
        _check_factors(name, factors, place)
    for name, factors in found.items():
        factors["B"] = factors["B"] * _scale(config, name, factors["A"], folder)
    _split(model, found)
    missing = sorted(set(found) - set(modules))
    if missing:
        raise ValueError(
            f"load_adapter: {folder} adapts {missing[0]}, where the model has no adapter; patch it with "
            f"target_modules={sorted({name.rpartition('.')[2] for name in found})}"
        )
    for name, factors in found.items():
        want = (modules[name].n_out, modules[name].n_in)
        if (factors["B"].shape[0], factors["A"].shape[1]) != want:
            shapes = [list(factors[side].shape) for side in "AB"]
            raise ValueError(f"load_adapter: {name} maps {want[1]} to {want[0]} features, but {folder} has {shapes}")
    for name in heads:
        if getattr(modules_of.get(name.rpartition(".")[0]), "conv1d", False) and name.endswith(".weight"):
            heads[name] = heads[name].T  # which an adapted linear holds the other way round
    for name, tensor in heads.items():
        if name not in parameters or parameters[name].shape != tensor.shape:
            raise ValueError(f"load_adapter: {folder} holds {name} {list(tensor.shape)}, which the model does not have")
    _refuse_frozen(folder, config, parameters, heads, set(found))
    _refuse_half_a_tie(folder, config, parameters, heads)
    for name, factors in found.items():
        _set(modules[name], factors["A"], factors["B"] / modules[name].scale)
    for name, tensor in heads.items():
        parameters[name].copy_(tensor)


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The settings and the tensors of a LoRA folder; whatever is no plain LoRA of numbers is refused."""
    if not (folder / CONFIG).exists() or not (folder / WEIGHTS).exists():
        raise ValueError(f"load_adapter: {folder} holds no {CONFIG} and {WEIGHTS}")
    check_manifest(folder, "load_adapter")
    config = read_json_table(folder / CONFIG, "load_adapter")
    more = more_than_lora(config)
    if more is not None:
        raise ValueError(f"load_adapter: {folder} is more than a plain LoRA ({more}); merge it with PEFT first")
    tensors, _ = read_tensors(folder / WEIGHTS, "load_adapter")
    place = f"load_adapter: {folder / WEIGHTS}"
    if not tensors:
        raise UnreadableError(f"{place} holds no tensor; save the adapter again")
    whole = next((name for name, tensor in tensors.items() if tensor.dtype not in FRACTIONS), None)
    if whole is not None:
        raise UnreadableError(f"{place} is corrupt ({whole} holds {tensors[whole].dtype}); save the adapter again")
    check_numbers(tensors, place)
    return config, tensors


def _check_factors(name: str, factors: dict[str, Tensor], place: str) -> None:
    """Raise ValueError unless there are an A and a B, and of one rank."""
    if factors.keys() != {"A", "B"}:
        side = next(iter({"A", "B"} ^ factors.keys()))
        what = "lacks" if side in "AB" else "has"
        raise UnreadableError(f"{place} {what} lora_{side} of {name}; save the adapter again")
    a, b = factors["A"], factors["B"]
    if a.dim() != 2 or b.dim() != 2 or a.shape[0] != b.shape[1] or not len(a):
        told = f"A of {name} is {list(a.shape)}, and B {list(b.shape)}"
        raise UnreadableError(f"{place} is corrupt ({told}); save the adapter again")


def _refuse_frozen(
    folder: Path,
    config: dict[str, Any],
    parameters: dict[str, nn.Parameter],
    heads: dict[str, Tensor],
    adapted_there: set[str],
) -> None:
    """Raise ValueError for another value of a weight that is frozen, unless the folder says that it brings it whole.

    PEFT writes an adapted output layer whole too, and a tied weight under either name.
    """
    endings = tuple(f".{ending}" for ending in config.get("modules_to_save") or ())
    modules = {name: name.rpartition(".")[0] for name in parameters}
    whole = {id(parameters[name]) for name, module in modules.items() if f".{module}".endswith(endings)}
    for name, tensor in heads.items():
        parameter = parameters[name]
        brought = parameter.requires_grad or id(parameter) in whole or modules[name] in adapted_there
        if not brought and not torch.equal(parameter, tensor.to(parameter)):
            raise ValueError(f"load_adapter: {folder} holds {name}, which is frozen in the model; it stays as it is")


def _sorted_by_place(
    folder: Path, tensors: dict[str, Tensor]
) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    """A and B of every linear by its full name, and all other tensors by their full names in the plain model."""
    found: dict[str, dict[str, Tensor]] = {}
    others: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        name, _, factor = key.removeprefix(PREFIX).removesuffix(".weight").rpartition(".lora_")
        if name and factor not in ("A", "B"):
            raise ValueError(
                f"load_adapter: {folder} is more than a plain LoRA ({name}.lora_{factor}); merge it with PEFT first"
            )
        if name:
            found.setdefault(name, {})[factor] = tensor
        else:  # PEFT's own layers call what they adapt their base layer
            others[key.removeprefix(PREFIX).replace(".base_layer.", ".")] = tensor
    return found, others


def _refuse_half_a_tie(
    folder: Path, config: dict[str, Any], parameters: dict[str, nn.Parameter], heads: dict[str, Tensor]
) -> None:
    """Raise ValueError for a weight of its own under one name of a parameter that the model has under two.

    Args:
        folder: for the message.
        config: of the folder.
        parameters: of the model, under every name.
        heads: what the folder holds of them.
    """
    names: dict[int, list[str]] = {}
    for name, parameter in parameters.items():
        names.setdefault(id(parameter), []).append(name)
    for name, tensor in heads.items():
        for other in names[id(parameters[name])]:
            theirs = heads.get(other, tensor if config.get("ensure_weight_tying") else parameters[name])
            if not torch.equal(theirs.to(tensor), tensor):
                raise ValueError(
                    f"load_adapter: {folder} gives {name} a weight of its own, which is that of {other} in this model; "
                    f"untie the model first: a weight of its own for {other}"
                )


def _scale(config: dict[str, Any], name: str, a: Tensor, folder: Path) -> float:
    """PEFT's scaling of one module: alpha over its rank, or over the root of it."""
    patterns = config.get("alpha_pattern") or {}
    place = f"load_adapter: {folder / CONFIG}"
    if not isinstance(patterns, dict):
        raise UnreadableError(f"{place} is corrupt (alpha_pattern is {shown(patterns)})")
    matching = (value for key, value in patterns.items() if _matches(key, name, place))
    alpha = next(matching, config.get("lora_alpha"))
    if alpha is None or not is_finite_number(alpha):
        raise UnreadableError(f"{place} is corrupt (lora_alpha of {name} is {shown(alpha)}, no number)")
    rank = a.shape[0]
    return float(alpha / (rank**0.5 if config.get("use_rslora") else rank))


def _matches(pattern: str, name: str, place: str) -> bool:
    """Whether PEFT means a module by a pattern, which is a regular expression for the end of its name."""
    if len(pattern) > MOST_PATTERN or REPEATED_GROUP.search(pattern) or len(REPEAT.findall(pattern)) > MOST_REPEATS:
        raise UnreadableError(
            f"{place}: the pattern {shown(pattern)} could be searched for without end; write the names out"
        )
    try:
        return re.match(rf"^(.*\.)?({pattern})$", name) is not None
    except re.error as error:
        raise UnreadableError(f"{place}: the pattern {shown(pattern)} is no regular expression: {error}") from None


def _split(model: nn.Module, found: dict[str, dict[str, Tensor]]) -> None:
    """Give an adapter on a fused projection to its parts: to each its own rows of B, and the ranks they use."""
    for name, module in replaced(model):
        if not isinstance(module, FusedLinears) or name not in found:
            continue
        a, b = (found[name].pop(side) for side in "AB")
        if b.shape[0] != module.out_features:
            raise ValueError(f"load_adapter: {name} makes {module.out_features} features, but the adapter {b.shape[0]}")
        del found[name]
        for (role, part), rows in zip(module.named_children(), b.split(module.sizes), strict=True):
            used = (rows != 0).any(0)
            if used.any() or (isinstance(part, APTAdapter) and part.rank and not (b != 0).any()):
                keep = used if used.any() else ~used
                found[f"{name}.{role}"] = {"A": a[keep], "B": rows[:, keep]}


def _set(module: APTAdapter, a: Tensor, b: Tensor) -> None:
    """Give an adapter other factors; ranks that are zero on both sides could never learn and are left out."""
    assert module.lora_A is not None
    assert module.lora_B is not None
    live = (a != 0).any(1) | (b != 0).any(0)
    if live.any():
        exchange(module.lora_A, a[live].to(module.lora_A))
        exchange(module.lora_B, b[:, live].to(module.lora_B).contiguous())


def _targets(model: nn.Module, names: set[str]) -> list[str]:
    """The shortest endings that name these modules and no other linear layer."""
    linears = {name for name, _ in replaced(model)}
    linears |= {name for name, module in model.named_modules() if is_linear_like(module)}
    others = linears - names
    targets = set()
    for name in names:
        parts = name.split(".")
        endings = [".".join(parts[-count:]) for count in range(1, len(parts) + 1)]
        targets.add(
            next(ending for ending in endings if not any(f".{other}".endswith(f".{ending}") for other in others))
        )
    return sorted(targets)
