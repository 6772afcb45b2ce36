"""The weights of a patched model under their stock names, adapters merged."""

import torch
from torch import Tensor, nn

from apt.export.row_gate_files import has_row_gates
from apt.families import known_anatomy
from apt.layers import TRANSFORM
from apt.layers.fused import FusedLinears, plain_linear, replaced
from apt.methods import ROW_GATES
from apt.methods.prompts import PROMPT, placed_prompt
from apt.process.progress import progress
from apt.pruning.dimensions import hidden_group
from apt.surgery import patch_state
from apt.surgery.tails import live_views


def merged_state(model: nn.Module) -> dict[str, Tensor]:
    """Stock names to tensors of their dtypes before the patch: adapters merged, views cloned.

    A tied tensor stands under each of its names, the same object, unless an adapter of one of them ended the tie.
    """
    ours = dict(replaced(model))
    done = set()
    dtypes = patch_state(model).dtypes
    merge = not has_row_gates(model)
    group = hidden_group(known_anatomy(model))
    live = {id(stored): view for stored, view in live_views(model, group)}
    state: dict[str, Tensor] = {}
    parameters = dict(model.named_parameters(remove_duplicate=False))
    seen: dict[int, str] = {}
    for name, tensor in progress(model.state_dict().items(), "export", "tensor"):
        parent, _, leaf = name.rpartition(".")
        if parent == TRANSFORM or name.startswith((f"{ROW_GATES}.", f"{PROMPT}.")):
            continue  # it served training alone, has its own file, or comes below
        place = parent  # a part of a fused projection lies deeper, and so does what an adapter is made from
        while place and place not in ours:
            place = place.rpartition(".")[0]
        linear = ours.get(place)
        if isinstance(linear, FusedLinears):
            if place not in done:
                done.add(place)
                plain = plain_linear(linear, merge=merge).state_dict()
                state.update({f"{place}.{part}": _copy(value) for part, value in plain.items()})
            continue
        if linear is not None and (place != parent or leaf not in ("weight", "bias")):
            continue
        if linear is None or not linear.rank:  # what has an adapter is tied no more
            first = seen.setdefault(tensor.data_ptr(), name) if tensor.numel() else name
            if first != name:
                state[name] = state[first]
                continue
        if linear is not None and leaf == "weight":
            tensor = plain_linear(linear, merge=merge).get_parameter("weight")
        elif name in parameters:
            tensor = live.get(id(parameters[name]), tensor)
        state[name] = _copy(tensor.to(dtypes.get(name, tensor.dtype)))
    prompt = placed_prompt(model)
    if prompt is not None:
        state.update({f"{PROMPT}.{name}": _copy(tensor) for name, tensor in prompt.plain().state_dict().items()})
    return state


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
