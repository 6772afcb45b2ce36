"""What pruning must know of a Hugging Face family: where its parts are. A family is a table, never a copied forward."""

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from apt.families.empty import AttentionPlace, EmptyAttention, EmptyLayer
from apt.families.layer_config import own_config
from apt.families.linears import replace_module

IGNORED = -100  # the label of a token that no loss counts, as Hugging Face has it
ROLES = ("q", "k", "v", "o", "up", "gate", "down")
# The label of a token that no loss of transformers counts.
IGNORED = -100


@dataclass(frozen=True)
class Attention:
    """An attention of a layer: where its linears are, and what happens to it as it loses heads.

    Args:
        module: name in the layer. Its forward returns a tuple whose first entry is the output.
        q, k, v, o: names of the projections in the layer; one that begins with a dot lies inside `module`.
        cross: whether keys and values come from another stack.
        fused: name of the one projection that stores the rows of `same_input`, in that order. While the model is
            patched they are its children, under the names of their roles.
        per_head: attributes of the module that its forward reads and that shrink in step with its heads; "config.x" is
            one that it reads from the model's config.
        settings: of the stock config, that say how many heads there are, KV heads last; none where the size of a head
            is derived from their number.
        empty: takes the place of the module when all its heads are gone.
        follow: called with the module before it first loses heads, where it must know which ones it has. Its buffer
            `head_order` then holds their places in the model as it came, in the order of its weights.
    """

    module: str
    q: str
    k: str
    v: str
    o: str
    cross: bool = False
    fused: str | None = None
    per_head: tuple[str, ...] = ()
    settings: tuple[str, ...] = ()
    empty: type[EmptyAttention] = EmptyAttention
    follow: Callable[[nn.Module], object] | None = None

    kind: ClassVar[str] = "head"
    producers: ClassVar[tuple[str, ...]] = ("q", "k", "v")  # roles whose rows a unit owns
    reader: ClassVar[str] = "o"  # role whose columns it owns, behind the gate

    @property
    def units(self) -> str:
        """What the unit groups are called."""
        return "cross_heads" if self.cross else "heads"

    @property
    def weights(self) -> str:
        """Under what name a model lists the weights of such attentions."""
        return "cross_attentions" if self.cross else "attentions"

    def place(self, layer: nn.Module) -> AttentionPlace:
        """What others await of the attention of a layer, whether it is empty or not."""
        attention = layer.get_submodule(self.module)
        return attention.place if isinstance(attention, EmptyAttention) else AttentionPlace.of(attention, self.weights)

    @property
    def linears(self) -> dict[str, str]:
        """Role -> module name in the layer."""
        names = {"q": self.q, "k": self.k, "v": self.v, "o": self.o}
        return {role: self._in_layer(name) for role, name in names.items()}

    @property
    def fused_linear(self) -> str | None:
        """Name of the fused projection in the layer."""
        return None if self.fused is None else self._in_layer(self.fused)

    def _in_layer(self, name: str) -> str:
        return self.module + name if name.startswith(".") else name

    @property
    def same_input(self) -> tuple[str, ...]:
        """Roles that read the same tensor."""
        return ("k", "v") if self.cross else ("q", "k", "v")

    def head_counts(self, attention: nn.Module) -> dict[str, int]:
        """What the module's forward reads of its number of heads, by the names in `per_head`."""
        return {name: operator.attrgetter(name)(attention) for name in self.per_head}

    def set_count(self, attention: nn.Module, name: str, count: int) -> None:
        """Change one of them for this module alone."""
        owner = own_config(attention) if name.startswith("config.") else attention
        setattr(owner, name.removeprefix("config."), count)

    def set_heads(self, layer: nn.Module, before: int, after: int, order: Tensor | None = None) -> None:
        """Tell the module of a layer that it has `after` instead of `before` heads (KV groups).

        Args:
            layer: that holds it.
            before: live heads until now.
            after: live heads from here on.
            order: positions until now of the heads that its weights still store; None where the family needs none.
        """
        attention = layer.get_submodule(self.module)
        for name, count in self.head_counts(attention).items():
            self.set_count(attention, name, count * after // before)
        if self.follow is not None and order is not None:
            old = self.head_order(layer)
            if old is None:
                self.follow(attention)
            vars(attention).pop("head_order", None)  # as the code of an export holds it
            attention.register_buffer("head_order", order if old is None else old[order], persistent=False)

    def head_order(self, layer: nn.Module) -> Tensor | None:
        """Places in the model as it came of the heads that the weights store; None where nothing asks for them."""
        return getattr(layer.get_submodule(self.module), "head_order", None)

    def remove(self, layer: nn.Module) -> EmptyAttention:
        """Put an `EmptyAttention` in the place of the module, which has no heads left."""
        attention = layer.get_submodule(self.module)
        out = layer.get_submodule(self.linears["o"])
        parent, _, name = self.module.rpartition(".")
        inner = out if self.o.startswith(".") else None
        empty = self.empty(attention, inner, self.weights)
        setattr(layer.get_submodule(parent), name, empty)
        return empty


@dataclass(frozen=True, kw_only=True)
class FFN:
    """The feed-forward part of a layer: names of its linears in the layer; `gate` where it is gated.

    `act` is the activation of a block that hands ``act(gate) * up`` to `down` with nothing between. `fused` is the one
    projection that stores the rows of gate and up, as in `Attention`; `setting` is that of the stock config which says
    how many neurons there are.
    """

    up: str
    down: str
    gate: str | None = None
    act: str | None = None
    fused: str | None = None
    setting: str = "intermediate_size"

    kind: ClassVar[str] = "neuron"
    producers: ClassVar[tuple[str, ...]] = ("up", "gate")
    reader: ClassVar[str] = "down"
    units: ClassVar[str] = "neurons"
    same_input: ClassVar[tuple[str, ...]] = ("gate", "up")

    @property
    def linears(self) -> dict[str, str]:
        """Role -> module name in the layer."""
        return {"up": self.up, "down": self.down} | ({} if self.gate is None else {"gate": self.gate})

    @property
    def fused_linear(self) -> str | None:
        """Name of the fused projection in the layer."""
        return self.fused


@dataclass(frozen=True, kw_only=True)
class Stack:
    """A list of like layers.

    Args:
        layers: name of the list in the base model.
        parts: of each layer, in the order in which they run.
        decoder: whether generation reads cache and mask lengths in the first layer of each attention type.
        name: first part of the names of its unit groups.
        setting: of the stock config, that says how many layers there are.
        behind: what a layer answers in a tuple behind the stream: names of its arguments, None for None. None where it
            answers the stream alone.
        first_stays: whether the first layer holds what all share, so that it cannot go.
    """

    layers: str
    parts: tuple[Attention | FFN, ...]
    decoder: bool = False
    name: str = "layers"
    setting: str = "num_hidden_layers"
    behind: tuple[str | None, ...] | None = None
    first_stays: bool = False


@dataclass(frozen=True)
class Layer:
    """A layer of a model, known by its name: whoever exchanges its module need not tell."""

    stack: Stack
    index: int  # in its stack
    path: str  # its name in the model, in full
    model: nn.Module

    @property
    def name(self) -> str:
        """``"layers.3"``: its unit groups are called ``"layers.3.heads"``."""
        return f"{self.stack.name}.{self.index}"

    @property
    def module(self) -> nn.Module:
        """The layer itself, or the `EmptyLayer` in its place."""
        return self.model.get_submodule(self.path)

    @property
    def gone(self) -> bool:
        """Whether the whole layer went."""
        return isinstance(self.module, EmptyLayer)

    @property
    def whole(self) -> nn.Module | None:
        """The layer as a dense teacher runs it; None where it went and no teacher runs it."""
        module = self.module
        if not isinstance(module, EmptyLayer):
            return module
        return next(iter(module.dense), None)

    def remove(self) -> EmptyLayer:
        """Put an `EmptyLayer` in the place of the module."""
        module = self.module
        places = [table.place(module) for table in self.stack.parts if isinstance(table, Attention)]
        empty = EmptyLayer(module, places, self.stack.behind)
        replace_module(self.model, self.path, empty)
        return empty


@dataclass(frozen=True, kw_only=True)
class Family:
    """Models of one shape.

    Args:
        model_types: values of ``config.model_type`` that have this shape.
        stacks: one, or encoder and decoder. One that a model lacks (an encoder alone) is passed over.
        default_targets: roles that get an adapter unless `target_modules` says otherwise.
        needs: settings of the config, with the value without which this is not the shape, or removal not exact.
        layers_need: the same, where whole layers are to go.
    """

    model_types: tuple[str, ...]
    stacks: tuple[Stack, ...]
    default_targets: tuple[str, ...]
    needs: tuple[tuple[str, object], ...] = ()
    layers_need: tuple[tuple[str, object], ...] = ()

    @property
    def decoder(self) -> bool:
        """Whether it is a decoder alone."""
        return all(stack.decoder for stack in self.stacks)

    def layers(self, model: nn.Module) -> list[Layer]:
        """The layers of a model with or without a task head, stack after stack."""
        found: list[Layer] = []
        for stack in self.stacks:
            path = in_base(model, stack.layers)
            layers = find_module(model, path)
            if layers is not None:
                names = [name for name, _ in layers.named_children()]
                found += [Layer(stack, index, f"{path}.{name}", model) for index, name in enumerate(names)]
        return found


def base_model(model: nn.Module) -> nn.Module:
    """The model without its task head; the model itself where it has none."""
    return getattr(model, getattr(model, "base_model_prefix", "") or "", model)


def in_base(model: nn.Module, name: str) -> str:
    """The full name of what the base model calls `name`."""
    base = base_model(model)
    return name if base is model else f"{model.base_model_prefix}.{name}"


def find_module(root: nn.Module, name: str) -> nn.Module | None:
    """The module of that name; None where there is none."""
    try:
        return root.get_submodule(name)
    except AttributeError:
        return None
