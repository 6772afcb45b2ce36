"""A damaged checkpoint, adapter or file of weights is not taken without a word, and changes no model first."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from own_loop import Loop, equal_bits, patched
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_models import fill_adapters, tiny_batch, tiny_model
from tiny_run import write_config
from torch import Tensor, nn

import apt
from apt.cli import main
from apt.efficient_finetuning import apply_lora_to_model
from apt.files.manifest import MANIFEST
from apt.methods import svd
from apt.training.checkpoint import load_controller, restore_shapes, save_controller
from apt.training.whole_checkpoints import check_checkpoint

Spoil = Callable[[Path], Any]
DROPPED = {"target_sparsity": 0.6, "num_events": 3, "prune_end": 24, "round_to": 4}  # events after 8, 16 and 24 steps


def flip(path: Path, place: int = -40) -> None:
    """Change one bit of a file."""
    content = bytearray(path.read_bytes())
    content[place] ^= 4
    path.write_bytes(content)


def halve(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def change(path: Path, act: Callable[[dict[str, Tensor]], Any]) -> None:
    """Change the tensors of a safetensors file."""
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    act(tensors)
    save_file(tensors, path, metadata=metadata)


def poison(name: str, value: float = float("nan")) -> Callable[[dict[str, Tensor]], Any]:
    return lambda tensors: tensors[next(key for key in tensors if name in key)].view(-1)[:1].fill_(value)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An unfinished run that was stopped at step 24, with a checkpoint behind its first event, and its config."""
    folder = tmp_path_factory.mktemp("run")
    sections = {"training": {"max_steps": 48, "save_steps": 24, "logging_steps": 50}}
    config = write_config(folder, **sections, evaluation={"event_timing_steps": 0, "inference_repeats": 1})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("apt.runs.run._Bar.on_step_begin", _stop_after(24))
        assert main(["train", str(config)]) == 130
    assert (folder / "run.partial/checkpoints/checkpoint-24").is_dir()
    return folder


def _stop_after(step: int) -> Callable[..., None]:
    def on_step_begin(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == step:
            raise KeyboardInterrupt

    return on_step_begin


FILES = (
    "model.safetensors",
    "optimizer.pt",
    "scheduler.pt",
    "rng_state.pth",
    "apt_state.json",
    "apt_state.safetensors",
)
LISTED: dict[str, tuple[Spoil, str]] = {
    **{f"{name} missing": (lambda f, name=name: (f / name).unlink(), f"{name} is missing") for name in FILES},
    **{f"{name} cut": (lambda f, name=name: halve(f / name), rf"{name} (has \d+ of \d+|is corrupt)") for name in FILES},
    **{f"a bit of {name}": (lambda f, name=name: flip(f / name), f"{name} is corrupt") for name in FILES},
    "a step more": (lambda f: edit(f / "apt_state.json", step=27), "apt_state.json"),
    "no step done": (lambda f: edit(f / "trainer_state.json", global_step=0), "trainer_state.json"),
    "a list that is none": (lambda f: (f / MANIFEST).write_text("[]"), f"{MANIFEST} is corrupt"),
    "a list cut": (lambda f: halve(f / MANIFEST), f"{MANIFEST} is corrupt"),
}
UNLISTED: dict[str, tuple[Spoil, str]] = {  # of a checkpoint that an older version wrote, without a list
    **{
        f"no {name}": (lambda f, name=name: (f / name).unlink(), rf"{name.split('.')[0]}.*is missing")
        for name in FILES[1:4]
    },
    "an adapter less": (
        lambda f: change(f / "model.safetensors", lambda t: t.pop(next(n for n in t if "lora_A" in n))),
        "model.safetensors lacks .*lora_A, which was trained",
    ),
    "the weights of the base": (
        lambda f: change(f / "model.safetensors", lambda t: [t.pop(n) for n in list(t) if "lora_" in n]),
        "model.safetensors lacks .*lora_A, which was trained",
    ),
    "NaN in the weights": (lambda f: change(f / "model.safetensors", poison("lora_A")), "holds a NaN or an infinity"),
    "NaN in the state": (lambda f: change(f / "apt_state.safetensors", poison("salience")), "apt_state.safetensors"),
    "zeros in the state": (
        lambda f: change(f / "apt_state.safetensors", lambda t: [tensor.zero_() for tensor in t.values()]),
        "apt_state.safetensors is not of the moment of apt_state.json",
    ),
    "a step more": (lambda f: edit(f / "apt_state.json", step=27), "are not of one step: apt_state.json tells 27"),
    "no step done": (lambda f: edit(f / "trainer_state.json", global_step=0), "trainer_state.json 0"),
    **{f"{name} cut": (lambda f, name=name: halve(f / name), "corrupt|of the moment") for name in FILES},
}


def resume(run: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """What ``--resume`` says last to a copy of the run, which must refuse it."""
    capsys.readouterr()
    assert main(["train", str(run / "config.yaml"), f"output_dir={folder / 'run'}", "--resume"]) == 2
    told = capsys.readouterr().err
    assert "Traceback" not in told
    line = told.splitlines()[-1].rpartition("apt: error: ")[2]
    assert str(folder / "run.partial/checkpoints/checkpoint-24") in line
    return line


@pytest.mark.parametrize(("spoil", "words"), LISTED.values(), ids=LISTED)
def test_a_damaged_checkpoint_is_refused_by_the_name_of_its_file(
    spoil: Spoil, words: str, run: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "checkpoint-24"
    shutil.copytree(run / "run.partial/checkpoints/checkpoint-24", folder)
    check_checkpoint(folder)
    spoil(folder)
    with pytest.raises(ValueError, match=f"^checkpoint: .*{words}") as caught:
        check_checkpoint(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("spoil", "words"), UNLISTED.values(), ids=UNLISTED)
def test_a_damaged_checkpoint_of_an_older_version_is_refused(
    spoil: Spoil, words: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import re

    shutil.copytree(run / "run.partial", tmp_path / "run.partial")
    folder = tmp_path / "run.partial/checkpoints/checkpoint-24"
    (folder / MANIFEST).unlink()
    spoil(folder)
    assert re.search(words, resume(run, tmp_path, capsys))


@pytest.fixture(scope="module")
def loop_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of a loop after 12 steps, behind an event."""
    return apt.save_checkpoint(
        Loop("bert", patched("bert"), 30, **DROPPED).take(12).run, tmp_path_factory.mktemp("l") / "c"
    )


LOOP_FILES = ("apt_run.json", "apt_state.json", "apt_state.safetensors", "model.safetensors", "optimizer.safetensors")


@pytest.mark.parametrize("name", LOOP_FILES)
@pytest.mark.parametrize("spoil", [Path.unlink, halve, flip], ids=["missing", "cut", "a bit"])
@pytest.mark.parametrize("listed", [True, False])
def test_a_damaged_checkpoint_of_a_loop_is_refused(
    name: str, spoil: Spoil, listed: bool, loop_folder: Path, tmp_path: Path
) -> None:
    if not listed and spoil is flip and name in ("model.safetensors", "optimizer.safetensors", "apt_run.json"):
        pytest.skip("an older version left nothing to tell it by")
    folder = tmp_path / "checkpoint"
    shutil.copytree(loop_folder, folder)
    spoil(folder / name)
    if not listed:
        (folder / MANIFEST).unlink()
    other = Loop("bert", patched("bert"), 0)
    with pytest.raises((ValueError, FileNotFoundError), match=r"^checkpoint: ") as caught:
        apt.resume_checkpoint(folder, other.model, other.optimizer, **DROPPED)
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["torch", "numpy", "python"])
def test_a_random_state_that_is_none_is_refused_before_anything_changes(
    kind: str, loop_folder: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "checkpoint"
    shutil.copytree(loop_folder, folder)
    (folder / MANIFEST).unlink()
    states = json.loads((folder / "apt_run.json").read_text())["random"]
    edit(folder / "apt_run.json", random={**states, kind: states[kind][:-1]})
    other = Loop("bert", patched("bert"), 0)
    with pytest.raises(ValueError, match=r"^checkpoint: .*apt_run\.json is corrupt \(random: "):
        apt.resume_checkpoint(folder, other.model, other.optimizer, **DROPPED)
    assert equal_bits(other.model, patched("bert"))


@pytest.mark.parametrize("steps", [(5, 3), (9, 3)], ids=["no event between", "an event between"])
def test_a_controller_saved_over_another_and_stopped_halfway_is_seen(steps: tuple[int, int], tmp_path: Path) -> None:
    """By the parts that `apt.checkpoint` had: the second save wrote its tensors, and was killed."""
    loop = Loop("bert", patched("bert"), 30, **DROPPED).take(steps[0])
    save_controller(loop.run, tmp_path)
    old = (tmp_path / "apt_state.json").read_bytes()
    save_controller(loop.take(steps[1]).run, tmp_path)
    (tmp_path / "apt_state.json").write_bytes(old)
    model = patched("bert")
    with pytest.raises(ValueError, match=r"apt_state.safetensors is not of the moment of apt_state.json; the save was"):
        restore_shapes(model, tmp_path)
    assert equal_bits(model, patched("bert"))
    with pytest.raises(ValueError, match="is not of the moment"):
        load_controller(Loop("bert", patched("bert"), 30, **DROPPED).run, tmp_path)


def lora_model() -> Any:
    return apt.patch_model(tiny_model("bert", torch.float32), method="lora", rank=3, target_modules=("q", "v"))


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapter") / "a"
    return apt.save_adapter(fill_adapters(lora_model(), 0.2), folder, compact=True)


ADAPTER = "adapter_model.safetensors"
PREFIX = "base_model.model."
FROZEN = f"{PREFIX}bert.embeddings.word_embeddings.weight"


def narrow_last_b(tensors: dict[str, Tensor]) -> None:
    name = sorted(key for key in tensors if "lora_B" in key)[-1]
    tensors[name] = tensors[name][:, :2].contiguous()


BAD_ADAPTERS: dict[str, tuple[Spoil, str]] = {
    "a frozen weight": (
        lambda f: change(
            f / ADAPTER,
            lambda t: t.update({FROZEN: torch.ones(tiny_model("bert").bert.embeddings.word_embeddings.weight.shape)}),
        ),
        "word_embeddings.weight, which is frozen in the model",
    ),
    "no tensors": (lambda f: save_file({}, f / ADAPTER), "holds no tensor"),
    "whole numbers": (
        lambda f: change(
            f / ADAPTER, lambda t: t.update({n: x.to(torch.int64) for n, x in t.items() if "lora_A" in n})
        ),
        "holds torch.int64",
    ),
    "NaN": (lambda f: change(f / ADAPTER, poison("lora_A")), "holds a NaN"),
    "infinity": (lambda f: change(f / ADAPTER, poison("lora_B", float("inf"))), "an infinity"),
    "another rank of the last B": (lambda f: change(f / ADAPTER, narrow_last_b), r"is corrupt \(A of .* is \[3, "),
    "no B": (lambda f: change(f / ADAPTER, lambda t: [t.pop(n) for n in list(t) if "lora_B" in n]), "lacks lora_B of"),
    "cut": (lambda f: halve(f / ADAPTER), "is corrupt, or no safetensors file"),
    "NaN for alpha": (lambda f: edit(f / "adapter_config.json", lora_alpha=float("nan")), "lora_alpha of .* is nan"),
    "no alpha": (lambda f: edit(f / "adapter_config.json", lora_alpha=None), "lora_alpha of .* is None, no number"),
    "a list": (lambda f: (f / "adapter_config.json").write_text("[]"), "holds no names and values"),
    "no expression": (lambda f: edit(f / "adapter_config.json", alpha_pattern={"(": 3}), "is no regular expression"),
    "one without end": (
        lambda f: edit(f / "adapter_config.json", alpha_pattern={r"(\w+\.?)+!": 3}),
        "could be searched for without end",
    ),
}


@pytest.mark.parametrize(("spoil", "words"), BAD_ADAPTERS.values(), ids=BAD_ADAPTERS)
@pytest.mark.parametrize("listed", [True, False])
def test_a_damaged_adapter_is_refused_and_changes_nothing(
    spoil: Spoil, words: str, listed: bool, adapter: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "adapter"
    shutil.copytree(adapter, folder)
    spoil(folder)
    if not listed:
        (folder / MANIFEST).unlink()
    model = lora_model()
    with pytest.raises(ValueError, match=f"^load_adapter: {folder}.*{words if not listed else ''}") as caught:
        apt.load_adapter(model, folder)
    assert "\n" not in str(caught.value)
    assert equal_bits(model, lora_model())


@pytest.mark.parametrize(
    ("act", "words"),
    [
        (poison("lora_A"), "holds a NaN"),
        *(
            (lambda t, d=dtype: t.update({n: x.to(d) for n, x in t.items() if "lora_A" in n}), f"holds {dtype}")
            for dtype in (torch.int32, torch.bool, torch.float8_e4m3fn)
        ),
        (lambda t: [x.mul_(2) for n, x in t.items() if "lora_B" in n], "its checksum differs"),
    ],
    ids=["NaN", "int", "bool", "float8", "other numbers"],
)
@pytest.mark.parametrize("summed", [True, False])
def test_damaged_weights_of_the_manager_are_refused(act: Any, words: str, summed: bool, tmp_path: Path) -> None:
    model = apply_lora_to_model(tiny_model("bert", torch.float32), ["q", "v"], rank=3)
    for parameter in model.get_trainable_parameters():
        nn.init.normal_(parameter)
    path = tmp_path / "weights.safetensors"
    model.save_efficient_weights(path)
    change(path, act)
    if not summed:
        if "checksum" in words:
            pytest.skip("an older version left nothing to tell it by")
        with safe_open(path, "pt") as file:
            metadata = file.metadata()
        metadata.pop("content_sha256")
        save_file(load_file(path), path, metadata=metadata)
    other = apply_lora_to_model(tiny_model("bert", torch.float32), ["q", "v"], rank=3)
    before = {name: tensor.clone() for name, tensor in other.model.state_dict().items()}
    with pytest.raises(ValueError, match=f"load_efficient_weights: .*{'' if summed else words}"):
        other.load_efficient_weights(path)
    assert all(torch.equal(tensor, before[name]) for name, tensor in other.model.state_dict().items())


@pytest.mark.parametrize(
    "spoil",
    [
        lambda path: change(path, lambda t: t["U"].zero_()),
        lambda path: change(path, poison("S")),
        lambda path: change(path, lambda t: t.pop("S")),
        halve,
        flip,
        lambda path: save_file(load_file(path), path),
    ],
    ids=["U zeros", "NaN in S", "no S", "cut", "a bit", "of an older version"],
)
def test_a_damaged_decomposition_is_made_again(
    spoil: Spoil, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weight = torch.randn(256, 256, generator=torch.Generator().manual_seed(0))
    first = svd.singular_triplets(weight, 4, str(tmp_path))
    (path,) = tmp_path.iterdir()
    spoil(path)
    again = svd.singular_triplets(weight, 4, str(tmp_path))
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(again, first, strict=True))
    assert f"the decomposition kept in {path} is read no more" in capsys.readouterr().err
    svd.singular_triplets(weight, 4, str(tmp_path))
    assert not capsys.readouterr().err


def test_the_decomposition_of_another_weight_is_made_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights = torch.randn(2, 256, 256, generator=torch.Generator().manual_seed(0))
    first = svd.singular_triplets(weights[0], 4, str(tmp_path))
    (path,) = tmp_path.iterdir()
    svd.singular_triplets(weights[1], 4, str(tmp_path))
    (other,) = set(tmp_path.iterdir()) - {path}
    shutil.copy(other, path)
    again = svd.singular_triplets(weights[0], 4, str(tmp_path))
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(again, first, strict=True))
    assert "is read no more" in capsys.readouterr().err


GATES = "apt_gates.safetensors"


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (
            lambda p: change(p, lambda t: t.update({n: x[:, :1].clone() for n, x in t.items() if n.endswith(".U")})),
            "U is",
        ),
        (lambda p: change(p, lambda t: [t.pop(n) for n in list(t) if n.endswith(".U")]), "U is missing"),
        (lambda p: change(p, poison(".Vh")), "holds a NaN"),
        (flip, ""),
        (lambda p: change(p, lambda t: [x.mul_(1.5) for x in t.values()]), ""),
    ],
    ids=["U cut", "no U", "NaN", "a bit", "of another run"],
)
@pytest.mark.parametrize("listed", [True, False])
def test_damaged_gates_are_refused(spoil: Spoil, words: str, listed: bool, tmp_path: Path) -> None:
    model = apt.patch_model(
        tiny_model("bert", torch.float32), method="dynacsg", rank=3, hyper_params=500, svd_cache=None, gate_alpha=2.0
    )
    folder = apt.export_model(model, tmp_path / "export")
    spoil(folder / GATES)
    if not listed:
        if not words:
            pytest.skip("an older version left nothing to tell it by")
        (folder / MANIFEST).unlink()
    with pytest.raises(ValueError, match=f"load_model: .*{GATES} .*{words if not listed else ''}"):
        apt.load_model(folder)


@pytest.mark.parametrize("called", [[], ["after_backward"], ["after_step"]], ids=["neither", "the first", "the second"])
def test_a_loop_that_forgot_the_controller_is_told_at_the_export(called: list[str], tmp_path: Path) -> None:
    model = patched("bert")
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    run = apt.Controller(model, optimizer, 30, **DROPPED)
    for seed in range(10):
        run.loss(model(**tiny_batch("bert", seed=seed))).backward()
        if "after_backward" in called:
            run.after_backward()
        optimizer.step()
        if "after_step" in called:
            run.after_step()
        optimizer.zero_grad()
    assert not run.events
    with pytest.warns(UserWarning, match=r"export: an event is still to come, after step 8: .* run\.after_step\(\)"):
        apt.export_model(model, tmp_path / "export")


def test_an_optimizer_of_another_model_is_refused() -> None:
    model, other = patched("bert"), patched("bert")
    optimizer = torch.optim.AdamW([p for p in other.parameters() if p.requires_grad], lr=1e-3)
    with pytest.raises(ValueError, match="controller: the optimizer holds none of the parameters of this model that"):
        apt.Controller(model, optimizer, 30, **DROPPED)


@pytest.mark.parametrize("setting", [{"scale": float("nan")}, {"scale": 0.0}, {"l1_weight": float("inf")}], ids=str)
def test_a_setting_that_means_nothing_is_refused(setting: dict[str, float]) -> None:
    (name,) = setting
    with pytest.raises(ValueError, match=f"config: {name} must "):
        apt.patch_model(tiny_model("bert"), **setting)
