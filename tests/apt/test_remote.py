"""A free export as anybody reads it: by transformers alone, with the code that lies in its folder."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from exported import free_export
from tiny_models import GENERATORS, NAMES, SEQ2SEQ, fill_adapters, has_hidden_table, random_plan, tiny_batch, tiny_model

import apt
from apt.export.remote import remote_class
from apt.surgery.prune import apply_prune_plan

WITH_HIDDEN = [name for name in ("bert", "llama_gqa", "t5") if has_hidden_table(name)]
WITHOUT_US = """
import json, sys

class Hidden:  # the package is not installed
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("apt", "apt_kernels", "apt_lm"):
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Hidden())
import torch, transformers
from safetensors.torch import load_file, save_file

folder = sys.argv[1]
found = {}
for name, auto in json.loads(sys.argv[2]).items():
    model = getattr(transformers, auto).from_pretrained(f"{folder}/{name}", trust_remote_code=True).eval()
    with torch.no_grad():
        found[name] = model(**load_file(f"{folder}/{name}.batch")).logits.clone()
assert "apt" not in sys.modules
save_file(found, f"{folder}/found.safetensors")
"""


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("remote")
    for name in NAMES:
        free_export(name, folder / name)
    return folder


def load(folder: Path, auto: str | None = None) -> Any:
    kind = getattr(transformers, auto or str(remote_class(folder)))
    return kind.from_pretrained(folder, trust_remote_code=True).eval()


@torch.no_grad()
def logits(model: Any, name: str) -> torch.Tensor:
    found: torch.Tensor = model(**tiny_batch(name)).logits
    return found


def test_where_this_package_is_not_installed_logits_are_the_same(exports: Path) -> None:
    from safetensors.torch import load_file, save_file

    for name in NAMES:
        save_file(tiny_batch(name), exports / f"{name}.batch")
    classes = json.dumps({name: remote_class(exports / name) for name in NAMES})
    command = [sys.executable, "-c", WITHOUT_US, str(exports), classes]
    subprocess.run(command, cwd=exports, check=True, capture_output=True, text=True)
    found = load_file(exports / "found.safetensors")
    for name in NAMES:
        assert torch.equal(found[name], logits(apt.load_model(exports / name), name)), name


@pytest.mark.parametrize("name", GENERATORS)
def test_text_is_the_same_with_a_cache_and_without(name: str, exports: Path) -> None:
    ids = tiny_batch(name)["input_ids"][:1, :6]
    asked = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    model = load(exports / name)
    wanted = apt.load_model(exports / name).generate(ids, **asked)
    assert torch.equal(model.generate(ids, **asked), wanted)
    if name not in SEQ2SEQ:
        assert torch.equal(model.generate(ids, use_cache=False, **asked), wanted)


@pytest.mark.parametrize("name", ["bert", "llama_cls", "gpt2", "t5", "phi3"])
def test_the_model_without_its_head_is_loaded_too(name: str, exports: Path) -> None:
    batch = {key: value for key, value in tiny_batch(name).items() if key != "labels"}
    if name in SEQ2SEQ:
        batch["decoder_input_ids"] = batch["input_ids"][:, :3]
    whole = apt.load_model(exports / name)
    body = whole if name in SEQ2SEQ else whole.base_model
    with torch.no_grad():
        output = body(**batch, output_hidden_states=True)
        wanted = output.decoder_hidden_states[-1] if name in SEQ2SEQ else output.last_hidden_state
        found = load(exports / name, "AutoModel")(**batch).last_hidden_state
    assert torch.equal(found, wanted)


@pytest.mark.parametrize("name", WITH_HIDDEN)
def test_hidden_dimensions_that_went_are_said(name: str, tmp_path: Path) -> None:
    kinds = ["head", "neuron", "hidden"]
    model = fill_adapters(apt.patch_model(tiny_model(name, torch.float32), rank=3, unit_types=kinds))
    apply_prune_plan(model, random_plan(model, hidden=True, seed=1))
    folder = apt.export_model(model, tmp_path / "small")
    assert torch.equal(logits(load(folder), name), logits(apt.load_model(folder), name))


@pytest.mark.parametrize("name", ["bert", "llama_gqa", "t5"])
def test_what_was_loaded_so_can_be_saved_and_loaded_again(name: str, exports: Path, tmp_path: Path) -> None:
    model = load(exports / name)
    model.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again/modeling_apt.py").exists()
    assert torch.equal(logits(load(tmp_path / "again"), name), logits(model, name))


@pytest.mark.parametrize("name", ["bert", "gpt2", "t5"])
def test_it_trains(name: str, exports: Path) -> None:
    """Its gradients are those of our model."""
    grads = []
    for model in (load(exports / name), apt.load_model(exports / name)):
        model(**tiny_batch(name)).loss.backward()
        grads.append({key: p.grad for key, p in model.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys()
    assert all(torch.equal(grads[0][key], grads[1][key]) for key in grads[0])


@pytest.mark.parametrize("name", ["bert", "llama_gqa", "phi3", "t5"])
def test_it_is_patched_and_exported_by_us_as_what_we_load_is(name: str, exports: Path, tmp_path: Path) -> None:
    model = load(exports / name)
    wanted = logits(model, name)
    again = apt.export_model(apt.patch_model(model, rank=3), tmp_path / "again")
    assert torch.equal(logits(apt.load_model(again), name), wanted)
    assert torch.equal(logits(load(again), name), wanted)


@pytest.mark.parametrize("name", ["llama_gqa", "t5"])
def test_it_is_pruned_again(name: str, exports: Path) -> None:
    found = []
    for model in (load(exports / name), apt.load_model(exports / name)):
        apt.patch_model(model, rank=3)
        apply_prune_plan(model, random_plan(model, seed=4))
        found.append(logits(model.eval(), name))
    assert torch.equal(*found)


def test_a_pipeline_takes_the_folder(exports: Path, tmp_path: Path) -> None:
    from tiny_run import tiny_tokenizer

    tiny_tokenizer().save_pretrained(exports / "bert")
    ask = transformers.pipeline("text-classification", str(exports / "bert"), trust_remote_code=True)
    assert {"label", "score"} == ask("good")[0].keys()


@pytest.mark.parametrize("name", ["bert", "llama_gqa"])
def test_the_entries_of_the_folder_do_not_go_on_with_the_model(name: str, exports: Path, tmp_path: Path) -> None:
    """What is loaded by us, tuned or unpruned anew, says nothing of sizes that it no longer has."""
    model = apt.load_model(exports / name)
    assert not {"apt", "auto_map"} & vars(model.config).keys()
    again = apt.export_model(fill_adapters(apt.patch_model(model, rank=3)), tmp_path / "again")
    assert torch.equal(logits(load(again), name), logits(apt.load_model(again), name))


def test_a_stock_export_has_no_code(tmp_path: Path) -> None:
    folder = apt.export_model(apt.patch_model(tiny_model("bert", torch.float32)), tmp_path / "whole")
    assert remote_class(folder) is None
    assert not (folder / "modeling_apt.py").exists()
    assert not {"apt", "auto_map"} & json.loads((folder / "config.json").read_text()).keys()


def test_the_card_says_both_ways(exports: Path) -> None:
    card = (exports / "llama_gqa/README.md").read_text()
    assert "AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)" in card
    assert "apt.load_model(folder)" in card


def test_a_prompt_is_more_than_smaller_layers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from apt.cli import main

    model = apt.patch_model(tiny_model("llama_gqa", torch.float32), method="prefix_tuning")
    folder = apt.export_model(model, tmp_path / "prefix")
    assert remote_class(folder) is None
    assert main(["export", str(folder), "--to", "hf-remote", "--out", str(tmp_path / "remote")]) == 2
    assert "a stock configuration has no virtual tokens, so it is more than smaller layers" in capsys.readouterr().err
    assert not (tmp_path / "remote").exists()


@pytest.mark.parametrize("name", ["llama_gqa", "bert"])
def test_the_format_leaves_out_what_we_alone_read(
    name: str, exports: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from apt.cli import main

    command = ["export", str(exports / name), "--to", "hf-remote", "--out", str(tmp_path / "remote"), "--check"]
    assert main(command) == 0
    assert "logits within 0.0e+00 of the largest" in capsys.readouterr().err
    assert not (tmp_path / "remote/apt_export.json").exists()
    assert torch.equal(logits(load(tmp_path / "remote"), name), logits(apt.load_model(exports / name), name))
