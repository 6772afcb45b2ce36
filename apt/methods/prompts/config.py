"""Settings of P-tuning and prefix tuning."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class PromptConfig:
    """The virtual tokens of a prompt, and the small network that makes them."""

    num_virtual_tokens: int = 20  # before every text, at least 1
    hidden_dimension: int | None = None  # of the network, at least 1; null: as wide as what it makes for one layer
    dropout_probability: float = 0.0  # in training, [0, 1): inside P-tuning's network, on the prefixes of prefix tuning
    mlp_layers: int = 2  # p_tuning: linear layers of the network, at least 0; PEFT's has 3
    layer_norm: bool = True  # p_tuning: whether a layer norm follows the network; in PEFT none does
    prefix_projection: bool = False  # prefix_tuning: whether a network makes the prefixes, or they train themselves

    def __post_init__(self) -> None:
        for name, low in {"num_virtual_tokens": 1, "hidden_dimension": 1, "mlp_layers": 0}.items():
            value = getattr(self, name)
            if value is not None and value < low:
                raise ValueError(f"prompts: {name} must be at least {low}, got {value}")
        if not 0.0 <= self.dropout_probability < 1.0:
            raise ValueError(f"prompts: dropout_probability must be in [0, 1), got {self.dropout_probability}")
