"""Models that are saved or loaded in another way than by export and name: what is said, and to whom."""

import copy
import pickle
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from check import close
from tiny_models import fill_adapters, random_plan, tiny_batch, tiny_model
from transformers import BertForSequenceClassification, Trainer, TrainingArguments

import apt
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
    from safetensors.torch import load_file

    assert not load_file(tmp_path / "twin/model.safetensors")["lm_head.weight"].any()


def test_a_loaded_model_of_a_free_layout_says_that_nobody_can_read_it(tmp_path: Path) -> None:
    model: Any = fill_adapters(apt.patch_model(tiny_model("llama", torch.float32)))
    apply_prune_plan(model, random_plan(model, seed=1))
    apt.export_model(model, tmp_path / "free")
    loaded = apt.load_model(tmp_path / "free")
    with pytest.warns(UserWarning, match=r"nobody can read; save it with apt\.export_model\(apt\.patch_model"):
        loaded.save_pretrained(tmp_path / "again")  # type: ignore[operator]
    with pytest.raises(ValueError, match=r"nobody can read; .*; nothing was saved, as the model is in no variable"):
        apt.load_model(tmp_path / "free").save_pretrained(tmp_path / "none")  # type: ignore[operator]
    apt.export_model(apt.patch_model(loaded, method="lora"), tmp_path / "whole")
    with torch.no_grad():
        batch = tiny_batch("llama")
        close("logits", apt.load_model(tmp_path / "whole")(**batch).logits, model(**batch).logits)
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
    with pytest.raises(ValueError, match="there is no folder someone/bert-small; an export on the hub has to be down"):
        apt.load_model("someone/bert-small")
    (tmp_path / "x/apt_files.json").unlink()  # as a tool that splits weights into shards leaves a folder
    (tmp_path / "x/model.safetensors").rename(tmp_path / "x/model.safetensors.index.json")
    with pytest.raises(ValueError, match="holds its weights in shards, which are not read"):
        apt.load_model("~/x")
