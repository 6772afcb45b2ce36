"""What a training step keeps in memory and how much it computes, from fake tensors: exact sizes, no numbers.

Every storage that an operator makes is followed from its birth to its death. Backends differ in what they make, so the
tensors pretend to be on the CPU: attention and its mask take the path that they take there.
"""

import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, flop_registry, sdpa_flop_count

KINDS = ("weights", "adapters", "head", "moments", "gradients", "activations", "logits", "temporaries")


class Storages(TorchDispatchMode):
    """Follows storages while it is entered: which are alive at the moment when most bytes are."""

    def __init__(self) -> None:
        super().__init__()
        self._alive: dict[int, tuple[int, Any]] = {}  # address of a storage -> its number, and what tells of its end
        self.sizes: list[int] = []  # bytes of every storage, by number
        self._log: list[int] = []  # n: number n is born; -n - 1: it dies

    def number(self, tensor: Tensor) -> int:
        """The number of a tensor's storage, which views share; a new one is followed from here on."""
        storage = tensor.untyped_storage()
        address = storage._cdata
        if address not in self._alive:
            number = len(self.sizes)
            self._alive[address] = number, weakref.ref(storage, lambda _: self._end(address, number))
            self.sizes.append(storage.nbytes())
            self._log.append(number)
        return self._alive[address][0]

    def _end(self, address: int, number: int) -> None:
        del self._alive[address]
        self._log.append(-number - 1)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self.number(leaf)
        return out

    def at_peak(self) -> list[int]:
        """Numbers of the storages that are alive when most bytes are."""
        now = peak = at = 0
        for position, entry in enumerate(self._log):
            now += self.sizes[entry] if entry >= 0 else -self.sizes[-entry - 1]
            if now > peak:
                peak, at = now, position
        alive: dict[int, None] = {}
        for entry in self._log[: at + 1]:
            if entry >= 0:
                alive[entry] = None
            else:
                del alive[-entry - 1]
        return list(alive)


@dataclass(frozen=True)
class Footprint:
    """Bytes at the moment of a training step when most are in use, by kind, and what the step computes."""

    bytes_of: dict[str, int]  # a kind of KINDS -> bytes
    saved: int  # bytes of all that forward keeps for backward, whether still there at that moment or not
    flops: int  # of forward and backward, a multiplication and its addition counted as two

    @property
    def peak(self) -> int:
        return sum(self.bytes_of.values())


def measure_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    forward: Callable[[], tuple[Tensor, Iterable[Tensor]]],
    groups: dict[str, list[Tensor]],
    *,
    accumulate: bool = False,
) -> Footprint:
    """The footprint of a training step: forward, backward, optimizer. Moments are there before, as after a first step.

    Args:
        model: of fake tensors.
        optimizer: over its trainable parameters.
        forward: gives the loss, and the logits behind it.
        groups: kind -> tensors that are of this kind, beside those that the step makes.
        accumulate: whether gradients of an earlier micro-batch are there already.
    """
    make_moments(optimizer)
    if accumulate:
        forward()[0].backward()
    storages, kinds, saved = Storages(), dict[int, str](), set[int]()
    state = [moment for moments in moments_of(optimizer).values() for moment in moments]
    grads = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    frozen = [*model.parameters(), *model.buffers()]
    for kind, tensors in {**groups, "moments": state, "gradients": grads, "weights": frozen}.items():
        for tensor in tensors:
            kinds.setdefault(storages.number(tensor), kind)

    def keep(tensor: Tensor) -> Tensor:
        saved.add(storages.number(tensor))
        return tensor

    with FlopCounterMode(display=False, custom_mapping=FLOPS) as counter, storages:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss, logits = forward()
        for tensor in logits:
            kinds.setdefault(storages.number(tensor), "logits")
        del logits
        saved -= kinds.keys()
        kinds |= dict.fromkeys(saved, "activations")
        loss.backward()
        for parameter in model.parameters():
            if parameter.grad is not None:
                kinds.setdefault(storages.number(parameter.grad), "gradients")
        # What the loss does not depend on never gets moments: `make_moments` could not know.
        idle = {storages.number(m) for p, moments in moments_of(optimizer).items() if p.grad is None for m in moments}
        del loss
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    found = dict.fromkeys(KINDS, 0)
    for number in set(storages.at_peak()) - idle:
        found[kinds.get(number, "temporaries")] += storages.sizes[number]
    return Footprint(found, sum(storages.sizes[number] for number in saved), counter.get_total_flops())


def make_moments(optimizer: torch.optim.Optimizer) -> None:
    """Give every parameter that has none its moments, by a step with a gradient of zero."""
    new = [p for group in optimizer.param_groups for p in group["params"] if p not in optimizer.state]
    for parameter in new:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def moments_of(optimizer: torch.optim.Optimizer) -> dict[Tensor, list[Tensor]]:
    """The tensors that an optimizer keeps of each parameter."""
    return {p: [value for value in kept.values() if isinstance(value, Tensor)] for p, kept in optimizer.state.items()}


def forward_flops(model: nn.Module, batch: dict[str, Tensor]) -> int:
    """FLOPs of a forward pass in evaluation mode, without gradients."""
    model.eval()
    with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=FLOPS) as counter:
        model(**batch)
    return counter.get_total_flops()


def _onto(onto: Any, left: Any, right: Any, **_: Any) -> int:
    return 2 * left[0] * left[1] * right[1]


def _attention(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return sdpa_flop_count(query, key, value)


def _attention_backward(grad: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return 5 * sdpa_flop_count(query, key, value) // 2  # five products for the two of forward


FLOPS: dict[Any, Any] = {  # operators of ours, and of the CPU, that the counter of torch does not know
    torch.ops.aten.addmm_: _onto,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}
FLOPS = {operator: count for operator, count in FLOPS.items() if operator not in flop_registry}
