"""A run at toy size: a random BERT with its tokenizer in a folder, and sentences whose first word tells their class."""

import csv
import json
import random
from pathlib import Path
from typing import Any

import torch

WORDS = ["good", "bad", *(f"word{i}" for i in range(40))]
SHORT = {"training.max_steps": 12, "evaluation.event_timing_steps": 0, "evaluation.inference_repeats": 1}  # of a grid
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


def tiny_tokenizer() -> Any:
    """A WordPiece tokenizer of whole words, with BERT's special tokens."""
    from tokenizers import BertWordPieceTokenizer
    from transformers import PreTrainedTokenizerFast

    vocab = {word: i for i, word in enumerate([*SPECIAL, *WORDS])}
    special = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), SPECIAL, strict=True))
    return PreTrainedTokenizerFast(tokenizer_object=BertWordPieceTokenizer(vocab)._tokenizer, **special)


def tiny_bert(num_labels: int = 2, layers: int = 2) -> Any:
    """A random BERT classifier whose weights are large enough that a wrong index shows."""
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(SPECIAL) + len(WORDS),
        hidden_size=32,
        num_hidden_layers=layers,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=64,
        initializer_range=0.2,
        num_labels=num_labels,
    )
    return BertForSequenceClassification(config).eval()


def write_model(folder: Path) -> Path:
    """A model folder as the hub has them: weights without a task head, config, tokenizer."""
    tiny_bert().bert.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def sentences(count: int) -> list[tuple[str, str]]:
    """Distinct sentences of 4 to 12 words, and their labels."""
    draw = random.Random(0)
    rows = {}
    while len(rows) < count:
        label = draw.randrange(2)
        rows[" ".join([WORDS[label], *draw.choices(WORDS[2:], k=draw.randint(3, 11))])] = str(label)
    return list(rows.items())


def write_csv(path: Path, rows: list[tuple[str, ...]], header: tuple[str, ...] = ("text", "label")) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *rows])
    return path


def save_config(folder: Path, document: dict[str, Any], sections: dict[str, dict[str, Any]]) -> Path:
    """A config in a folder; `sections` go on top of its own."""
    import yaml

    document |= {name: document.get(name, {}) | section for name, section in sections.items()}
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(document), encoding="utf-8")
    return path


def write_config(folder: Path, **sections: dict[str, Any]) -> Path:
    """A config with model, data and every size at toy scale; `sections` go on top."""
    document: dict[str, Any] = {
        "output_dir": str(folder / "run"),
        "model": {"name": str(write_model(folder / "tiny")), "target_modules": ["q", "v", "up", "down"]},
        "data": {
            "datasets": str(write_csv(folder / "rows.csv", sentences(240))),
            "test_size": 48,
            "max_length": 16,
        },
        "training": {"learning_rate": "3e-3", "batch_size": 8, "max_steps": 100, "logging_steps": 5},
        "pruning": {"target_sparsity": 0.5, "num_events": 3},
        "evaluation": {"inference_length": 8, "inference_repeats": 2, "event_timing_steps": 2},
        "hardware": {"num_threads": 1, "device": "cpu"},
    }
    return save_config(folder, document, sections)


def write_grid(folder: Path, **keys: Any) -> Path:
    """A file of a grid with its config; `keys` go on top, and those that are None are left out."""
    import yaml

    write_config(folder)
    path = folder / "grid.yaml"
    grid = {"output_dir": str(folder / "grid"), "config": "config.yaml", "settings": SHORT, **keys}
    text = yaml.safe_dump({key: value for key, value in grid.items() if value is not None}, sort_keys=False)
    path.write_text(text, encoding="utf-8")
    return path


def metrics_of(run: Path) -> dict[str, Any]:
    """What a finished run scored and counted."""
    return _read(run / "metrics.json")


def efficiency_of(run: Path) -> dict[str, Any]:
    """What it took of time."""
    return _read(run / "efficiency.json")


def _read(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found
