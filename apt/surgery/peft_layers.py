"""The fused op in the place of the forward of PEFT's LoRA layers. Parameters, names and every method stay PEFT's.

Imported only where a PEFT model is patched, so that PEFT is no dependency.
"""

import warnings
from collections import Counter
from typing import Any, cast

import torch
from peft.tuners.lora.layer import Linear, LoraLayer
from torch import Tensor, nn

import apt_kernels


class FusedLoraLinear(Linear):
    """PEFT's LoRA linear with one fused op for base and adapter; what the op cannot express runs PEFT's own forward.

    An instance of PEFT's class becomes one of this class (`fuse`) and back (`unfuse`) without any change of its state,
    so everything that looks at the layer finds PEFT's layer.
    """

    def _get_name(self) -> str:
        """As `repr` and PEFT's ``get_layer_status`` call it: PEFT's layer, which it is."""
        return Linear.__name__

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.disable_adapters or self.merged or args or kwargs:
            return super().forward(x, *args, **kwargs)
        names = [name for name in self.active_adapters if name in self.lora_A]
        if len(names) != 1 or _obstacle(self, names[0]) is not None:
            return super().forward(x)
        name = names[0]
        base = cast(nn.Linear, self.get_base_layer())
        lora_a, lora_b = cast(nn.Linear, self.lora_A[name]), cast(nn.Linear, self.lora_B[name])
        if not torch.is_autocast_enabled(x.device.type) and x.dtype != base.weight.dtype:
            return super().forward(x)
        return apt_kernels.masked_lora_linear(
            x,
            base.weight,
            lora_a.weight,
            lora_b.weight,
            scale=self.scaling[name],
            bias=base.bias,
        )


def is_peft(model: nn.Module) -> bool:
    """Whether a model holds LoRA layers of PEFT."""
    return any(isinstance(module, LoraLayer) for module in model.modules())


def fuse(model: nn.Module) -> None:
    """Give every LoRA linear of a PEFT model the fused forward, in place; says once what stays on PEFT's path.

    Raises:
        ValueError: the model is fused already, or none of its layers can be.
    """
    layers: list[Any] = [module for module in model.modules() if isinstance(module, LoraLayer)]
    if any(isinstance(module, FusedLoraLinear) for module in layers):
        raise ValueError("patch_model: this PEFT model is patched already; call apt.unpatch_model(model) first")
    left: Counter[str] = Counter()
    for layer in layers:
        reason = _reason(layer)
        if type(layer) is Linear and not reason.permanent:
            layer.__class__ = FusedLoraLinear
        if reason.text:
            left[reason.text] += 1
    if not any(isinstance(module, FusedLoraLinear) for module in layers):
        raise ValueError(f"patch_model: none of PEFT's layers can be fused: {_list(left)}; train the model as it is")
    if left:
        warnings.warn(f"apt: on PEFT's own path stay {_list(left)}", stacklevel=3)


def unfuse(model: nn.Module) -> None:
    """Give the layers PEFT's own forward back."""
    for module in model.modules():
        if isinstance(module, FusedLoraLinear):
            module.__class__ = Linear  # type: ignore[assignment]


class _Reason:
    """Why a layer is not fused; `permanent` where no adapter of it ever is."""

    def __init__(self, text: str = "", permanent: bool = False) -> None:
        self.text = text
        self.permanent = permanent


def _reason(layer: Any) -> _Reason:
    base = layer.get_base_layer()
    if type(layer) is not Linear or type(base) is not nn.Linear or layer.fan_in_fan_out:
        return _Reason(f"{type(base).__name__} layers", permanent=True)
    found = [_obstacle(layer, name, training=True) for name in layer.lora_A]
    return _Reason(next((text for text in found if text), ""))


def _obstacle(layer: Any, name: str, training: bool | None = None) -> str | None:
    """What of one adapter the op does not express: None where it does."""
    base = layer.get_base_layer()
    dropout = layer.lora_dropout[name]
    if name in layer.lora_variant:
        return f"{type(layer.lora_variant[name]).__name__.removesuffix('LinearVariant')} adapters"
    if layer.lora_B[name].bias is not None:
        return "adapters with a bias"
    if base.weight.requires_grad or (base.bias is not None and base.bias.requires_grad):
        return "layers whose base trains"
    inside = (base, dropout, layer.lora_A[name], layer.lora_B[name])
    if hasattr(base, "_hf_hook") or any(m._forward_hooks or m._forward_pre_hooks for m in inside):
        return "layers with hooks inside"
    # PEFT drops inputs, one mask for each adapter; the op drops entries of the rank-r product.
    if not isinstance(dropout, nn.Identity) and (layer.training if training is None else training):
        return "layers with lora_dropout while they train"
    return None


def _list(left: Counter[str]) -> str:
    return ", ".join(f"{count} {text}" for text, count in left.items())
