"""``--to gguf``: files that llama.cpp reads as torch reads the model, in every layout, type and tokenizer."""

import json
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from exported import free_export, halved_export, uniform_export
from tiny_models import random_plan, tiny_model
from tiny_run import tiny_tokenizer
from tiny_tokenizers import BEGIN, CHAT, END, TURN, byte_level, with_bytes

import apt
from apt.cli import main
from apt.deploy.formats import Comparison
from apt.deploy.source import opened
from apt.families import anatomy_of
from apt.surgery.prune import apply_prune_plan

pytestmark = pytest.mark.deploy
gguf = pytest.importorskip("gguf")
LlamaCpp = pytest.importorskip("apt.deploy.gguf_run", reason="no cyllama", exc_type=ImportError).LlamaCpp
writer = pytest.importorskip("apt.deploy.gguf")
SPLITS = pytest.importorskip("apt.deploy.gguf_tokens").SPLITS
types = pytest.importorskip("apt.deploy.gguf_types")

EXACT, TABLE = 1e-5, 1e-3  # llama.cpp reads GELU from a table in float16
TIED = {"tie_word_embeddings": True, "head_dim": 8}
CASES = {  # settings, architecture when uniform and when free, bound of the difference
    "llama_gqa": ({}, "llama", "deci", EXACT),
    "llama_bias": ({}, "llama", "deci", EXACT),
    "mistral": ({"sliding_window": None}, "llama", "deci", EXACT),
    "qwen2": ({}, "deci", "deci", EXACT),  # its own is as wide as the stream
    "qwen3": ({"head_dim": 8}, "qwen3", "qwen3", EXACT),
    "qwen3 tied": (TIED, "qwen3", "openelm", EXACT),
    "gemma2": ({}, "gemma2", "gemma2", TABLE),
    "gemma3": ({}, "gemma3", "gemma3", TABLE),
    "gpt2": ({}, "gpt2", "gpt2", TABLE),
    "phi3": ({}, "phi3", "phi3", EXACT),
}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
ROPES = {
    "linear": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4},
    "llama3": {**LLAMA3, "original_max_position_embeddings": 16, "rope_theta": 1e4},
}
TEXTS = [
    "Hello world, it's 12345 o'clock!\n\n  def f(x):\n\treturn x+1",
    " leading and trailing  ",
    "ünï 日本語 🙂",
    "",
    f"{BEGIN}x{END}{TURN} y",
    "We'LL DON'T 1 22 333 4444\r\n \n x",
    f"masks of {TURN}heads and  neurons   three",
]


def written(source: Path, folder: Path, quantise: str | None = None) -> tuple[list[str], Comparison]:
    """Write a source and run it; the notes, and how it compares."""
    with opened(source) as given:
        assert writer.refuse(given) is None
        folder.mkdir()
        notes = writer.write(given, folder, quantise)
        assert [path.name for path in folder.iterdir()] == [writer.FILE]
        return notes, writer.compare(given, folder, quantise)


def saved(folder: Path, name: str, **settings: Any) -> Path:
    """A model that was not pruned, as transformers saves it."""
    tiny_model(name, torch.float32, **settings).save_pretrained(folder)
    return folder


def field(folder: Path, name: str) -> Any:
    """What the file says under a name; "{arch}" stands for its architecture."""
    reader = gguf.GGUFReader(folder / writer.FILE)
    arch = reader.get_field("general.architecture").contents()
    found = reader.get_field(name.format(arch=arch))
    return None if found is None else found.contents()


@pytest.mark.parametrize(("case", "layout"), [*product(CASES, ["uniform", "free"])])
def test_llama_cpp_gives_the_logits_and_the_text_of_torch(case: str, layout: str, tmp_path: Path) -> None:
    settings, uniform, free, bound = CASES[case]
    make: Callable[..., Path] = halved_export if layout == "uniform" else free_export
    source = make(case.split()[0], tmp_path / "export", **settings)
    notes, compared = written(source, tmp_path / "out")
    assert compared.difference is not None
    assert compared.difference < bound
    assert compared.same_text
    assert field(tmp_path / "out", "general.architecture") == (uniform if layout == "uniform" else free)
    padded = [note for note in notes if "zeros were added" in note]
    square = uniform in ("gpt2", "phi3")  # their attention is as wide as the stream
    assert bool(padded) == (layout == "free" or square)
    if padded and free not in ("deci", "openelm"):
        units = anatomy_of(apt.load_model(source)).num_units()
        missing = []
        for kind in ("heads", "neurons"):
            counts = [count for name, count in units.items() if name.endswith(kind)]
            most = 4 if kind == "heads" and square else max(counts)
            missing.append(sum(most - count for count in counts))
        assert f"zeros were added for {missing[0]} KV heads and {missing[1]} neurons" in padded[0]


def test_a_uniform_run_is_its_own_architecture(tmp_path: Path) -> None:
    notes, compared = written(uniform_export("qwen2", tmp_path / "m"), tmp_path / "out")
    assert field(tmp_path / "out", "general.architecture") == "qwen2"
    assert len(notes) == 1  # no tokenizer
    assert compared.same_text


def test_a_layer_keeps_what_the_output_bias_adds(tmp_path: Path) -> None:
    free_export("llama_bias", tmp_path / "export")
    notes, _ = written(tmp_path / "export", tmp_path / "out")
    assert "zeros were added for 1 KV heads and 32 neurons" in notes[0]
    heads = field(tmp_path / "out", "{arch}.attention.head_count_kv")
    assert min(heads) == 1
    assert len(set(heads)) > 1


@pytest.mark.parametrize("rope", ROPES)
@pytest.mark.parametrize("layout", ["uniform", "free"])
def test_scaled_rotary_embeddings(rope: str, layout: str, tmp_path: Path) -> None:
    make = saved if layout == "uniform" else lambda folder, name, **settings: free_export(name, folder, **settings)
    _, compared = written(make(tmp_path / "m", "llama_gqa", rope_parameters=ROPES[rope]), tmp_path / "out")
    assert compared.difference is not None
    assert compared.difference < EXACT


@pytest.mark.parametrize("name", ["llama_gqa", "qwen3", "gemma3"])
def test_hidden_dimensions_may_be_gone(name: str, tmp_path: Path) -> None:
    model = apt.patch_model(tiny_model(name, torch.float32))
    apply_prune_plan(model, random_plan(model, hidden=True, seed=1))
    _, compared = written(apt.export_model(model, tmp_path / "m"), tmp_path / "out")
    assert compared.difference is not None
    assert compared.difference < (TABLE if name == "gemma3" else EXACT)
    assert compared.same_text
    assert field(tmp_path / "out", "{arch}.embedding_length") < 32


def test_a_window_ends_the_context(tmp_path: Path) -> None:
    notes, compared = written(saved(tmp_path / "m", "mistral", sliding_window=24), tmp_path / "out")
    assert notes[0] == "llama knows no sliding window: the file is the model for up to 24 tokens"
    assert field(tmp_path / "out", "{arch}.context_length") == 24
    assert compared.difference is not None
    assert compared.difference < EXACT
    assert compared.same_text


def test_a_window_shorter_than_a_text_leaves_no_text(tmp_path: Path) -> None:
    _, compared = written(saved(tmp_path / "m", "qwen2_mixed"), tmp_path / "out")
    assert compared.same_text is None
    assert compared.difference is not None
    assert compared.difference < EXACT


def test_a_gemma_may_have_no_window(tmp_path: Path) -> None:
    _, compared = written(saved(tmp_path / "m", "gemma3", layer_types=["full_attention"] * 3), tmp_path / "out")
    assert compared.difference is not None
    assert compared.difference < TABLE


@pytest.mark.parametrize(("name", "layers", "period"), [("gemma2", 46, 2), ("gemma3", 62, 6)])
def test_the_largest_gemmas_scale_their_scores_otherwise(name: str, layers: int, period: int, tmp_path: Path) -> None:
    kinds = ["full_attention" if i % period == period - 1 else "sliding_attention" for i in range(layers)]
    settings = {"num_hidden_layers": layers, "layer_types": kinds, "initializer_range": 0.05}
    _, compared = written(saved(tmp_path / "m", name, **settings), tmp_path / "out")
    assert compared.difference is not None
    assert compared.difference < TABLE
    assert compared.same_text


# The largest difference of a logit of a random model, over the largest: about twice what was measured.
BOUNDS = {"f16": 4e-3, "bf16": 3e-2, "q8_0": 6e-2, "q6_k": 0.2, "q5_0": 0.3, "q5_1": 0.3, "q5_k_m": 0.3, "q5_k_s": 0.3}


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows that blocks of 256 divide."""
    sizes = {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 1, "initializer_range": 0.05}
    return saved(tmp_path_factory.mktemp("wide") / "m", "llama_gqa", **sizes)


@pytest.mark.parametrize("kind", [*types.PLAIN, *types.MIXED])
def test_every_type_is_written_and_near(kind: str, wide: Path, tmp_path: Path) -> None:
    notes, compared = written(wide, tmp_path / "out", kind)
    assert len(notes) == 1  # no tokenizer
    assert compared.difference is not None
    assert compared.difference < BOUNDS.get(kind, EXACT if kind == "f32" else 1.0)
    found = {t.name: t.tensor_type.name.lower() for t in gguf.GGUFReader(tmp_path / "out" / writer.FILE).tensors}
    assert found["blk.0.attn_norm.weight"] == "f32"
    assert found["blk.0.attn_q.weight"] == {"q6_k": "q6_k", "iq4_nl": "iq4_nl"}.get(kind, found["blk.0.attn_q.weight"])
    if kind in types.PLAIN:
        assert found["blk.0.attn_q.weight"] == kind
        assert found["token_embd.weight"] == ("q8_0" if kind in ("q4_0", "q4_1", "q5_0", "q5_1") else kind)


def test_likelihoods_are_those_of_the_numbers_before(wide: Path, tmp_path: Path) -> None:
    ids = torch.randint(3, 60, (40,), generator=torch.Generator().manual_seed(0))
    found = {}
    for kind in ("f32", "f16", "q8_0"):
        written(wide, tmp_path / kind, kind)
        logits = LlamaCpp(tmp_path / kind / writer.FILE, 64).logits(ids.tolist())
        found[kind] = torch.nn.functional.cross_entropy(logits[:-1], ids[1:]).item()
    ours = apt_loss(wide, ids)
    assert abs(found["f32"] - ours) < 1e-5
    assert 0 < abs(found["f16"] - ours) < 1e-2
    assert abs(found["q8_0"] - ours) < 5e-2


@torch.no_grad()
def apt_loss(folder: Path, ids: torch.Tensor) -> float:
    with opened(folder) as source:
        logits = source.model(ids[None]).logits[0]
    return float(torch.nn.functional.cross_entropy(logits[:-1], ids[1:]))


@pytest.mark.parametrize(("kind", "block"), [("q8_0", 32), ("q4_k_m", 256)])
def test_rows_that_no_block_divides_are_told(kind: str, block: int, tmp_path: Path) -> None:
    notes, _ = written(free_export("llama_gqa", tmp_path / "m"), tmp_path / "out", kind)
    matrices = [t for t in gguf.GGUFReader(tmp_path / "out" / writer.FILE).tensors if len(t.shape) > 1]
    ragged = [t for t in matrices if t.shape[0] % block]
    assert ragged
    assert f"{len(ragged)} of {len(matrices)} matrices are not {kind} but " in notes[-1]
    narrow = "round_to=256 avoids it but in the rows of 32, the width of the stream"
    assert notes[-1].endswith("prune with round_to=32 to avoid it" if block == 32 else narrow)
    halves = [t for t in matrices if t.tensor_type.name == "F16"]
    assert len(halves) == sum(bool(t.shape[0] % 32) for t in matrices) > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_numbers_stay_what_they_are(dtype: torch.dtype, tmp_path: Path) -> None:
    free_export("llama_gqa", tmp_path / "m", dtype)
    _, compared = written(tmp_path / "m", tmp_path / "out")
    kinds = {t.tensor_type.name for t in gguf.GGUFReader(tmp_path / "out" / writer.FILE).tensors}
    assert kinds == {"F32", "BF16" if dtype == torch.bfloat16 else "F16"}
    assert compared.difference is not None
    assert compared.difference < 3e-2


TOKENIZERS: dict[str, Callable[[], Any]] = {
    **{name: lambda s=splits, n=name: byte_level(s, begins=n == "llama-bpe") for splits, name in SPLITS.items()},  # type: ignore[misc]
    "bytes, a space ahead": lambda: with_bytes(space_ahead=True),
    "bytes": lambda: with_bytes(space_ahead=False),
}


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_texts_are_cut_into_the_same_tokens(kind: str, tmp_path: Path) -> None:
    tokenizer = TOKENIZERS[kind]()
    saved(tmp_path / "m", "llama_gqa", vocab_size=len(tokenizer) + 3)
    tokenizer.save_pretrained(tmp_path / "m")
    notes, compared = written(tmp_path / "m", tmp_path / "out")
    assert notes == []
    assert f"the same tokens of {len(writer.TEXTS)} texts" in compared.program
    theirs = LlamaCpp(tmp_path / "out" / writer.FILE, 16)
    assert [theirs.tokens(text) for text in TEXTS] == [tokenizer(text).input_ids for text in TEXTS]
    assert field(tmp_path / "out", "tokenizer.chat_template") == CHAT
    assert field(tmp_path / "out", "tokenizer.ggml.eos_token_id") == tokenizer.eos_token_id
    assert field(tmp_path / "out", "tokenizer.ggml.tokens")[-1].startswith("[PAD")


def test_other_tokens_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = TOKENIZERS["bytes, a space ahead"]()
    saved(tmp_path / "m", "llama_gqa", vocab_size=len(tokenizer))
    tokenizer.save_pretrained(tmp_path / "m")
    monkeypatch.setattr("apt.deploy.gguf_tokens._prefix", lambda table: [])
    _, compared = written(tmp_path / "m", tmp_path / "out")
    assert "OTHER TOKENS of" in compared.program


@pytest.mark.parametrize(
    ("tokenizer", "words"),
    [
        (lambda: None, "has no tokenizer.json"),
        (tiny_tokenizer, "a tokenizer of the type WordPiece is not written"),
        (lambda: byte_level([("Digits", True)], begins=False), "no name for how its tokenizer cuts words"),
        (TOKENIZERS["gpt-2"], "tokens, the model 60"),
    ],
)
def test_a_tokenizer_that_has_no_word_is_left_out_and_told(
    tokenizer: Callable[[], Any], words: str, tmp_path: Path
) -> None:
    saved(tmp_path / "m", "llama_gqa")
    if (made := tokenizer()) is not None:
        made.save_pretrained(tmp_path / "m")
    notes, compared = written(tmp_path / "m", tmp_path / "out")
    assert "the file has no tokenizer, it takes and gives token ids: " in notes[0]
    assert words in notes[0]
    assert field(tmp_path / "out", "tokenizer.ggml.model") == "none"
    assert compared.same_text


YARN = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4, "original_max_position_embeddings": 16}


@pytest.mark.parametrize(
    ("name", "settings", "words"),
    [
        ("bert", {}, "bert has no writer here; those of gemma2, gemma3_text, gpt2, llama,"),
        ("llama_cls", {}, "a LlamaForSequenceClassification makes no text"),
        ("llama", {"hidden_act": "relu"}, "an FFN of llama has no activation relu"),
        ("qwen3", {"attention_bias": True}, "qwen3 has no bias of k, o, q, v"),
        ("llama", {"rope_parameters": YARN}, "rotary embeddings of type yarn are not written"),
        ("qwen2", {"rope_parameters": ROPES["llama3"]}, "rotary embeddings of type llama3 are not written"),
        ("phi3_sliding", {}, "no number of heads of 16 features is 32"),
        ("gemma3", {"layer_types": ["sliding_attention"] * 3}, "no word for which of its layers see a window"),
        ("gemma2", {"layer_types": ["full_attention"] * 3}, "no word for which of its layers see a window"),
        ("gemma2", {"tie_word_embeddings": False}, "the head of gemma2 is the embedding"),
        ("gemma3", {"attn_logit_softcapping": 2.0}, "gemma3 has no soft cap of scores"),
        ("gemma3", {"use_bidirectional_attention": True}, "its attention looks ahead"),
    ],
)
def test_what_llama_cpp_cannot_say_is_refused(name: str, settings: dict[str, Any], words: str, tmp_path: Path) -> None:
    with opened(saved(tmp_path / "m", name, **settings)) as source:
        reason = writer.refuse(source)
    assert reason is not None
    assert words in reason


def test_gates_that_depend_on_the_example_are_refused(tmp_path: Path) -> None:
    model = apt.patch_model(tiny_model("llama_gqa", torch.float32), method="dynacsg")
    with opened(apt.export_model(model, tmp_path / "m")) as source:
        reason = writer.refuse(source)
    assert reason is not None
    assert "numbers that llama has no place for" in reason


def test_the_command_writes_checks_and_leaves_nothing_of_a_refusal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    free_export("qwen2", tmp_path / "m")
    out = ["--to", "gguf", "--out", str(tmp_path / "out")]
    assert main(["export", str(tmp_path / "m"), *out, "--quantise", "q8_0", "--check"]) == 0
    told = capsys.readouterr().err
    assert "llama.cpp by cyllama" in told
    made = json.loads((tmp_path / "out/apt_deploy.json").read_text())
    assert (made["format"], made["quantise"]) == ("gguf", "q8_0")
    assert len(made["notes"]) == 3
    assert (tmp_path / "out" / writer.FILE).is_file()
    saved(tmp_path / "bert", "bert")
    assert main(["export", str(tmp_path / "bert"), "--to", "gguf", "--out", str(tmp_path / "none")]) == 2
    assert "export: gguf cannot say" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


def test_the_comparison_sees_one_wrong_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    free_export("llama_gqa", tmp_path / "m")
    monkeypatch.setattr("apt.deploy.gguf_model.in_pairs", lambda tensor, size: tensor)
    _, compared = written(tmp_path / "m", tmp_path / "out")
    assert compared.difference is not None
    assert compared.difference > 1e-2
