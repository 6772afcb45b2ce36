"""T5's attentions with heads of their own: each takes its part of the shared bias, and one without heads hands it on.

The first layer of a stack makes that bias for all heads of its table, ``[1, H, T, S]``, and every layer hands it on to
the next. After pruning each layer has other heads: it takes its own from the whole, and hands on the whole. The zeros
that cross-attentions hand on are treated alike.
"""

from typing import Any

from torch import Tensor, nn

from apt.families.empty import EmptyAttention
from apt.families.own_method import OwnMethod
from apt.process.per_thread import PerThread


class _Call(PerThread):
    def __init__(self) -> None:
        self.whole: Tensor | None = None  # the bias of all heads, during a call of the attention


class WholeBias:
    """Hooks around one attention that give it the bias of its own heads.

    Which these are stands in one place, the attention's buffer `head_order`: of the first `n_heads` entries.

    Args:
        attention: a ``T5Attention``; its `compute_bias` gives only its heads' part from here on.
    """

    def __init__(self, attention: Any) -> None:
        self.here = _Call()
        attention.register_forward_pre_hook(self.take, with_kwargs=True)
        attention.register_forward_hook(self.hand_on)
        attention.compute_bias = OwnMethod(attention, _compute_bias, self)

    def take(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        whole = kwargs.get("position_bias")
        self.here.whole = whole
        return args, kwargs if whole is None else {**kwargs, "position_bias": _own(module, whole)}

    def hand_on(self, module: nn.Module, args: tuple[Any, ...], output: tuple[Any, ...]) -> tuple[Any, ...]:
        whole = self.here.whole
        self.here.whole = None
        return output[0], whole, *output[2:]


def _own(attention: Any, whole: Tensor) -> Tensor:
    """``[1, n_heads, T, S]`` of ``[1, H, T, S]``."""
    return whole.index_select(1, attention.head_order[: attention.n_heads].to(whole.device))


def _compute_bias(attention: Any, around: WholeBias, *args: Any, **kwargs: Any) -> Tensor:
    whole: Tensor = type(attention).compute_bias(attention, *args, **kwargs)
    around.here.whole = whole
    return _own(attention, whole)


class EmptyT5Attention(EmptyAttention):
    """Hands the shared bias on; where it stands in the first layer it makes it, from the table that it keeps."""

    def __init__(self, attention: nn.Module, out: nn.Module | None = None, weights: str = "attentions") -> None:
        super().__init__(attention, out, weights)
        table = getattr(attention, "relative_attention_bias", None)
        if table is not None:
            self.relative_attention_bias = table
            maker: Any = type(attention).__new__(type(attention))  # without the weights, which may go
            nn.Module.__init__(maker)
            for name in ("is_decoder", "relative_attention_num_buckets", "relative_attention_max_distance"):
                setattr(maker, name, getattr(attention, name))
            maker.relative_attention_bias = table
            self._maker = (maker,)  # in a tuple it is no part of the model

    def forward(self, hidden_states: Tensor, *args: Any, position_bias: Any = None, **kwargs: Any) -> tuple[Any, ...]:
        if position_bias is None and hasattr(self, "_maker"):
            length = hidden_states.shape[1]  # of an encoder, which has no cache
            position_bias = self._maker[0].compute_bias(length, length, device=hidden_states.device)
        self.place.pass_by(hidden_states, kwargs.get("past_key_values"))
        return self.output(hidden_states), position_bias, None
