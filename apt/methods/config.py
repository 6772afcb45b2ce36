"""Settings of the adapter methods, in the words of PEFT and of the papers."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class MethodConfig:
    """What the adapters of a method start from and are held to. Each method reads its own."""

    lora_dropout: float = 0.0  # chance that an entry of the rank-r product is dropped in training, [0, 1)
    num_directions: int | None = None  # gsa: singular directions k with a gate, at least 1; null: twice the rank
    l1_weight: float = 1e-4  # gsa: lambda of lambda * sum |gate|, at least 0
    idx: int = 0  # spectral_a, spectral_r: which block of r singular directions, 0 the largest
    svd_cache: str | None = "auto"  # folder for decompositions; "auto": in the user's cache; null: none is kept

    def __post_init__(self) -> None:
        if not 0.0 <= self.lora_dropout < 1.0:
            raise ValueError(f"methods: lora_dropout must be in [0, 1), got {self.lora_dropout}")
        if self.num_directions is not None and self.num_directions < 1:
            raise ValueError(f"methods: num_directions must be at least 1, got {self.num_directions}")
        if self.l1_weight < 0.0:
            raise ValueError(f"methods: l1_weight must be at least 0, got {self.l1_weight}")
        if self.idx < 0:
            raise ValueError(f"methods: idx must be at least 0, got {self.idx}")
