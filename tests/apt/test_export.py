"""What a run leaves for others: loads in another process, and anything wrong with it is said in one line."""

import copy
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from check import close
from safetensors.torch import load_file
from tiny_models import GENERATORS, NAMES, fill_adapters, free_heads, random_plan, set_masks, tiny_batch, tiny_model

import apt
import apt.export.write
from apt.export import FORMAT
from apt.files.manifest import MANIFEST
from apt.surgery.prune import apply_prune_plan

ROOT = Path(__file__).parents[2]
CARD, CODE = "apt_export.json", "modeling_apt.py"
IN_ANOTHER_PROCESS = """
import sys
from safetensors.torch import save_file
from export_readings import readings
import apt

folder, *names = sys.argv[1:]
for name in names:
    model = apt.load_model(f"{folder}/{name}")
    assert not any("apt" in type(m).__module__.split(".") for m in model.modules() if "Empty" not in type(m).__name__)
    assert not model.training
    save_file(readings(model, name), f"{folder}/{name}.safetensors")
"""


def readings(model: Any, name: str) -> dict[str, torch.Tensor]:
    """What a user gets out of a model: logits, generated tokens, its size."""
    with torch.no_grad():
        found = {"logits": model(**tiny_batch(name)).logits}
    if name in GENERATORS:
        ids = tiny_batch(name)["input_ids"][::4, :6]
        found["tokens"] = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False)
    return found


def shrunk(name: str, dtype: torch.dtype = torch.float32) -> Any:
    """A patched model with trained adapters after an event; a layer has no heads, another no neurons."""
    model = fill_adapters(apt.patch_model(tiny_model(name, dtype), rank=3))
    empty = [*free_heads(model)[-1:], next(key for key in apt.summary(model).units if key.endswith("neurons"))]
    apply_prune_plan(model, random_plan(model, empty=empty, seed=1))
    return model


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An export of every family, and what another process read from it."""
    folder = tmp_path_factory.mktemp("exports")
    for name in NAMES:
        apt.export_model(shrunk(name), folder / name)
    code = IN_ANOTHER_PROCESS.replace("export_readings", Path(__file__).stem)
    paths = os.pathsep.join(map(str, (ROOT, ROOT / "tests", Path(__file__).parent)))
    command = [sys.executable, "-c", code, str(folder), *NAMES]
    run = subprocess.run(command, env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    return folder


@pytest.fixture
def good(exports: Path, tmp_path: Path) -> Path:
    """A copy of one export, to be spoilt."""
    return Path(shutil.copytree(exports / "llama", tmp_path / "export"))


@pytest.mark.parametrize("name", NAMES)
def test_another_process_reads_the_same_model(name: str, exports: Path) -> None:
    theirs, ours = load_file(exports / f"{name}.safetensors"), readings(shrunk(name), name)
    assert theirs.keys() == ours.keys()
    close("logits", theirs["logits"], ours["logits"])
    if "tokens" in ours:
        assert torch.equal(theirs["tokens"], ours["tokens"])


@pytest.mark.parametrize("name", NAMES)
def test_what_is_loaded_is_small_and_stock(name: str, exports: Path) -> None:
    model, counts = apt.load_model(exports / name), apt.summary(shrunk(name))
    assert type(model) is type(tiny_model(name))
    assert sum(p.numel() for p in model.parameters()) == counts.params_after < counts.params_before
    assert all(p.requires_grad for p in model.parameters())
    card = json.loads((exports / name / CARD).read_text())
    assert card["units"] == counts.units
    assert (card["sparsity"], card["params_after"]) == (counts.sparsity, counts.params_after)
    assert {path.suffix for path in (exports / name).iterdir()} == {".json", ".md", ".py", ".safetensors"}
    stored = load_file(exports / name / "model.safetensors")
    assert sum(tensor.numel() for tensor in stored.values()) == counts.params_after  # tied ones once, no buffers


@pytest.mark.parametrize("method", ["lora", "apt"])
@pytest.mark.parametrize("name", ["bert", "llama", "t5"])
def test_a_loaded_model_is_patched_again(name: str, method: str, exports: Path) -> None:
    model = apt.load_model(exports / name)
    wanted = readings(model, name)
    apt.patch_model(model, method=method)
    close("logits", readings(model, name)["logits"], wanted["logits"])
    model(**tiny_batch(name)).loss.backward()


@pytest.mark.parametrize("method", ["lora", "apt"])
@pytest.mark.parametrize("name", ["bert", "llama_gqa", "t5", "t5_gated"])
def test_an_export_that_lost_no_unit_loads_by_auto_model(name: str, method: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoModelForSequenceClassification

    model = fill_adapters(apt.patch_model(tiny_model(name, torch.float32), method=method))
    apt.export_model(model, tmp_path / "export")
    autos = {"bert": AutoModelForSequenceClassification, "llama_gqa": AutoModelForCausalLM}
    auto: Any = autos.get(name, AutoModelForSeq2SeqLM)
    stock, report = auto.from_pretrained(tmp_path / "export", output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    wanted = readings(model, name)
    for other in (stock.eval(), apt.load_model(tmp_path / "export")):
        for key, value in readings(other, name).items():
            close(key, value.float(), wanted[key].float())


def test_bfloat16_loads_as_stock_does(tmp_path: Path) -> None:
    """Rotary frequencies stay in float32 there, and here."""
    from transformers import AutoModelForCausalLM

    tiny_model("llama", torch.float32).save_pretrained(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.bfloat16).eval()
    apt.export_model(apt.patch_model(model), tmp_path / "export")
    loaded = apt.load_model(tmp_path / "export")
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
    buffers = dict(loaded.named_buffers())
    assert buffers
    assert all(torch.equal(buffers[name], buffer) for name, buffer in model.named_buffers() if name in buffers)
    assert torch.equal(readings(loaded, "llama")["logits"], readings(model, "llama")["logits"])


def test_the_model_in_memory_is_not_changed(tmp_path: Path) -> None:
    model = shrunk("llama_gqa")
    before, config = copy.deepcopy(model.state_dict()), copy.deepcopy(model.config.to_dict())
    wanted = readings(model, "llama_gqa")
    apt.export_model(model, tmp_path / "export")
    assert model.config.to_dict() == config
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    assert torch.equal(readings(model, "llama_gqa")["logits"], wanted["logits"])


@pytest.mark.parametrize("use_cache", [True, False])
def test_use_cache_is_what_it_was_before_the_patch(use_cache: bool, tmp_path: Path) -> None:
    """A Trainer switches it off for the time of training."""
    model = tiny_model("llama", torch.float32)
    model.config.use_cache = use_cache
    apt.patch_model(model).config.use_cache = False
    apt.export_model(model, tmp_path / "export")
    assert model.config.use_cache is False
    assert json.loads((tmp_path / "export/config.json").read_text())["use_cache"] is use_cache
    assert apt.load_model(tmp_path / "export").config.use_cache is use_cache


def edit_card(folder: Path, **changes: Any) -> None:
    card = json.loads((folder / CARD).read_text()) | changes
    (folder / CARD).write_text(json.dumps({key: value for key, value in card.items() if value is not None}))


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def flip_a_byte(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


WEIGHTS = "model.safetensors"
UNITS = [f"layers.{index}.{kind}" for index in range(3) for kind in ("heads", "neurons")]
SPOILT: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no folder": (shutil.rmtree, rf"is not an export of apt; it has no {CARD}"),
    "no card": (
        lambda f: [(f / name).unlink() for name in (CARD, "modeling_apt.py")],
        rf"is not an export of apt; it has no {CARD}",
    ),
    "half a card": (lambda f: (f / CARD).write_text((f / CARD).read_text()[:40]), rf"{CARD} is corrupt"),
    "binary card": (lambda f: (f / CARD).write_bytes(b"\xff\xfe\x00{"), rf"{CARD} is corrupt"),
    "a list for a card": (lambda f: (f / CARD).write_text("[1]"), rf"{CARD} is corrupt \(it holds no names and values"),
    "card without units": (lambda f: edit_card(f, units=None), rf"{CARD} is corrupt"),
    "card without a checksum": (lambda f: edit_card(f, sha256=None), rf"{CARD} is corrupt"),
    "newer format": (
        lambda f: edit_card(f, format=FORMAT + 1, apt_version="9.9"),
        rf"has format {FORMAT + 1}, written by apt-lm 9\.9; .*upgrade",
    ),
    "a prompt of no method": (
        lambda f: edit_card(f, prompt={"method": "charm", "virtual_tokens": 3}),
        rf"{CARD} is corrupt \(prompt is off\)",
    ),
    "unknown class": (
        lambda f: edit_card(f, **{"class": "NoSuchModel"}),
        r"/\w+: transformers \S+ has no class 'NoSuchModel'; upg",
    ),
    "a class that is no model": (lambda f: edit_card(f, **{"class": "Trainer"}), rf"{CARD} is corrupt \(class Trainer"),
    "a number for a class": (lambda f: edit_card(f, **{"class": 5}), rf"{CARD} is corrupt \(class is 5"),
    "units below none": (lambda f: edit_card(f, units=dict.fromkeys(UNITS, -1)), rf"{CARD} is corrupt \(units are"),
    "units in words": (lambda f: edit_card(f, units=dict.fromkeys(UNITS, "2")), rf"{CARD} is corrupt \(units are"),
    "more units than there were": (lambda f: edit_card(f, units=dict.fromkeys(UNITS, 999)), rf"{CARD} is corrupt"),
    "hidden in words": (lambda f: edit_card(f, hidden="31"), rf"{CARD} is corrupt \(hidden is '31'"),
    "no order of heads": (lambda f: edit_card(f, head_order=3), rf"{CARD} is corrupt \(head_order is 3"),
    "heads twice": (lambda f: edit_card(f, head_order={"a": [1, 1]}), rf"{CARD} is corrupt \(head_order of 'a'"),
    "heads turned round": (lambda f: edit_card(f, head_order={"a": [2, 1]}), rf"{CARD} is corrupt \(head_order of 'a'"),
    "heads in fractions": (lambda f: edit_card(f, head_order={"a": [0.0]}), rf"{CARD} is corrupt \(head_order of 'a'"),
    "a million layers": (lambda f: edit_config(f, num_hidden_layers=1000000), r"config\.json: num_hidden_layers must"),
    "a width in words": (lambda f: edit_config(f, hidden_size="32"), r"config\.json: hidden_size must be a whole"),
    "a list for a switch": (lambda f: edit_config(f, use_cache=[]), r"config\.json cannot be read: "),
    "an activation that nobody has": (lambda f: edit_config(f, hidden_act="evil"), r"config\.json makes no \w+: "),
    "other sizes": (lambda f: edit_card(f, units=dict.fromkeys(UNITS, 2)), "does not fit"),
    "fewer layers": (
        lambda f: edit_card(f, units={"layers.0.heads": 1}),
        rf"{CARD} is corrupt \(it lists 1 unit groups\)",
    ),
    "no weights": (lambda f: (f / WEIGHTS).unlink(), rf"{WEIGHTS} is missing; export the model again"),
    "truncated weights": (
        lambda f: os.truncate(f / WEIGHTS, (f / WEIGHTS).stat().st_size - 1000),
        rf"{WEIGHTS} has \d+ of \d+ bytes; it is truncated",
    ),
    "a flipped bit": (lambda f: flip_a_byte(f / WEIGHTS, -500), rf"{WEIGHTS} is corrupt \(its checksum differs\)"),
    "a flipped bit in the header": (lambda f: flip_a_byte(f / WEIGHTS, 20), rf"{WEIGHTS} is corrupt"),
    "no config": (lambda f: (f / "config.json").unlink(), r"config\.json"),
    "half a config": (lambda f: (f / "config.json").write_text('{"model_type": "lla'), r"config\.json"),
}


@pytest.mark.parametrize(("spoil", "words"), SPOILT.values(), ids=SPOILT)
def test_a_spoilt_export_is_refused_in_one_line(spoil: Callable[[Path], Any], words: str, good: Path) -> None:
    """One without the list of its files, as an older version wrote it."""
    (good / MANIFEST).unlink()
    spoil(good)
    with pytest.raises(ValueError, match="load_model: .*" + words) as caught:
        apt.load_model(good)
    assert "\n" not in str(caught.value)


def test_a_folder_that_exists_is_kept_unless_told_otherwise(good: Path) -> None:
    card = (good / CARD).read_text()
    with pytest.raises(ValueError, match=r"export: .* exists; give another folder or overwrite=True"):
        apt.export_model(shrunk("bert"), good)
    assert (good / CARD).read_text() == card
    (good / "note.txt").write_text("of the old export")
    assert apt.export_model(shrunk("bert"), good, overwrite=True) == good
    assert json.loads((good / CARD).read_text())["class"] == "BertForSequenceClassification"
    assert not (good / "note.txt").exists()


def test_units_that_are_masked_only_are_refused(tmp_path: Path) -> None:
    model = apt.patch_model(tiny_model("bert"))
    set_masks(model, random_plan(model, seed=1))
    masked = apt.summary(model).masked
    with pytest.raises(ValueError, match=f"export: {masked} units are masked but not removed yet"):
        apt.export_model(model, tmp_path / "export")
    with pytest.raises(ValueError, match="not patched"):
        apt.export_model(tiny_model("bert"), tmp_path / "export")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("exists", [False, True], ids=["new", "over an old one"])
def test_a_failure_while_saving_leaves_nothing_half_written(
    exists: bool, good: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = good if exists else good.with_name("other")
    model = shrunk("llama")
    model.config.use_cache = False

    def full_disk(*args: Any, **kwargs: Any) -> None:
        raise OSError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(apt.export.write, "save_file", full_disk)
        with pytest.raises(OSError, match="No space left"):
            apt.export_model(model, folder, overwrite=True)
    assert folder.exists() == exists
    if exists:
        apt.load_model(folder)  # the old one still loads
    assert model.config.use_cache is False
    apt.load_model(apt.export_model(model, folder, overwrite=True))
    assert not list(folder.parent.glob("*.partial"))
