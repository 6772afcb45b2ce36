"""Which rows are trained on, which make a batch, and what each micro-batch weighs in its step."""

from collections.abc import Iterator, Mapping, Sequence, Sized
from typing import Any

import torch
from torch.utils.data import Sampler, Subset

from apt.families import IGNORED


class EpochOrder(Sampler[int]):
    """The order that a sampler draws, made a function of seed and epoch alone.

    A sampler that draws from the global random state (by length, say) gives a resumed run another order from its second
    epoch on: what was drawn in the epochs before is not drawn again.

    Args:
        sampler: draws from torch's global random state, which stays as it was.
        seed: of the data's order.
    """

    def __init__(self, sampler: Sampler[int], seed: int) -> None:
        self.sampler = sampler
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """The Trainer calls it before each epoch."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(self.seed + self.epoch)
            order = list(self.sampler)
        return iter(order)

    def __len__(self) -> int:
        return len(self.sampler)  # type: ignore[arg-type]


def hold_out(dataset: Any, share: float, seed: int) -> tuple[Any, Any]:
    """What is left of a data set, and a random share of it, at least one row."""
    if not isinstance(dataset, Sized) or len(dataset) < 2:
        raise ValueError("trainer: teacher_refresh holds out part of train_dataset, which must have a length above 1")
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(seed)).tolist()
    num = max(1, int(share * len(dataset)))
    parts = sorted(order[num:]), sorted(order[:num])
    if hasattr(dataset, "select"):  # a data set of Hugging Face keeps its columns and lengths
        return dataset.select(parts[0]), dataset.select(parts[1])
    rows: Any = dataset
    return Subset(rows, parts[0]), Subset(rows, parts[1])


def count_tokens(inputs: Any) -> int:
    """Tokens of a batch, padding included; 0 where it has none by name, as rows of prompts have none yet.

    Args:
        inputs: tensors by name, a text a row or several (``anchor_input_ids``, ``positive_input_ids``).
    """
    if not isinstance(inputs, Mapping):
        return 0
    texts = [name for name in inputs if name == "input_ids" or name.endswith("_input_ids")]
    read = [name for name in texts if name != "decoder_input_ids"] or ["inputs_embeds"]
    found = [inputs[name] for name in read if isinstance(inputs.get(name), torch.Tensor)]
    return sum(tokens.shape[0] * tokens.shape[1] for tokens in found)


def micro_batch_weights(batches: Sequence[Any], shifted: bool) -> list[float]:
    """What to multiply each micro-batch's mean loss by, so that their mean is the mean over all labels of the step.

    All are 1 where the micro-batches have as many labels each, or no labels.

    Args:
        batches: the micro-batches of one optimizer step.
        shifted: whether the loss drops the first label of each row, as a decoder's does.
    """
    named = len(batches) > 1 and all(isinstance(batch, Mapping) for batch in batches)  # else rows, still to be batched
    if not (named and all(isinstance(_labels(batch, shifted), torch.Tensor) for batch in batches)):
        return [1.0] * len(batches)
    counts = [int(_labels(batch, shifted).ne(IGNORED).sum()) for batch in batches]
    total = sum(counts)
    return [count * len(counts) / total for count in counts] if total else [1.0] * len(counts)


def _labels(batch: Mapping[str, Any], shifted: bool) -> Any:
    """The labels that the loss of a batch is the mean over, None where it has none."""
    if "shift_labels" in batch:
        return batch["shift_labels"]
    labels = batch.get("labels")
    if isinstance(labels, torch.Tensor) and labels.is_floating_point():
        # Numbers to be learnt, of which every one counts.
        return torch.zeros_like(labels, dtype=torch.long)
    return labels[..., 1:] if shifted and isinstance(labels, torch.Tensor) else labels
