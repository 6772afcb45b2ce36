"""The trainers of transformers, TRL and sentence-transformers with pruning: train, prune, save, resume, export."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from pages import ROOT, blocks
from tiny_models import tiny_model
from tiny_text import WORDS, text_tokenizer
from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments, Trainer, TrainingArguments

import apt
from apt.layers import adapted
from apt.surgery.prune import apply_prune_plan

pytestmark = pytest.mark.trainers
STEPS = 8
GOAL = {"target_sparsity": 0.5, "num_events": 2, "prune_end": 6, "round_to": 4}
SIZES = {"max_steps": STEPS, "per_device_train_batch_size": 4, "learning_rate": 1e-3, "logging_steps": 1}
# TRL trains in bfloat16 by default.
QUIET = {"use_cpu": True, "report_to": "none", "disable_tqdm": True, "seed": 4, "bf16": False}


@dataclass
class Kind:
    """A trainer, with what it trains."""

    trainer: type
    arguments: type
    model: Callable[[], Any]  # patched
    given: Callable[[], dict[str, Any]]  # arguments of its own
    settings: dict[str, Any]  # of its training arguments


def llama(name: str = "llama_gqa") -> Any:
    return apt.patch_model(tiny_model(name, torch.float32, vocab_size=len(text_tokenizer())), rank=2)


def prompts(**columns: Callable[[int], Any]) -> Any:
    from datasets import Dataset

    return Dataset.from_list([{name: make(row) for name, make in columns.items()} for row in range(16)])


def words(row: int, shift: int = 0) -> str:
    return " ".join(WORDS[(row + shift + place) % len(WORDS)] for place in range(3 + row % 3))


def of_trl(name: str) -> Kind:
    import trl

    chosen = {"prompt": words, "chosen": lambda row: " " + words(row, 1), "rejected": lambda row: " " + words(row, 7)}
    labelled = {"prompt": words, "completion": lambda row: " " + words(row, 1), "label": lambda row: row % 2 == 0}
    columns: dict[str, dict[str, Callable[[int], Any]]] = {
        "SFT": {"said": lambda row: words(row) + " " + words(row, 3)},
        "DPO": chosen,
        "KTO": labelled,
        "Reward": chosen,
        "GRPO": {"prompt": words},
    }
    settings = {"SFT": {"max_length": 16}, "DPO": {"max_length": 16}, "KTO": {"max_length": 16}}
    settings |= {"Reward": {"max_length": 16}, "GRPO": {"max_completion_length": 4, "num_generations": 4}}

    def given() -> dict[str, Any]:
        found = {"train_dataset": prompts(**columns[name]), "processing_class": tokenizer()}
        if name in ("DPO", "KTO"):
            found["ref_model"] = tiny_model("llama_gqa", torch.float32, vocab_size=len(text_tokenizer()))
        own = {"GRPO": {"reward_funcs": longest}, "SFT": {"formatting_func": lambda row: row["said"]}}
        return found | own.get(name, {})

    model = (lambda: reward_model()) if name == "Reward" else llama
    return Kind(getattr(trl, f"{name}Trainer"), getattr(trl, f"{name}Config"), model, given, settings[name])


def reward_model() -> Any:
    model = tiny_model("llama_cls", torch.float32, vocab_size=len(text_tokenizer()), num_labels=1)
    return apt.patch_model(model, rank=2)


def tokenizer() -> Any:
    found = text_tokenizer()
    found.pad_token = found.eos_token
    return found


def longest(completions: list[str], **_: Any) -> list[float]:
    return [float(len(set(text))) for text in completions]


def of_transformers(name: str) -> Kind:
    rows = [
        {"input_ids": torch.randint(1, 40, (6,), generator=torch.Generator().manual_seed(row))} for row in range(16)
    ]
    rows = [{**row, "labels": row["input_ids"]} for row in rows]
    if name == "Trainer":
        return Kind(Trainer, TrainingArguments, llama, lambda: {"train_dataset": rows}, {})

    def t5() -> Any:
        return apt.patch_model(tiny_model("t5", torch.float32), rank=2)

    settings = {"predict_with_generate": True}
    return Kind(Seq2SeqTrainer, Seq2SeqTrainingArguments, t5, lambda: {"train_dataset": rows}, settings)


def of_sentences() -> Kind:
    from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

    def given() -> dict[str, Any]:
        return {
            "train_dataset": prompts(anchor=words, positive=lambda row: words(row, 1)),
            "loss": MultipleNegativesRankingLoss,
        }

    def model() -> Any:
        return apt.patch_model(sentence_model(), rank=2)

    return Kind(SentenceTransformerTrainer, SentenceTransformerTrainingArguments, model, given, {})


def sentence_model() -> Any:
    """A tiny BERT and the mean of its tokens."""
    import tempfile

    from sentence_transformers.sentence_transformer.model import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
    from tiny_run import tiny_tokenizer

    with tempfile.TemporaryDirectory() as folder:
        plain = tiny_model("bert", torch.float32, vocab_size=len(tiny_tokenizer())).bert
        plain.save_pretrained(folder)
        tiny_tokenizer().save_pretrained(folder)
        transformer = Transformer(folder)
    return SentenceTransformer(modules=[transformer, Pooling(32)], device="cpu")


KINDS: dict[str, Callable[[], Kind]] = {
    "Trainer": lambda: of_transformers("Trainer"),
    "Seq2Seq": lambda: of_transformers("Seq2Seq"),
    **{name: (lambda name=name: of_trl(name)) for name in ("SFT", "DPO", "KTO", "Reward")},
    "sentences": of_sentences,
}


def made(kind: Kind, folder: Path, **settings: Any) -> Any:
    names = getattr(kind.arguments, "__dataclass_fields__", {})
    known = {name: settings.pop(name) for name in list(settings) if name in names}
    arguments = kind.arguments(output_dir=str(folder), **{**SIZES, **QUIET, **kind.settings, **known})
    return apt.trainer_class(kind.trainer)(model=kind.model(), args=arguments, **kind.given(), **{**GOAL, **settings})


@pytest.mark.parametrize("name", KINDS)
def test_it_trains_prunes_saves_resumes_and_exports(name: str, tmp_path: Path) -> None:
    kind = KINDS[name]()
    ran = made(kind, tmp_path / "whole", save_strategy="steps", save_steps=4)
    ran.train()
    inner = ran.controller.model
    assert isinstance(ran, kind.trainer)
    assert [event.step for event in ran.controller.events] == [3, 6]
    assert apt.summary(ran.model).sparsity >= 0.5
    logged = [row for row in ran.state.log_history if "loss" in row]
    assert [row["step"] for row in logged] == list(range(1, STEPS + 1))
    assert all(row["tokens_per_s"] > 0.0 for row in logged)
    again = made(kind, tmp_path / "again")
    again.train(resume_from_checkpoint=str(tmp_path / "whole/checkpoint-4"))
    ours, theirs = again.model.state_dict(), ran.model.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    apt.export_model(ran.model, tmp_path / "small")
    small = apt.load_model(tmp_path / "small")
    inputs = {"input_ids": torch.arange(1, 9)[None]}
    if name == "Seq2Seq":
        inputs["decoder_input_ids"] = inputs["input_ids"]
    with torch.no_grad():
        answers, wanted = small(**inputs), inner.eval()(**inputs)
    torch.testing.assert_close(answers[0], wanted[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", KINDS)
def test_its_events_are_checked_where_that_is_asked_for(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made(KINDS[name](), tmp_path / "whole", verify_events=True).train()

    def careless(model: Any, plan: Any, optimizer: Any, **settings: Any) -> None:
        apply_prune_plan(model, plan, optimizer, **settings)
        for linear in [linear for _, linear in adapted(model)]:
            linear.weight.data.mul_(1.1)

    monkeypatch.setattr("apt.surgery.event.apply_prune_plan", careless)
    with pytest.raises(RuntimeError, match="the event of step 3 moved a logit by"):
        made(KINDS[name](), tmp_path / "moved", verify_events=True).train()


@pytest.mark.parametrize("name", ["SFT", "DPO", "Reward"])
def test_a_teacher_teaches_beside_their_loss(name: str, tmp_path: Path) -> None:
    ran = made(KINDS[name](), tmp_path, use_self_distillation=True, distill_end=1.0)
    ran.train()
    taught = [row["distill_loss"] for row in ran.state.log_history if "distill_loss" in row]
    assert len(taught) == STEPS - 3
    assert all(0.0 < value < float("inf") for value in taught)
    assert apt.summary(ran.model).sparsity >= 0.5


def test_accumulated_batches_of_an_sft_trainer_are_one(tmp_path: Path) -> None:
    """Rows of different lengths, whose tokens all weigh alike."""
    runs = []
    for size, times in ((4, 1), (2, 2)):
        sizes = {"per_device_train_batch_size": size, "gradient_accumulation_steps": times, "max_steps": 3}
        ran = made(of_trl("SFT"), tmp_path / str(size), **sizes, num_events=0, target_sparsity=0.0)
        ran.train()
        runs.append([row["loss"] for row in ran.state.log_history if "loss" in row])
    assert runs[1] == pytest.approx(runs[0], rel=1e-4)


def test_grpo_takes_two_steps(tmp_path: Path) -> None:
    """Rows of prompts are no batch by name, and its loss is divided by the steps of accumulation already."""
    sizes = {"max_steps": 2, "gradient_accumulation_steps": 2}
    ran = made(of_trl("GRPO"), tmp_path, **sizes, num_events=1, prune_end=1, target_sparsity=0.3)
    ran.train()
    assert ran.state.global_step == 2
    assert apt.summary(ran.model).sparsity >= 0.3
    assert all("tokens_per_s" not in row for row in ran.state.log_history)


def test_a_head_that_trl_multiplies_itself_is_told(tmp_path: Path) -> None:
    kind = of_trl("SFT")
    kind.model = lambda: apt.patch_model(
        tiny_model("llama", torch.float32, vocab_size=len(text_tokenizer())), unit_types=("head", "neuron", "hidden")
    )
    with pytest.raises(ValueError, match="APTSFTTrainer multiplies by the weight of the output layer itself"):
        made(kind, tmp_path).train()


def test_a_teacher_of_sentences_is_told(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="does not call the model as a whole; set use_self_distillation to false"):
        made(of_sentences(), tmp_path, use_self_distillation=True, distill_end=1.0).train()


def test_a_pruned_transformer_goes_back_into_its_sentence_model(tmp_path: Path) -> None:
    model = sentence_model()
    before = model.encode(["good word1", "bad word2 word3"])
    assert apt.patch_model(model) is model
    assert model.encode(["good word1", "bad word2 word3"]) == pytest.approx(before, abs=1e-5)
    apt.export_model(model, tmp_path / "small")
    other = sentence_model()
    other[0].model = apt.load_model(tmp_path / "small")
    assert other.encode(["good word1", "bad word2 word3"]) == pytest.approx(before, abs=1e-5)
    apt.unpatch_model(model)
    assert model.encode(["good word1", "bad word2 word3"]) == pytest.approx(before, abs=1e-5)
    assert os.listdir(tmp_path) == ["small"]


def test_what_saves_a_patched_sentence_model_names_export_model(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=r"only apt can read what save_pretrained writes.*apt\.export_model"):
        apt.patch_model(sentence_model()).save_pretrained(str(tmp_path))


def test_the_code_of_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sentence_transformers
    import transformers

    plain = tiny_model("llama_gqa", torch.float32, vocab_size=len(text_tokenizer()))
    encoders = iter([sentence_model(), sentence_model()])
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", lambda name: plain)
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda name: tokenizer())
    monkeypatch.setattr(sentence_transformers, "SentenceTransformer", lambda name: next(encoders))
    rows = iter([prompts(text=words), prompts(anchor=words, positive=lambda row: words(row, 1))])
    space: dict[str, Any] = {"next_rows": lambda: next(rows)}
    monkeypatch.chdir(tmp_path)
    for block in blocks((ROOT / "docs/trainers.md").read_text(encoding="utf-8"), "py"):
        code = block.code.replace("train_dataset=...", "train_dataset=next_rows()")
        code = code.replace("max_steps=500", "max_steps=20, use_cpu=True, report_to='none'")
        space["folder"] = tmp_path / str(block.line)
        exec(code.replace('"small"', "folder"), space)
    assert len(list(tmp_path.glob("*/apt_export.json"))) == 2
