"""Settings of the adapter methods, in the words of PEFT and of the papers."""

from dataclasses import dataclass

from apt.files.reading import is_finite_number, shown

ALLOCATIONS = ("uniform", "importance", "magnitude")
CONTEXTS = ("first", "mean")


@dataclass(frozen=True, kw_only=True)
class MethodConfig:
    """What the adapters of a method start from and are held to. Each method reads its own."""

    lora_alpha: float | None = None  # s is lora_alpha / r, above 0; null: s is `scale`
    use_rslora: bool = False  # s is lora_alpha / sqrt(r)
    rank_pattern: dict[str, int] | None = None  # name, end of a name or regular expression: r of those adapters
    alpha_pattern: dict[str, float] | None = None  # the same: their lora_alpha
    lora_dropout: float = 0.0  # chance that an entry of the rank-r product is dropped in training, [0, 1)
    # gsa, dynacsg: singular directions with a gate, at least 1; null: of gsa twice the rank, of dynacsg the rank
    num_directions: int | None = None
    l1_weight: float = 1e-4  # gsa: lambda of lambda * sum |gate|, at least 0
    idx: int = 0  # spectral_a, spectral_r: which block of r singular directions, 0 the largest
    gate_alpha: float = 0.1  # dynacsg: by how much an open gate raises its singular value, a fraction
    gate_temperature: float = 1.0  # dynacsg: of the sigmoid that gradients pass, above 0
    l0_weight: float = 1e-4  # dynacsg: lambda of lambda * expected number of open gates, at least 0
    context: str = "first"  # dynacsg: what an encoder's gates depend on, "first" token or "mean" of the tokens
    context_layer: int = 0  # dynacsg: after which layer that is read, at least 0; the layers above have gates
    hyper_params: int = 65536  # dynacsg: numbers of the network that opens the gates, about; at least 1
    target_r: int | None = None  # adalora: mean rank at the end, at least 1; null: two thirds of the first
    tinit: int = 0  # adalora: optimizer steps before the budget falls, at least 0
    tfinal: int = 0  # adalora: optimizer steps at the end with final ranks, at least 0
    deltaT: int = 1  # adalora: optimizer steps between two choices of ranks, at least 1
    beta1: float = 0.85  # adalora: of the average of |w dL/dw|, (0, 1)
    beta2: float = 0.85  # adalora: of the average distance to that, (0, 1)
    orth_reg_weight: float = 0.5  # adalora: of the penalty that keeps P and Q orthogonal, at least 0
    # which ranks stay. adalora: of all adapters, by "importance" by "magnitude" (|lambda|), or "uniform": equally many
    # of each. adalora_simple: of each linear, by "importance", by "magnitude" (|g a b|), or "uniform": the first ones
    rank_allocation: str = "importance"
    adaptive_rank: bool = True  # adalora_simple: whether importance is learned; otherwise all ranks count alike
    importance_threshold: float = 0.1  # adalora_simple: of the importance of a rank in use, which starts at 1
    svd_cache: str | None = "auto"  # folder for decompositions; "auto": in the user's cache; null: none is kept

    def __post_init__(self) -> None:
        if not 0.0 <= self.lora_dropout < 1.0:
            raise ValueError(f"methods: lora_dropout must be in [0, 1), got {self.lora_dropout}")
        if self.num_directions is not None and self.num_directions < 1:
            raise ValueError(f"methods: num_directions must be at least 1, got {self.num_directions}")
        if self.l1_weight < 0.0:
            raise ValueError(f"methods: l1_weight must be at least 0, got {self.l1_weight}")
        numbers = [*([] if self.lora_alpha is None else [self.lora_alpha]), *(self.alpha_pattern or {}).values()]
        ranks = (self.rank_pattern or {}).values()
        wrong = next((value for value in (*numbers, *ranks) if not is_finite_number(value)), None)
        if wrong is not None:
            raise ValueError(f"methods: lora_alpha and the values of patterns must be numbers, got {shown(wrong)}")
        if any(number <= 0.0 for number in numbers) or any(rank < 1 for rank in ranks):
            raise ValueError("methods: lora_alpha must be above 0 and ranks at least 1, in patterns too")
        if self.use_rslora and not numbers:
            raise ValueError("methods: use_rslora needs lora_alpha, which it divides by the root of the rank")
        lowest = {"target_r": 1, "tinit": 0, "tfinal": 0, "deltaT": 1, "orth_reg_weight": 0}
        lowest |= {"l0_weight": 0, "context_layer": 0, "hyper_params": 1}
        for name, low in lowest.items():
            value = getattr(self, name)
            if value is not None and value < low:
                raise ValueError(f"methods: {name} must be at least {low}, got {value}")
        if not 0.0 < self.beta1 < 1.0 or not 0.0 < self.beta2 < 1.0:
            raise ValueError(f"methods: beta1 and beta2 must be in (0, 1), got {self.beta1} and {self.beta2}")
        if self.rank_allocation not in ALLOCATIONS:
            raise ValueError(f"methods: rank_allocation must be one of {ALLOCATIONS}, got {self.rank_allocation!r}")
        if self.context not in CONTEXTS:
            raise ValueError(f"methods: context must be one of {list(CONTEXTS)}, got {self.context!r}")
        if not self.gate_temperature > 0.0:
            raise ValueError(f"methods: gate_temperature must be above 0, got {self.gate_temperature}")
        if self.idx < 0:
            raise ValueError(f"methods: idx must be at least 0, got {self.idx}")
