"""What pruning must know of a Hugging Face family: where its parts are. A family is a table, never a copied forward."""

from dataclasses import dataclass

from torch import nn

ROLES = ("q", "k", "v", "o", "up", "gate", "down")


@dataclass(frozen=True, kw_only=True)
class Family:
    """Names of the parts of one layer, relative to the layer, and what differs between families.

    Args:
        model_types: values of ``config.model_type`` that have this shape.
        layers: the list of layers, relative to the base model.
        linears: role -> module name; roles are q, k, v, o, up, gate (where the FFN is gated) and down.
        attention: the module that is replaced when a layer loses all its heads; its forward returns a pair, the output
            and the attention weights.
        attention_holds_o: whether the output projection lies inside that module.
        default_targets: roles that get an adapter unless `target_modules` says otherwise.
        decoder: whether generation reads cache and mask lengths in the first layer of each attention type.
        per_head: attributes of the attention module that its forward reads and that shrink in step with its heads.
        needs: settings of the config, with the value without which heads cannot be removed exactly.
    """

    model_types: tuple[str, ...]
    layers: str
    linears: dict[str, str]
    attention: str
    attention_holds_o: bool
    default_targets: tuple[str, ...]
    decoder: bool
    per_head: tuple[str, ...] = ()
    needs: tuple[tuple[str, object], ...] = ()

    def set_heads(self, layer: nn.Module, before: int, after: int) -> None:
        """Bring the attention's own counts from `before` to `after` heads (KV groups)."""
        attention = layer.get_submodule(self.attention)
        for name in self.per_head:
            setattr(attention, name, getattr(attention, name) * after // before)

    def layer_list(self, model: nn.Module) -> nn.ModuleList:
        """The layers of a model with or without a task head."""
        layers = base_model(model).get_submodule(self.layers)
        assert isinstance(layers, nn.ModuleList)
        return layers

    def prefix(self, model: nn.Module) -> str:
        """Full name of the list of layers, as `named_modules` of the model gives it."""
        layers = self.layer_list(model)
        prefix: str = next(name for name, module in model.named_modules() if module is layers)
        return prefix


def base_model(model: nn.Module) -> nn.Module:
    """The model without its task head; the model itself where it has none."""
    return getattr(model, getattr(model, "base_model_prefix", "") or "", model)
