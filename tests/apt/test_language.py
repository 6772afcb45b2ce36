"""The language-modelling task: documents to blocks, perplexity, generation, and models out of GGUF files."""

import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_run import write_csv
from tiny_text import END, documents, text_tokenizer, tiny_llama, write_gguf, write_llama

from apt.families import IGNORED
from apt.runs.config import DataConfig, ModelConfig, RunConfig
from apt.runs.data import Examples, TextLoader, collate_blocks
from apt.runs.data.sources import read_tables
from apt.runs.estimate.dry_run import stock_config
from apt.runs.evaluation.language import generation_metrics, generation_rates, greedy, perplexity
from apt.runs.models import build_model, build_tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return text_tokenizer()


def load(path: Path, tokenizer: Any, **settings: Any) -> TextLoader:
    return TextLoader(DataConfig(datasets=str(path), **({"test_size": 4, "block_length": 16} | settings)), tokenizer)


def write_text(path: Path, texts: list[str]) -> Path:
    path.write_text("\n\n".join(texts) + "\n", encoding="utf-8")
    return path


def once(part: Examples) -> list[int]:
    """The held-out tokens without those that begin a block to be context there."""
    first, *others = part.columns["input_ids"]
    return [*first, *(token for block in others for token in block[1:])]


def flat(part: Examples) -> list[int]:
    return [token for block in part.columns["input_ids"] for token in block]


def test_documents_are_packed_and_held_out_as_wholes(tmp_path: Path, tokenizer: Any) -> None:
    texts = documents(20)
    data = load(write_text(tmp_path / "a.txt", texts), tokenizer)
    assert (data.train_documents, data.test_documents, data.unit) == (16, 4, "blocks")
    tested = tokenizer.decode(once(data.test)).split(END)
    assert tested.pop() == ""  # every document is ended
    assert len(tested) == 4
    assert set(tested) < set(texts)
    *trained, last = tokenizer.decode(flat(data.train)).split(END)  # the last one is cut where it fills no block
    others = set(texts) - set(tested)
    assert set(trained) < others
    assert len(others - set(trained)) == 1
    assert (others - set(trained)).pop().startswith(last)
    assert {len(block) for block in data.train.columns["input_ids"]} == {16}
    assert {len(block) for block in data.test.columns["input_ids"][:-1]} == {16}
    assert data.train.columns["labels"] == data.train.columns["input_ids"]


@pytest.mark.parametrize("block_length", [2, 3, 16, 75])
def test_every_held_out_token_is_predicted_once(tmp_path: Path, tokenizer: Any, block_length: int) -> None:
    texts = documents(5)
    data = load(write_text(tmp_path / "a.txt", texts), tokenizer, block_length=block_length, test_size=2)
    whole = load(tmp_path / "a.txt", tokenizer, block_length=40, test_size=2)
    assert once(data.test) == once(whole.test)
    assert all(1 < len(block) <= block_length for block in data.test.columns["input_ids"])


def test_a_text_that_is_held_out_is_never_trained_on(tmp_path: Path, tokenizer: Any) -> None:
    texts = documents(12)
    data = load(write_text(tmp_path / "a.txt", texts * 3), tokenizer)
    tested = set(tokenizer.decode(once(data.test)).split(END)) - {""}
    trained = set(tokenizer.decode(flat(data.train)).split(END))
    assert not tested & trained
    assert data.train_documents == 36 - 3 * len(tested)


def test_few_documents_of_another_source(tmp_path: Path, tokenizer: Any) -> None:
    rows = [(text, str(i % 2)) for i, text in enumerate(documents(12))]
    path = write_csv(tmp_path / "a.csv", rows)
    data = load(path, tokenizer, max_train_samples=3, max_test_samples=2)
    assert (data.train_documents, data.test_documents) == (3, 2)
    with pytest.raises(ValueError, match=r"the 1 documents to train on fill no block of 500 tokens; lower"):
        load(path, tokenizer, max_train_samples=1, block_length=500)
    with pytest.raises(ValueError, match=r"packed text is read from one column, but .* has text and label"):
        load(path, tokenizer, text_columns=["text", "label"])


def test_a_txt_file_has_a_document_between_blank_lines(tmp_path: Path, tokenizer: Any) -> None:
    (tmp_path / "a.txt").write_text("\n\nwa wb\nwc\n \n\nwd\n\nwe", encoding="utf-8")
    table = read_tables(str(tmp_path / "a.txt"))["train"]
    assert table.columns == {"text": ["wa wb\nwc", "wd", "we"]}
    assert table.lines == [3, 7, 9]
    data = load(tmp_path / "a.txt", tokenizer, test_size=1, block_length=2)
    assert (data.train_documents, data.test_documents) == (2, 1)
    (tmp_path / "empty.txt").write_text("\n \n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"empty.txt is empty"):
        load(tmp_path / "empty.txt", tokenizer)


def test_a_tokenizer_without_an_end(tmp_path: Path) -> None:
    tokenizer = text_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="needs an end-of-text token, and the tokenizer has none"):
        load(write_text(tmp_path / "a.txt", documents(8)), tokenizer)


def test_blocks_are_padded_only_where_they_must_be() -> None:
    rows = [{"input_ids": [5, 6, 7], "labels": [5, 6, 7]}, {"input_ids": [8, 9], "labels": [8, 9]}]
    batch = collate_blocks(rows)
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 9, 0]]
    assert batch["labels"].tolist() == [[5, 6, 7], [8, 9, IGNORED]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    assert set(collate_blocks(rows[:1])) == {"input_ids", "labels"}


def test_perplexity_weighs_every_token_the_same(tmp_path: Path, tokenizer: Any) -> None:
    model = tiny_llama().double()
    data = load(write_text(tmp_path / "a.txt", documents(12)), tokenizer, block_length=15).test
    assert len(data.columns["input_ids"][-1]) < 15  # else the last block would show nothing
    nll, count = 0.0, 0
    for block in data.columns["input_ids"]:  # token by token, each from a pass of its own over what stands before
        for t in range(1, len(block)):
            nll -= model(input_ids=torch.tensor([block[:t]])).logits[0, -1].log_softmax(-1)[block[t]].item()
            count += 1
    for batch_size in (1, 3, 100):
        scores = perplexity(model, data, batch_size)
        assert scores["test_tokens"] == count
        assert scores["loss"] == pytest.approx(nll / count, abs=1e-5)
        assert scores["perplexity"] == pytest.approx(math.exp(nll / count), rel=1e-5)


def test_generation_is_greedy_and_as_long_as_asked(tokenizer: Any) -> None:
    model = tiny_llama()
    prompts = torch.tensor([tokenizer("wa wb wc").input_ids, tokenizer("wd wb wa").input_ids])
    end = int(model(input_ids=prompts).logits[0, -1].argmax())  # the first token that would come ends a text here
    model.generation_config.eos_token_id = end
    made = greedy(model, prompts, 5)
    assert made.shape == (2, prompts.shape[1] + 5)
    expected = prompts
    for _ in range(5):  # without a cache; the end of a text is never chosen
        logits = model(input_ids=expected).logits[:, -1].detach()
        logits[:, end] = -math.inf
        expected = torch.cat([expected, logits.argmax(-1, keepdim=True)], dim=1)
    assert made.tolist() == expected.tolist()


def test_rates_are_taken_in_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []

    def record(model: Any, prompts: torch.Tensor, new_tokens: int) -> None:
        calls.append((model, new_tokens))

    monkeypatch.setattr("apt.runs.evaluation.language.greedy", record)
    models: dict[str, Any] = {"dense": "dense", "small": "small"}
    rates = generation_rates(models, torch.zeros(3, 4, dtype=torch.long), new_tokens=7, repeats=2)
    assert calls == [("dense", 7), ("small", 7)] * 3  # the first of each warms up
    assert [len(values) for values in rates.values()] == [2, 2]


def test_prompts_come_from_held_out_blocks() -> None:
    blocks = [[1, 2, 3, 4], [5, 6, 7, 8], [9]]
    data = Examples({"input_ids": blocks, "labels": blocks})
    sizes: dict[str, Any] = {"batch_size": 3, "new_tokens": 2, "repeats": 1}
    found = generation_metrics(tiny_llama(1), tiny_llama(1), data, length=3, **sizes)
    assert found["generation_shape"] == [3, 3, 2]
    assert min(found["generated_per_s_dense"], found["generated_per_s_small"]) > 0.0
    with pytest.raises(ValueError, match=r"no held-out block has 9 tokens; lower evaluation.inference_length"):
        generation_metrics(tiny_llama(1), tiny_llama(1), data, length=9, **sizes)


def run_config(name: str, task: str = "language_modeling") -> RunConfig:
    data = DataConfig(datasets="a.txt")
    return RunConfig(output_dir="runs/none", model=ModelConfig(name=name, task=task), data=data)


def test_a_gguf_file_gives_the_model_and_its_tokenizer(tmp_path: Path, tokenizer: Any) -> None:
    config = run_config(str(write_gguf(tmp_path / "tiny.gguf")))
    found, plain = build_tokenizer(config), tiny_llama()
    model: Any = build_model(config, None, found)
    text = documents(1)[0]
    assert found(text).input_ids == tokenizer(text).input_ids
    assert found.eos_token_id == tokenizer.eos_token_id
    ids = torch.tensor([found(text).input_ids])
    torch.testing.assert_close(model(input_ids=ids).logits, plain(input_ids=ids).logits, atol=1e-5, rtol=1e-5)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    model.save_pretrained(tmp_path / "plain")  # it is an ordinary model, not marked as quantized
    assert getattr(model.config, "quantization_config", None) is None


def test_a_gguf_file_as_a_classifier(tmp_path: Path) -> None:
    config = run_config(str(write_gguf(tmp_path / "tiny.gguf")), "classification")
    model: Any = build_model(config, 3, build_tokenizer(config))
    assert model(input_ids=torch.tensor([[5, 6, 7]])).logits.shape == (1, 3)


def test_a_gguf_file_in_a_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_gguf(tmp_path / "tiny_gguf_package" / "tiny.gguf")
    (tmp_path / "tiny_gguf_package" / "__init__.py").write_text("raise RuntimeError", encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert build_tokenizer(run_config("package:tiny_gguf_package/tiny.gguf")).eos_token == END


def test_gguf_mistakes_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FileNotFoundError, match=r"model: there is no file ./nothing.gguf"):
        build_tokenizer(run_config("./nothing.gguf"))
    path = write_gguf(tmp_path / "tiny.gguf")
    for size in (16, 200, 3000, path.stat().st_size - 100):
        (tmp_path / "broken.gguf").write_bytes(path.read_bytes()[:size])
        config = run_config(str(tmp_path / "broken.gguf"))
        with pytest.raises(ValueError, match=r"broken.gguf cannot be loaded"):
            build_model(config, None, build_tokenizer(config))
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ImportError, match=r'tiny.gguf needs gguf; pip install "apt-lm\[gguf\]"'):
        build_tokenizer(run_config(str(path)))


@pytest.mark.parametrize("size", ["block_count", "attention.head_count", "embedding_length", "feed_forward_length"])
def test_a_size_in_a_gguf_file_that_no_model_has_builds_none(size: str, tmp_path: Path) -> None:
    """One bit flipped in a number that says how much to build."""
    path = write_gguf(tmp_path / "tiny.gguf")
    content = bytearray(path.read_bytes())
    key = f"llama.{size}".encode()
    content[content.index(key) + len(key) + 4 + 3] ^= 64  # behind the type of the value: its highest byte
    path.write_bytes(content)
    config = run_config(str(path))
    for read in (build_tokenizer, lambda given: build_model(given, None, None), stock_config):
        with pytest.raises(ValueError, match=rf"{path}: \w+ must be a whole number from 0 to"):
            read(config)


def test_a_weight_under_another_name_in_a_gguf_file_is_not_drawn(tmp_path: Path) -> None:
    """One bit flipped in the name of a tensor, so that the model has none for that place."""
    path = write_gguf(tmp_path / "tiny.gguf")
    path.write_bytes(path.read_bytes().replace(b"blk.1.attn_v.weight", b"blk.1.attn_w.weight"))
    with pytest.raises(ValueError, match=r"tiny.gguf lacks model\.layers\.1\.self_attn\.v_proj\.weight, which would"):
        build_model(run_config(str(path)), None, None)


def test_a_folder_as_a_language_model(tmp_path: Path) -> None:
    config = run_config(str(write_llama(tmp_path / "tiny")))
    model: Any = build_model(config, None, build_tokenizer(config))
    ids = torch.tensor([[5, 6, 7]])
    torch.testing.assert_close(model(input_ids=ids).logits, tiny_llama()(input_ids=ids).logits)
