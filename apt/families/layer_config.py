"""A model's config as one layer sees it, where a forward reads from there what differs by layer after pruning."""

from typing import Any

from torch import nn


class LayerConfig:
    """Answers like the model's config, but for the values that are the layer's own.

    Every other name is looked up in the model's config when it is asked for, so what is changed there later (the
    attention implementation, say) reaches the layer. The config itself, which is saved, stays as it is.
    """

    def __init__(self, shared: Any) -> None:
        self._shared = shared

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "_shared":  # asked for by copy and pickle, before there is a config
            raise AttributeError(name)
        return getattr(self._shared, name)


def own_config(module: nn.Module) -> Any:
    """The module's `LayerConfig`, put in the place of the shared config on first use."""
    holder: Any = module
    if not isinstance(holder.config, LayerConfig):
        holder.config = LayerConfig(holder.config)
    return holder.config
