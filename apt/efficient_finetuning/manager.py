"""EfficientFineTuningManager: every method of adapters and prompts on one model by one call each."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from apt.efficient_finetuning.places import add_adapters, add_prompt, hold_prompt, plain_prompts
from apt.efficient_finetuning.weights import load_weights, save_weights
from apt.families import anatomy_of, base_model, known_family
from apt.layers import adapted
from apt.methods import LowRank, RankImportance, updates
from apt.methods.prompts import PrefixTuning, PTuningEmbedding, placed_prompt, prefix_sizes

Targets = str | Sequence[str] | None


class EfficientFineTuningManager:
    """Puts methods into a model, counts what trains, saves and loads it. It holds nothing but the model.

    Everything but what the methods add, and the task head of a Hugging Face model, is frozen. Methods may follow each
    other on one model: adapters of one linear add up. `apt.patch_model` gives more settings, and more methods.

    Args:
        model: a Hugging Face model or any other module; changed in place.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def apply_lora(
        self,
        target_modules: Targets = None,
        rank: int = 8,
        alpha: float = 16.0,
        dropout_probability: float = 0.1,
        bias: bool = False,
        share_parameters: bool = False,
    ) -> None:
        """LoRA on linears: ``W x + alpha / rank * B A x``.

        Args:
            target_modules: names of linears, endings of names, or names of modules that hold linears; one text is a
                regular expression or "all-linear"; None is what is usual for the model.
            rank: at least 1.
            alpha: above 0.
            dropout_probability: on the rank-R product while training, [0, 1).
            bias: False: a linear in a model keeps its bias as it is; `LoRALinear` has a bias of its own.
            share_parameters: one A and one B for all these linears of the same shape.

        Raises:
            ValueError: a target names nothing, or a setting is out of range.
        """
        settings = _settings(target_modules, rank, alpha, dropout_probability, bias)
        add_adapters(self.model, "lora", share=share_parameters, **settings)

    def apply_adalora(
        self,
        target_modules: Targets = None,
        rank: int = 8,
        alpha: float = 16.0,
        dropout_probability: float = 0.1,
        bias: bool = False,
        adaptive_rank: bool = True,
        rank_allocation: str = "uniform",
    ) -> None:
        """The simple form of AdaLoRA: LoRA whose ranks have a learned importance; those above 0.1 are used.

        For AdaLoRA with its budget use ``apt.patch_model(model, method="adalora")`` and a `Controller`.

        Args:
            target_modules: as in `apply_lora`; so are rank, alpha, dropout_probability and bias.
            rank: at the start, when all are used.
            alpha: above 0.
            dropout_probability: in [0, 1).
            bias: False.
            adaptive_rank: whether importance is learned.
            rank_allocation: which ranks are used: "uniform" the first ones, "importance" the most important,
                "magnitude" those that add most.
        """
        settings = _settings(target_modules, rank, alpha, dropout_probability, bias)
        settings |= {"adaptive_rank": adaptive_rank, "rank_allocation": rank_allocation}
        add_adapters(self.model, "adalora_simple", **settings)

    def apply_ptuning(
        self,
        num_virtual_tokens: int = 20,
        embedding_dimension: int | None = None,
        hidden_dimension: int | None = 512,
        dropout_probability: float = 0.1,
    ) -> None:
        """Virtual tokens before the text: `ptuning_embeddings`.

        A Hugging Face model of a family that is known runs with them from now on. Any other model only holds them: its
        own code puts ``manager.ptuning_embeddings(batch_size)`` before what it embeds.

        Args:
            num_virtual_tokens: at least 1.
            embedding_dimension: that of the model's token embeddings; None finds it there.
            hidden_dimension: of the MLP; None is as many as the embeddings have.
            dropout_probability: in the MLP, [0, 1).
        """
        found = _embedding_dimension(self.model)
        if known_family(self.model) is None:
            width = embedding_dimension or found
            if width is None:
                raise ValueError("apply_ptuning: the model has no nn.Embedding; give embedding_dimension")
            hold_prompt(self.model, PTuningEmbedding(num_virtual_tokens, width, hidden_dimension, dropout_probability))
            return
        _must_agree("apply_ptuning", {"embedding_dimension": (embedding_dimension, found)})
        add_prompt(
            self.model,
            "p_tuning",
            num_virtual_tokens=num_virtual_tokens,
            hidden_dimension=hidden_dimension,
            dropout_probability=dropout_probability,
        )

    def apply_prefix_tuning(
        self,
        num_layers: int | None = None,
        num_heads: int | None = None,
        head_dimension: int | None = None,
        prefix_length: int = 20,
        dropout_probability: float = 0.1,
    ) -> None:
        """Keys and values before those of the text, in every layer: `prefix_tuning`.

        As with `apply_ptuning`, a model of a known family runs with them and has the three sizes itself; for any other
        they must be given, and its own code reads ``manager.prefix_tuning.get_prefix_states(layer)``.

        Args:
            num_layers: of the model.
            num_heads: of keys and values, in each layer.
            head_dimension: features of a head.
            prefix_length: at least 1.
            dropout_probability: on the prefixes while training, [0, 1).
        """
        sizes = {"num_layers": num_layers, "num_heads": num_heads, "head_dimension": head_dimension}
        if known_family(self.model) is None:
            if num_layers is None or num_heads is None or head_dimension is None:
                raise ValueError(f"apply_prefix_tuning: the family of this model is unknown; give all of {list(sizes)}")
            held = PrefixTuning(num_layers, num_heads, head_dimension, prefix_length, dropout_probability)
            hold_prompt(self.model, held)
            return
        layers = prefix_sizes(anatomy_of(self.model))
        heads = _same_in_all_layers([count for count, _ in layers])
        features = _same_in_all_layers([size for _, size in layers])
        found = (len(layers), heads, features)
        pairs = zip(sizes.values(), found, strict=True)
        _must_agree("apply_prefix_tuning", dict(zip(sizes, pairs, strict=True)))
        settings = {"num_virtual_tokens": prefix_length, "dropout_probability": dropout_probability}
        add_prompt(self.model, "prefix_tuning", **settings)

    @property
    def lora_layers(self) -> dict[str, nn.Module]:
        """What holds ``lora_A`` and ``lora_B`` of each linear with LoRA, by its name."""
        return {name: module for name, module in self._updates() if not isinstance(module, RankImportance)}

    @property
    def adalora_layers(self) -> dict[str, RankImportance]:
        """The same of AdaLoRA's simple form; each has ``get_effective_rank()``."""
        return {name: module for name, module in self._updates() if isinstance(module, RankImportance)}

    def _updates(self) -> Iterator[tuple[str, nn.Module]]:
        for name, adapter in adapted(self.model):
            if adapter.lora_A is not None:
                yield name, adapter
            yield from ((name, delta) for delta in updates(adapter) if isinstance(delta, LowRank))

    @property
    def ptuning_embeddings(self) -> PTuningEmbedding | None:
        """The virtual tokens: ``ptuning_embeddings(batch_size)`` is ``[batch_size, tokens, embedding_dimension]``."""
        found = (placed_prompt(self.model), *plain_prompts(self.model))
        return next((prompt for prompt in found if isinstance(prompt, PTuningEmbedding)), None)

    @property
    def prefix_tuning(self) -> PrefixTuning | None:
        """The prefixes."""
        found = (placed_prompt(self.model), *plain_prompts(self.model))
        return next((prompt for prompt in found if isinstance(prompt, PrefixTuning)), None)

    def get_trainable_parameters(self) -> list[nn.Parameter]:
        """What trains, for an optimizer; shared parameters once."""
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]

    def count_trainable_parameters(self) -> int:
        """How many numbers train."""
        return sum(parameter.numel() for parameter in self.get_trainable_parameters())

    def parameter_efficiency(self) -> float:
        """The share of all parameters that trains."""
        return self.count_trainable_parameters() / sum(p.numel() for p in self.model.parameters())

    def memory_efficiency(self) -> float:
        """The share of the bytes of all parameters that belongs to those that train."""
        sizes = [(p.numel() * p.element_size(), p.requires_grad) for p in self.model.parameters()]
        trained = sum(size for size, trains in sizes if trains)
        return trained / sum(size for size, _ in sizes)

    def efficiency_score(self, training_speed: float, model_performance: float) -> float:
        """``0.4 parameter_efficiency + 0.3 memory_efficiency + 0.2 training_speed + 0.1 model_performance``.

        A number to compare runs that are measured in one way: the first two shares fall with fewer trained parameters,
        so the better of two equally good runs has the lower score where speed is a time.

        Args:
            training_speed: as you measure it, such as the time of an epoch over that of full fine-tuning.
            model_performance: as you measure it.
        """
        shares = 0.4 * self.parameter_efficiency() + 0.3 * self.memory_efficiency()
        return shares + 0.2 * training_speed + 0.1 * model_performance

    def save_efficient_weights(self, path: str | Path) -> Path:
        """Write what trains to a safetensors file, whatever its suffix, under a temporary name that is then changed."""
        return save_weights(self.model, path)

    def load_efficient_weights(self, path: str | Path) -> None:
        """Read it back, after the same methods were applied to the same base.

        Raises:
            ValueError: the weights are of another model; the first difference is named, and nothing was changed.
        """
        load_weights(self.model, path)


def _settings(targets: Targets, rank: int, alpha: float, dropout: float, bias: bool) -> dict[str, Any]:
    if bias:
        raise ValueError(
            "efficient_finetuning: linears of a model keep their frozen bias; use bias=False, or put a LoRALinear with "
            "bias=True in their place"
        )
    chosen = targets if targets is None or isinstance(targets, str) else tuple(targets)
    return {"target_modules": chosen, "rank": rank, "lora_alpha": alpha, "lora_dropout": dropout}


def _same_in_all_layers(values: list[int]) -> int | None:
    return values[0] if len(set(values)) == 1 else None


def _embedding_dimension(model: Any) -> int | None:
    """The width of the model's token embeddings, or of the first embedding it has; None where it has none."""
    base = base_model(model)
    embeddings = getattr(base, "get_input_embeddings", lambda: None)()
    if not isinstance(embeddings, nn.Embedding):
        embeddings = next((module for module in model.modules() if isinstance(module, nn.Embedding)), None)
    return None if embeddings is None else embeddings.embedding_dim


def _must_agree(call: str, sizes: dict[str, tuple[int | None, int | None]]) -> None:
    for name, (given, found) in sizes.items():
        if given is not None and given != found:
            raise ValueError(f"{call}: {name} is {found or 'not the same in all layers'} in this model, not {given}")
