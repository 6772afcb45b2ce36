"""Models that are saved or loaded in another way than by export and name: what is said, and to whom."""

import copy
import json
import pickle
import warnings
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
import transformers
from check import close
from safetensors.torch import load_file, save_file
from tiny_models import fill_adapters, random_plan, tiny_batch, tiny_model
from transformers import BertForSequenceClassification, Trainer, TrainingArguments

import apt
from apt.export.remote import remote_class
from apt.surgery.prune import apply_prune_plan

SAYS = r"this model is patched, so only apt can read what save_pretrained writes.*apt\.export_model"


class Mine(BertForSequenceClassification):
    """A class of a user."""


class Other(BertForSequenceClassification):
    """Another one."""


def patched(name: str = "bert", **settings: Any) -> Any:
    return fill_adapters(apt.patch_model(tiny_model(name, torch.float32), method="lora", **settings))


@pytest.mark.parametrize("name", ["bert", "gpt2", "phi3"])  # the last two lie in fused projections
def test_save_pretrained_of_a_patched_model_names_export_model(name: str, tmp_path: Path) -> None:
    model = patched(name)
    with pytest.warns(UserWarning, match=SAYS):
        model.save_pretrained(tmp_path / "saved")
    with pytest.warns(UserWarning, match=SAYS):
        Trainer(model, TrainingArguments(str(tmp_path / "run"), use_cpu=True)).save_model(str(tmp_path / "by_trainer"))
    assert (tmp_path / "saved/model.safetensors").exists()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model.save_pretrained(tmp_path / "run/checkpoint-7")  # as a Trainer does, which reads it into the same model
        apt.unpatch_model(model, merge=True).save_pretrained(tmp_path / "merged")


def by_pickle(model: Any) -> Any:
    return pickle.loads(pickle.dumps(model))


@pytest.mark.parametrize("how", [copy.deepcopy, by_pickle])
def test_a_copy_saves_itself(how: Any, tmp_path: Path) -> None:
    model = patched("llama")
    twin = how(model)
    with torch.no_grad():
        twin.lm_head.weight.zero_()
    with pytest.warns(UserWarning, match=SAYS):
        twin.save_pretrained(tmp_path / "twin")
    assert not load_file(tmp_path / "twin/model.safetensors")["lm_head.weight"].any()


@pytest.mark.parametrize("name", ["bert", "llama_gqa", "gpt2", "t5", "phi3"])
def test_a_loaded_model_of_a_free_layout_is_saved_so_that_it_is_read_again(name: str, tmp_path: Path) -> None:
    """By us and by transformers, after training too, and in shards."""
    model: Any = fill_adapters(apt.patch_model(tiny_model(name, torch.float32)))
    apply_prune_plan(model, random_plan(model, seed=1))
    loaded: Any = apt.load_model(apt.export_model(model, tmp_path / "free"))
    with torch.no_grad():
        for parameter in loaded.parameters():
            parameter.mul_(1.01)
        wanted = loaded(**tiny_batch(name)).logits
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="apt: ")
        loaded.save_pretrained(tmp_path / "again", max_shard_size="20kB")
    assert len(list((tmp_path / "again").glob("*.safetensors"))) > 1
    assert not {"apt", "auto_map"} & vars(loaded.config).keys()
    again: Any = apt.load_model(tmp_path / "again")
    assert type(again) is type(loaded)
    stock: Any = getattr(transformers, str(remote_class(tmp_path / "again")))
    theirs = stock.from_pretrained(tmp_path / "again", trust_remote_code=True)
    apt.unpatch_model(apt.patch_model(again)).save_pretrained(tmp_path / "thrice")
    with torch.no_grad():
        for one in (again, theirs, apt.load_model(tmp_path / "thrice")):
            assert torch.equal(one(**tiny_batch(name)).logits, wanted)
    whole = apt.export_model(apt.patch_model(again, method="lora"), tmp_path / "whole")
    with torch.no_grad():
        close("logits", apt.load_model(whole)(**tiny_batch(name)).logits, wanted)


def test_a_loaded_model_without_code_says_that_nobody_can_read_it(tmp_path: Path) -> None:
    model: Any = fill_adapters(apt.patch_model(tiny_model("llama", torch.float32)))
    apply_prune_plan(model, random_plan(model, seed=1))
    folder = apt.export_model(model, tmp_path / "free")
    with pytest.raises(ValueError, match="the model is in no variable, so it is gone; nothing was saved"):
        apt.load_model(folder).save_pretrained(tmp_path / "none")  # type: ignore[operator]
    for name in ("modeling_apt.py", "apt_files.json"):  # as a version before wrote it
        (folder / name).unlink()
    loaded = apt.load_model(folder)
    with pytest.warns(UserWarning, match=r"nobody can read; save it with apt\.export_model\(apt\.patch_model"):
        loaded.save_pretrained(tmp_path / "again")  # type: ignore[operator]
    apt.export_model(patched("llama"), tmp_path / "dense")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        apt.load_model(tmp_path / "dense").save_pretrained(tmp_path / "plain")  # type: ignore[operator]


@pytest.mark.parametrize("merge", [True, False])
@pytest.mark.parametrize("name", ["bert", "llama", "gpt2", "t5"])
def test_a_pruned_model_without_its_adapters_says_so_too(name: str, merge: bool, tmp_path: Path) -> None:
    """Until it is exported, whatever comes between; one that lost nothing saves without a word."""
    dense: Any = apt.unpatch_model(apt.patch_model(tiny_model(name, torch.float32)), merge=merge)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        dense.save_pretrained(tmp_path / "dense")
    model: Any = fill_adapters(apt.patch_model(tiny_model(name, torch.float32)))
    apply_prune_plan(model, random_plan(model, seed=1))
    apt.unpatch_model(model, merge=merge)
    says = (
        r"lost units that its configuration still counts.*apt\.export_model\(apt\.patch_model\(model, method='lora'\)"
    )
    with pytest.warns(UserWarning, match=says):
        model.save_pretrained(tmp_path / "small")
    full: Any = apt.patch_model(copy.deepcopy(model), method="full")
    with pytest.warns(UserWarning, match=says):
        full.save_pretrained(tmp_path / "full")
    with pytest.warns(UserWarning, match=SAYS):
        apt.patch_model(model, method="lora").save_pretrained(tmp_path / "again")  # type: ignore[operator]
    apt.export_model(model, tmp_path / "export")
    with pytest.warns(UserWarning, match=says):
        apt.unpatch_model(model).save_pretrained(tmp_path / "small")  # type: ignore[operator]
    with torch.no_grad():
        close(
            "logits", apt.load_model(tmp_path / "export")(**tiny_batch(name)).logits, model(**tiny_batch(name)).logits
        )


def test_a_class_of_ones_own_is_given_to_load_model(tmp_path: Path) -> None:
    model = fill_adapters(apt.patch_model(Mine(tiny_model("bert").config).float().eval()))
    apply_prune_plan(model, random_plan(model, seed=1))
    apt.export_model(model, tmp_path / "mine")
    with pytest.raises(ValueError, match=r"no class 'Mine'; upgrade .*: load_model\(folder, model_class=Mine\)"):
        apt.load_model(tmp_path / "mine")
    with pytest.raises(ValueError, match="the export is of class 'Mine', not 'Other'; give that one"):
        apt.load_model(tmp_path / "mine", model_class=Other)
    loaded = apt.load_model(tmp_path / "mine", model_class=Mine)
    assert type(loaded) is Mine
    with torch.no_grad():
        close("logits", loaded(**tiny_batch("bert")).logits, model(**tiny_batch("bert")).logits)


def test_where_an_export_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert apt.export_model(patched(), "~/x") == tmp_path / "x"
    apt.load_model("~/x")
    with pytest.raises(ValueError, match="there is no folder someone/bert-small, and the hub gives none: "):
        apt.load_model("someone/bert-small")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **rules: str(tmp_path / "x"))
    close("logits", logits_of(apt.load_model("someone/bert-small")), logits_of(apt.load_model("~/x")))


@torch.no_grad()
def logits_of(model: Any) -> torch.Tensor:
    found: torch.Tensor = model(**tiny_batch("bert")).logits.float()
    return found


def test_an_export_in_shards(tmp_path: Path) -> None:
    """As a tool that splits weights leaves a folder; a shard that is cut, or lacks what the index says, is named."""
    folder = apt.export_model(patched(), tmp_path / "x")
    wanted = logits_of(apt.load_model(folder))
    state = load_file(folder / "model.safetensors")
    split = huggingface_hub.split_torch_state_dict_into_shards(state, max_shard_size="20kB")
    for name, tensors in split.filename_to_tensors.items():
        save_file({key: state[key] for key in tensors}, folder / name)
    for name in ("model.safetensors", "apt_files.json"):
        (folder / name).unlink()
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": split.tensor_to_filename}))
    close("logits", logits_of(apt.load_model(folder)), wanted)
    name, shard = next(iter(split.tensor_to_filename.items()))
    save_file({key: state[key] for key in split.filename_to_tensors[shard] if key != name}, folder / shard)
    with pytest.raises(ValueError, match=f"{shard} lacks {name}; copy or export it again"):
        apt.load_model(folder)
    index.write_text(json.dumps({"weight_map": {name: "../elsewhere.safetensors"}}))
    with pytest.raises(ValueError, match=r"is corrupt \(no list of shards\)"):
        apt.load_model(folder)


def test_a_model_is_loaded_in_a_type_and_onto_a_device(tmp_path: Path) -> None:
    folder = apt.export_model(patched(), tmp_path / "x")
    whole = logits_of(apt.load_model(folder))
    for dtype in ("bfloat16", torch.bfloat16):
        half = apt.load_model(folder, dtype=dtype)
        assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
        assert (logits_of(half) - whole).abs().max() < 0.05 * whole.abs().max()
    for device_map in ("cpu", torch.device("cpu"), "auto", {"": "cpu"}):
        assert torch.equal(logits_of(apt.load_model(folder, device_map=device_map)), whole)
    assert {p.device.type for p in apt.load_model(folder, device_map="meta").parameters()} == {"meta"}
    for wrong in ("int8", "bf16", torch.int8, 16):
        with pytest.raises(ValueError, match="dtype is a floating-point type of torch, got "):
            apt.load_model(folder, dtype=wrong)
