"""What trains beside the adapters, and so goes into a LoRA folder module by module: heads, embeddings, norms."""

from collections.abc import Collection, Iterator
from typing import Any

from torch import Tensor, nn

from apt.layers import TRANSFORM, adapted
from apt.layers.fused import plain_linear, replaced, scaled_factors
from apt.methods import ROW_GATES
from apt.methods.prompts import PROMPT, placed_prompt
from apt.surgery.task_head import task_head

OURS = (TRANSFORM, ROW_GATES, PROMPT)  # put beside the model, for training alone or with a file of their own


def saved_whole(model: nn.Module) -> dict[str, dict[str, Tensor]]:
    """Full name of every module that trains beside the adapters -> its tensors by their names in it, on the CPU.

    Those are the task head, whatever else the user set to train, and the embeddings of a vocabulary that is not the
    base's. A tied weight stands under each of its names.

    Raises:
        ValueError: a parameter trains that a LoRA folder has no place for.
    """
    if placed_prompt(model) is not None:
        raise ValueError("save_adapter: a LoRA file has no place for the prompt of this model; use apt.export_model")
    names = {id(module): name for name, module in model.named_modules()}
    found = [names[id(part)] for part in task_head(model) if any(True for _ in part.parameters())]
    for name in (*_owners(model), *_resized_embeddings(model, names)):
        if not any(name == place or name.startswith(f"{place}.") for place in found):
            found.append(name)
    return {name: _tensors(model, name) for name in found}


def _owners(model: nn.Module) -> Iterator[str]:
    """Full names of the modules whose own parameters train, but for those that methods put in."""
    ours = {id(p) for _, module in adapted(model) for p in module.adapter_parameters()}
    whole = dict(replaced(model))
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if not parameter.requires_grad or id(parameter) in ours or name.split(".")[0] in OURS:
            continue
        place = name.rpartition(".")[0]
        owner = model.get_submodule(place)
        linear = next((there for there in _above(place) if there in whole), place)  # a part of a split projection
        if any(len(scaled_factors(module)[0]) for at, module in whole.items() if f"{at}.".startswith(f"{linear}.")):
            raise ValueError(
                f"save_adapter: {name} trains, and {linear or 'the model'} has an adapter too; a LoRA folder can hold "
                f"one of them; use apt.export_model, or freeze {name}"
            )
        if linear not in whole and any(True for child in owner.children() for _ in child.parameters()):
            raise ValueError(
                f"save_adapter: {name} trains, and a LoRA folder holds whole modules without parts; use "
                f"apt.export_model, or freeze it"
            )
        yield linear


def _above(place: str) -> Iterator[str]:
    """A name, and those of the modules around it, the nearest first."""
    while place:
        yield place
        place = place.rpartition(".")[0]


def _resized_embeddings(model: Any, names: dict[int, str]) -> list[str]:
    """Embeddings and output layer where the vocabulary is not that of the base, as far as its config is at hand."""
    from transformers import AutoConfig

    base = getattr(getattr(model, "config", None), "_name_or_path", "")
    if not base:
        return []
    try:
        size = AutoConfig.from_pretrained(base, local_files_only=True).get_text_config().vocab_size
    except (AttributeError, OSError, ValueError):
        return []  # not on this machine, or it has no vocabulary
    if size == model.config.get_text_config().vocab_size:
        return []
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    return [names[id(module)] for module in ends if id(module) in names]


def _tensors(model: nn.Module, name: str) -> dict[str, Tensor]:
    """The numbers of a module under the names that the plain model has for them."""
    module: Any = model.get_submodule(name)
    if name in dict(replaced(model)):
        module = plain_linear(module, merge=False)
    # Of its own memory each, as safetensors wants it: weights may be tied.
    return {key: tensor.detach().cpu().clone().contiguous() for key, tensor in module.state_dict().items()}


def endings_in_peft(model: nn.Module, names: Collection[str]) -> list[str]:
    """The shortest endings by which PEFT's ``modules_to_save`` finds these modules and no other."""
    others = [name for name, _ in model.named_modules() if name and name not in names]
    found = set()
    for name in names:
        parts = name.split(".")
        endings = [".".join(parts[-count:]) for count in range(1, len(parts) + 1)]
        found.add(next((ending for ending in endings if not any(n.endswith(ending) for n in others)), name))
    return sorted(found)
