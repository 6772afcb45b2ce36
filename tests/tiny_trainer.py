"""A Trainer at toy size: a random model, 64 rows made from their numbers, three events in 30 steps."""

from pathlib import Path
from typing import Any

import torch
from tiny_models import VOCABULARY, tiny_model
from torch.utils.data import Dataset
from transformers import TrainingArguments

import apt

STEPS = 30
EVENTS = {"target_sparsity": 0.6, "num_events": 3, "prune_end": 24, "round_to": 4}  # at 8, 16 and 24


class Rows(Dataset[dict[str, Any]]):
    """64 random sentences with padding, each made anew from its number."""

    def __init__(self, decoder: bool = False) -> None:
        self.decoder = decoder

    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> dict[str, Any]:
        ids = torch.randint(1, VOCABULARY, (8,), generator=torch.Generator().manual_seed(index))
        mask = torch.ones_like(ids)
        mask[8 - index % 3 :] = 0
        return {"input_ids": ids, "attention_mask": mask, "labels": ids if self.decoder else int(ids[0]) % 3}


def trainer(folder: Path, name: str = "bert", kind: type[apt.APTrainer] = apt.APTrainer, **settings: Any) -> Any:
    """A trainer with dropout on where the model has it, so that a random state that is not restored is seen."""
    known = {"per_device_train_batch_size": 8, "max_steps": STEPS, "save_strategy": "no", "learning_rate": 3e-3}
    names = set(TrainingArguments.__dataclass_fields__)
    known |= {key: settings.pop(key) for key in list(settings) if key in names}
    arguments = TrainingArguments(
        str(folder), use_cpu=True, report_to="none", disable_tqdm=True, logging_steps=1, seed=4, **known
    )
    dropouts = {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1} if name == "bert" else {}
    model = apt.patch_model(tiny_model(name, torch.float32, **dropouts), rank=3)
    settings.setdefault("train_dataset", Rows(name != "bert"))
    return kind(model=model, args=arguments, **{**EVENTS, **settings})


def losses(ran: apt.APTrainer) -> dict[int, float]:
    return {row["step"]: row["loss"] for row in ran.state.log_history if "loss" in row}


def decisions(ran: apt.APTrainer) -> list[dict[str, Any]]:
    """Events without the time they took."""
    return [{**event.to_json(), "seconds": 0.0} for event in ran.controller.events]
