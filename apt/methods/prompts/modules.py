"""What trains in P-tuning (arXiv 2103.10385) and prefix tuning (arXiv 2101.00190): P virtual tokens, or prefixes."""

import itertools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class PTuningEmbedding(nn.Module):
    """P virtual tokens: trained embeddings, through an MLP and a layer norm.

    Args:
        num_virtual_tokens: P, at least 1.
        embedding_dimension: D, that of the model's token embeddings.
        hidden_dimension: of the MLP; None means D.
        dropout_probability: after each activation of the MLP, in training.
        mlp_layers: linear layers with ReLU between; 0 means no MLP, 3 without a layer norm is PEFT's ``PromptEncoder``.
        layer_norm: whether a layer norm follows.

    Shapes: ``forward(B)`` gives ``[B, P, D]``.
    """

    virtual_embeddings: nn.Parameter  # [P, D]

    def __init__(
        self,
        num_virtual_tokens: int,
        embedding_dimension: int,
        hidden_dimension: int | None = None,
        dropout_probability: float = 0.0,
        *,
        mlp_layers: int = 2,
        layer_norm: bool = True,
    ) -> None:
        super().__init__()
        self.virtual_embeddings = nn.Parameter(torch.randn(num_virtual_tokens, embedding_dimension))
        hidden = hidden_dimension or embedding_dimension
        widths = [embedding_dimension, *[hidden] * (mlp_layers - 1), embedding_dimension] if mlp_layers else []
        steps: list[nn.Module] = []
        for narrow, wide in itertools.pairwise(widths):
            between = [nn.ReLU(), *([nn.Dropout(dropout_probability)] if dropout_probability else [])]
            steps += [*(between if steps else []), nn.Linear(narrow, wide)]
        self.mlp = nn.Sequential(*steps)
        self.layer_norm = nn.LayerNorm(embedding_dimension) if layer_norm else nn.Identity()

    @property
    def num_virtual_tokens(self) -> int:
        """P."""
        return self.virtual_embeddings.shape[0]

    def forward(self, batch_size: int) -> Tensor:
        tokens: Tensor = self.layer_norm(self.mlp(self.virtual_embeddings))
        return tokens.unsqueeze(0).expand(batch_size, -1, -1)

    @torch.no_grad()
    def plain(self) -> "PTuningEmbedding":
        """The same tokens without the network that makes them, as an export keeps them."""
        made = self.layer_norm(_without_dropout(self.mlp)(self.virtual_embeddings))
        plain = PTuningEmbedding(*made.shape, mlp_layers=0, layer_norm=False).to(made)
        plain.virtual_embeddings.copy_(made)
        return plain

    def extra_repr(self) -> str:
        return f"num_virtual_tokens={self.num_virtual_tokens}"


class PrefixTuning(nn.Module):
    """Keys and values of P virtual tokens for every layer, before those of the text.

    They train themselves, or with `prefix_projection` come out of one network (linear, tanh, linear) for all layers, as
    in PEFT's ``PrefixEncoder``. Layers may differ in heads, as after pruning; one without heads has no prefix.

    Args:
        num_layers: L.
        num_heads: of keys and values, in every layer or layer by layer.
        head_dimension: features of a head, likewise.
        prefix_length: P, at least 1.
        dropout_probability: on the prefixes, in training.
        prefix_projection: whether a network makes them.
        hidden_dimension: of that network; None means `embedding_dimension`.
        embedding_dimension: of what goes into it; None means the keys of the widest layer.
    """

    def __init__(
        self,
        num_layers: int,
        num_heads: int | Sequence[int],
        head_dimension: int | Sequence[int],
        prefix_length: int,
        dropout_probability: float = 0.0,
        *,
        prefix_projection: bool = False,
        hidden_dimension: int | None = None,
        embedding_dimension: int | None = None,
    ) -> None:
        super().__init__()
        self.num_heads = _of_each_layer("num_heads", num_heads, num_layers)
        self.head_dimension = _of_each_layer("head_dimension", head_dimension, num_layers)
        self.prefix_length = prefix_length
        self.dropout = nn.Dropout(dropout_probability)
        self.prefix_projection = prefix_projection
        if prefix_projection:
            embedding = embedding_dimension or max(self.widths) // 2
            hidden = hidden_dimension or embedding
            self.virtual_embeddings = nn.Parameter(torch.randn(prefix_length, embedding))  # [P, E]
            self.projection = nn.Sequential(
                nn.Linear(embedding, hidden), nn.Tanh(), nn.Linear(hidden, sum(self.widths))
            )
        else:
            self.prefix_embeddings = nn.ParameterList(torch.randn(prefix_length, width) for width in self.widths)

    @property
    def num_virtual_tokens(self) -> int:
        """P, as of the other prompt."""
        return self.prefix_length

    @property
    def num_layers(self) -> int:
        """Layers that have keys and values of their own."""
        return len(self.num_heads)

    @property
    def widths(self) -> list[int]:
        """Features of keys and values together, layer by layer."""
        return [2 * heads * size for heads, size in zip(self.num_heads, self.head_dimension, strict=True)]

    def get_prefix_states(self, layer_idx: int) -> tuple[Tensor, Tensor]:
        """Keys and values of one layer, each ``[P, heads, head_dimension]``."""
        return self._states(layer_idx, self._flat(layer_idx, self._hidden()))

    def forward(self) -> list[tuple[Tensor, Tensor]]:
        """Keys and values of all layers, each ``[P, heads, head_dimension]``."""
        hidden = self._hidden()
        return [self._states(layer, self._flat(layer, hidden)) for layer in range(self.num_layers)]

    def _hidden(self) -> Tensor | None:
        """What the last layer of the network reads, ``[P, hidden_dimension]``."""
        return self.projection[:2](self.virtual_embeddings) if self.prefix_projection else None

    def _flat(self, layer: int, hidden: Tensor | None) -> Tensor:
        """``[P, 2 * heads * head_dimension]``: keys, then values."""
        if hidden is None:
            return self.prefix_embeddings[layer]
        start = sum(self.widths[:layer])
        width = self.widths[layer]
        last = self.projection[2]
        rows = slice(start, start + width)
        return F.linear(hidden, last.get_parameter("weight")[rows], last.get_parameter("bias")[rows])

    def _states(self, layer: int, flat: Tensor) -> tuple[Tensor, Tensor]:
        shape = (self.prefix_length, 2, self.num_heads[layer], self.head_dimension[layer])
        key, value = self.dropout(flat).view(shape).unbind(1)
        return key, value

    @torch.no_grad()
    def plain(self) -> "PrefixTuning":
        """The same prefixes without the network that makes them, as an export keeps them."""
        hidden = self._hidden()
        made = [self._flat(layer, hidden) for layer in range(self.num_layers)]
        plain = PrefixTuning(self.num_layers, self.num_heads, self.head_dimension, self.prefix_length).to(made[0])
        for mine, prefix in zip(plain.prefix_embeddings, made, strict=True):
            mine.copy_(prefix)
        return plain

    def extra_repr(self) -> str:
        return f"prefix_length={self.prefix_length}, num_heads={self.num_heads}"


def _without_dropout(steps: nn.Sequential) -> nn.Sequential:
    return nn.Sequential(*(step for step in steps if not isinstance(step, nn.Dropout)))


def _of_each_layer(name: str, value: int | Sequence[int], num_layers: int) -> list[int]:
    values = [value] * num_layers if isinstance(value, int) else list(value)
    if len(values) != num_layers:
        raise ValueError(f"prompts: {name} has {len(values)} entries for {num_layers} layers; give one for each")
    return values
