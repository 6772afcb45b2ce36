"""Which cases a run has, the most important first, at full size on a GPU and at toy size elsewhere."""

from collections.abc import Callable
from dataclasses import dataclass

from bench.kernels.device import SPILLS, measure_copy, measure_gemm, measure_spills
from bench.kernels.group import GroupCase, measure_group
from bench.kernels.linear import LinearCase, measure
from bench.kernels.passes import PassCase, measure_pass
from bench.kernels.profile import profile_case
from bench.kernels.promises import measure_compaction, measure_promises
from bench.kernels.session import Session
from bench.kernels.sweep import KERNELS, SweepCase, measure_sweep


@dataclass(frozen=True)
class Sizes:
    """Widths and token counts. Layers keep their names at toy size, so that a rehearsal fills the same table."""

    layers: dict[str, tuple[int, int]]  # name: inputs, outputs
    tokens: tuple[int, ...]
    encoder_tokens: int
    ranks: tuple[int, int, int]
    copy: int  # elements of the tensor that is copied


FULL = Sizes(
    layers={
        "square": (4096, 4096),
        "up": (4096, 11008),
        "down": (11008, 4096),
        "encoder square": (768, 768),
        "encoder up": (768, 3072),
        "encoder down": (3072, 768),
    },
    tokens=(8192, 16384),
    encoder_tokens=16384,
    ranks=(8, 16, 64),
    copy=2**29,
)
TOY = Sizes(
    layers={
        "square": (32, 32),
        "up": (32, 48),
        "down": (48, 32),
        "encoder square": (16, 16),
        "encoder up": (16, 32),
        "encoder down": (32, 16),
    },
    tokens=(64, 96),
    encoder_tokens=48,
    ranks=(2, 4, 8),
    copy=2**12,
)
BIG, ENCODER = ("square", "up", "down"), ("encoder square", "encoder up", "encoder down")

Plan = list[tuple[str, Callable[[Session], None]]]


def plan(sizes: Sizes, *, quick: bool) -> Plan:
    """Names and measurements in the order in which they are made."""
    low, rank, high = sizes.ranks
    few = sizes.tokens[:1]
    cases: Plan = [("copy", lambda s: measure_copy(sizes.copy, s))]
    cases += [_gemm(sizes, layer, few[0]) for layer in BIG]
    cases += [_linear(sizes, layer, few[0], rank) for layer in BIG]
    cases += [_linear(sizes, layer, few[0], r) for r in (high, low) for layer in BIG]
    cases += [_linear(sizes, "square", few[0], rank, masks) for masks in ("decay", "out", "in", "binary", "gate")]
    promises = [_case(sizes, layer, few[0], r) for layer in BIG for r in (rank, high)]
    cases += [("promises " + c.name, lambda s, c=c: measure_promises(c, s)) for c in promises]
    cases += [_linear(sizes, layer, sizes.encoder_tokens, rank, graph=True) for layer in ENCODER]
    cases += [_linear(sizes, "encoder square", sizes.encoder_tokens, rank, "decay", graph=True)]
    cases += [_passed(kind, *shape) for kind, shape in _passes(sizes)]
    cases += [_group(sizes, "square", 3), _group(sizes, "up", 2)]
    half = _case(sizes, "up", few[0], rank)
    cases += [("compaction " + half.name, lambda s: measure_compaction(half, s))]
    cases += [(SPILLS, measure_spills)]
    if quick:
        return cases
    cases += [_linear(sizes, layer, tokens, rank) for tokens in sizes.tokens[1:] for layer in BIG]
    cases += [_linear(sizes, layer, sizes.encoder_tokens, rank, "decay", graph=True) for layer in ENCODER[1:]]
    cases += [_linear(sizes, layer, tokens, r) for tokens in sizes.tokens[1:] for r in (high, low) for layer in BIG]
    cases += [_linear(sizes, layer, sizes.encoder_tokens, r, graph=True) for r in (high, low) for layer in ENCODER]
    cases += [_linear(sizes, layer, few[0], rank, masks) for masks in ("decay", "in") for layer in ("up", "down")]
    cases += [_linear(sizes, layer, sizes.encoder_tokens, rank) for layer in ENCODER]
    cases += [_gemm(sizes, layer, sizes.encoder_tokens) for layer in ENCODER]
    return cases


def profile_plan(sizes: Sizes) -> Plan:
    """One case of each op, the linear also at the width and rank where most is added up, and small (`one_kernel`)."""
    tokens, (_, rank, high) = sizes.tokens[0], sizes.ranks
    linears = [_case(sizes, "square", tokens, rank), _case(sizes, "up", tokens, high)]
    linears += [_case(sizes, "square", tokens, rank, "decay"), _case(sizes, "encoder square", tokens, rank)]
    groups = [_group_case(sizes, "square", 3)]
    wanted = ("gate", "gate collecting", "column_sums", "gated_activation", "masked_norm", "weight_kurtosis")
    shapes = dict(_passes(sizes)) | dict(reversed(_passes(sizes)))  # the first of each kind
    passes = [PassCase(kind=kind, rows=shapes[kind][0], width=shapes[kind][1]) for kind in wanted]
    return [(f"profile {case.name}", lambda s, c=case: profile_case(c, s)) for case in (*linears, *groups, *passes)]


def sweep_cases(sizes: Sizes) -> list[SweepCase]:
    """Each skinny kernel at the middle rank on the square layer, at the high one on the wide layer."""
    _, rank, high = sizes.ranks
    layers = [(*sizes.layers["square"], rank), (*sizes.layers["up"], high)]
    return [
        SweepCase(kernel=kernel, tokens=sizes.tokens[0], d_in=d_in, d_out=d_out, rank=r)
        for d_in, d_out, r in layers
        for kernel in KERNELS
    ]


def sweep_plan(sizes: Sizes) -> Plan:
    return [(case.name, lambda s, c=case: measure_sweep(c, s)) for case in sweep_cases(sizes)]


def _case(sizes: Sizes, layer: str, tokens: int, rank: int, masks: str = "plain", graph: bool = False) -> LinearCase:
    d_in, d_out = sizes.layers[layer]
    return LinearCase(layer=layer, tokens=tokens, d_in=d_in, d_out=d_out, rank=rank, masks=masks, graph=graph)


def _linear(
    sizes: Sizes, layer: str, tokens: int, rank: int, masks: str = "plain", *, graph: bool = False
) -> tuple[str, Callable[[Session], None]]:
    case = _case(sizes, layer, tokens, rank, masks, graph)
    return case.name, lambda session: measure(case, session)


def _gemm(sizes: Sizes, layer: str, tokens: int) -> tuple[str, Callable[[Session], None]]:
    d_in, d_out = sizes.layers[layer]
    return f"gemm {d_in}x{d_out} T={tokens}", lambda session: measure_gemm(tokens, d_in, d_out, session)


def _passes(sizes: Sizes) -> list[tuple[str, tuple[int, int]]]:
    """Gates of a block at their widths, then the other passes at the width where each is used."""
    (hidden, _), (_, wide), tokens = sizes.layers["square"], sizes.layers["up"], sizes.tokens[0]
    shapes = [(kind, (tokens, width)) for width in (hidden, wide) for kind in ("gate", "gate collecting")]
    shapes += [("weight_kurtosis", (hidden, hidden)), ("weight_kurtosis", (hidden, wide))]
    shapes += [
        ("column_sums", (tokens, hidden)),
        ("gated_activation", (tokens, wide)),
        ("masked_norm", (tokens, hidden)),
    ]
    return shapes


def _group_case(sizes: Sizes, layer: str, layers: int) -> GroupCase:
    (d_in, d_out), rank = sizes.layers[layer], sizes.ranks[1]
    return GroupCase(tokens=sizes.tokens[0], d_in=d_in, d_out=d_out, rank=rank, layers=layers)


def _group(sizes: Sizes, layer: str, layers: int) -> tuple[str, Callable[[Session], None]]:
    case = _group_case(sizes, layer, layers)
    return case.name, lambda session: measure_group(case, session)


def _passed(kind: str, rows: int, width: int) -> tuple[str, Callable[[Session], None]]:
    case = PassCase(kind=kind, rows=rows, width=width)
    return case.name, lambda session: measure_pass(case, session)
