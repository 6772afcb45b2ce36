"""An optimizer's moments: whose can follow a change of shape, and with what new entries start."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from apt.layers import exchange

# Optimizers that keep every moment as a tensor shaped like its parameter, so that it can be cut and grown with it.
HANDLED = tuple(
    getattr(torch.optim, name)
    for name in ("AdamW", "Adam", "SGD", "NAdam", "RAdam", "Adamax", "RMSprop", "Adagrad", "Adadelta")
)
OPTIMIZERS = {kind.__name__.lower(): kind for kind in HANDLED}
# Moments that divide the step. Zeros there would make new entries jump: the mean of their neighbours stands in.
SCALES = ("exp_avg_sq", "max_exp_avg_sq", "exp_inf", "square_avg", "acc_delta", "sum")
REASONS = {"factor": "keeps one moment a row and one a column", "bit": "keeps its moments in quantised blocks"}


def bare_optimizer(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """The optimizer itself, out of what accelerate wraps around it."""
    while not isinstance(optimizer, HANDLED) and isinstance(
        inner := getattr(optimizer, "optimizer", None), torch.optim.Optimizer
    ):
        optimizer = inner
    return optimizer


def check_optimizer(optimizer: torch.optim.Optimizer) -> None:
    """Refuse an optimizer whose state cannot follow an event.

    Raises:
        ValueError: it is none of `HANDLED`, nor made from one of them.
    """
    if isinstance(optimizer, HANDLED):
        return
    name = type(optimizer).__name__
    reason = next((why for word, why in REASONS.items() if word in name.lower()), "keeps its state in an unknown form")
    raise ValueError(
        f"surgery: {name} {reason}, which cannot follow a pruning event; use AdamW, Adam or SGD (or torch's "
        f"{', '.join(each.__name__ for each in HANDLED[3:])}): only adapters and the task head train, so full moments "
        f"cost little memory"
    )


def state_of(optimizer: torch.optim.Optimizer | None, parameter: Tensor) -> dict[str, Tensor]:
    """What the optimizer keeps for a parameter, empty before its first step."""
    return {} if optimizer is None else optimizer.state.get(parameter, {})


def moments(parameter: Tensor, optimizer: torch.optim.Optimizer | None) -> list[tuple[str, Tensor]]:
    """State tensors, shaped like the parameter; step counters are passed over.

    Raises:
        ValueError: a state tensor has another shape.
    """
    found = []
    for key, value in state_of(optimizer, parameter).items():
        if not isinstance(value, Tensor) or value.dim() == 0:
            continue
        if value.shape != parameter.shape:
            raise ValueError(
                f"surgery: {type(optimizer).__name__} keeps {key!r} of shape {list(value.shape)} for a parameter of "
                f"shape {list(parameter.shape)}, which cannot follow a pruning event; use AdamW, Adam or SGD"
            )
        found.append((key, value))
    return found


def grown(key: str, value: Tensor, dim: int, num: int) -> Tensor:
    """A moment with `num` entries more along the rank axis: 0, or where it divides the step the mean of those there.

    torch counts steps per parameter, so zeros in `exp_avg_sq` would leave new entries without the correction that a
    fresh parameter has: they would jump by several learning rates (docs/method.md, 4.5).
    """
    shape = list(value.shape)
    shape[dim] = num
    new = value.mean(dim, keepdim=True).expand(shape) if key in SCALES else value.new_zeros(shape)
    return torch.cat([value, new], dim)


def follow(parameter: Tensor, transform: Callable[[Tensor], Tensor], optimizer: torch.optim.Optimizer | None) -> None:
    """Change a parameter (or a buffer), its gradient and every moment of it in the same way."""
    kept = moments(parameter, optimizer)
    grad = parameter.grad
    parameter.grad = None
    exchange(parameter, transform(parameter.data))
    if grad is not None:
        parameter.grad = transform(grad)
    for key, value in kept:
        state_of(optimizer, parameter)[key] = transform(value)


def forget(parameters: Iterable[nn.Parameter], optimizer: torch.optim.Optimizer | None) -> None:
    """Take parameters that are gone out of the optimizer, with their moments; the groups stay."""
    gone = {id(parameter) for parameter in parameters}
    if optimizer is not None and gone:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if id(parameter) in gone:
                    optimizer.state.pop(parameter, None)
            group["params"] = [parameter for parameter in group["params"] if id(parameter) not in gone]
