"""A model made smaller without training: calibrate, choose, repair, cut."""

import itertools
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from apt.apt_config import APTConfig
from apt.surgery import patch_model, patch_state, unpatch_model
from apt.training.controller import Calibration, Controller
from apt.training.controller.calibration import Loss, model_loss, output_entropy

AS_IT_IS: dict[str, Any] = {  # that no training follows
    "method": "lora",
    "prune": True,
    "prune_before_tuning": True,
    "use_self_distillation": False,
    "target_speedup": None,
}
_CHOSEN: dict[str, Any] = {  # on top of the defaults, where nothing else is said
    "repair": "stream",
    "rounds": 2,
    "calibration_batches": 8,
    "salience": "obs",
    "balance": "none",
    "kurtosis": "off",
}


def chosen_for(unit_types: Sequence[str], repair: str = "weights") -> dict[str, Any]:
    """The settings of a compression of these kinds of units, repaired or "off", where nothing else is said."""
    if repair == "off":
        return {**_CHOSEN, "repair": "off", "rounds": 1, "salience": "fisher"}
    chosen = _CHOSEN if set(unit_types) <= {"head", "neuron"} else {**_CHOSEN, "salience": "fisher"}
    return {**chosen, "repair": "weights"} if "hidden" in unit_types else chosen


def compress(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    target_sparsity: float = 0.3,
    *,
    config: APTConfig | None = None,
    compute_loss: Loss | None = None,
    **settings: Any,
) -> nn.Module:
    """Prune a plain model to a sparsity at once and repair what is left; nothing is trained.

    By default units are chosen by the mean squared gradient times what the other units cannot give back of them, in
    rounds, on `calibration_batches` of the data; the projections that read them are repaired from `moment_batches`,
    then the stream from layer to layer, where layers add to a plain one. More tokens make a better repair: 60,000 are
    good; ``repair="weights"`` leaves the stream out, in half the time on decoders. Save the result with
    `apt.export_model`, or train it on: it has LoRA adapters that add nothing yet, and its settings ask for no further
    cut.

    Args:
        model: of Hugging Face, of a known family, not patched.
        batches: of text like that the model will see; tensors by name, with labels or without, on any device.
        target_sparsity: fraction of the block parameters that goes, [0, 1).
        config: of units, floors and choice; None is what is written above.
        compute_loss: from the model and a batch, to score units by; None: the loss of the model itself where the
            batches have labels, else the entropy of its output.
        settings: leaves of `APTConfig` on top: ``layout="uniform"``, ``unit_types=["neuron"]``, ``rounds=1``, ...;
            with ``target_speedup`` the time of a forward pass is the goal, and the sparsity none.

    Returns:
        The model itself, patched and smaller, in evaluation mode. Where it fails, the model is as it was given.

    Raises:
        ValueError: there is no batch, a setting is wrong, the floors exclude the sparsity, or the family is unknown.
        FloatingPointError: a loss, a score or an input is NaN or infinite.
    """
    if torch.is_inference_mode_enabled():
        raise ValueError("compress: units are scored by gradients; call it outside of torch.inference_mode()")
    config = _settled(config, {"target_sparsity": target_sparsity, **settings})
    device = next(model.parameters()).device
    most = max(config.pruning.calibration_batches, config.pruning.moment_batches)
    taken = [_on(device, batch) for batch in itertools.islice(batches, most)]
    if not taken:
        raise ValueError("compress: there is no batch to calibrate on; give some")
    if compute_loss is None:
        labelled = any(name in taken[0] for name in ("labels", "start_positions"))
        compute_loss = model_loss if labelled else output_entropy
    patch_model(model, config)
    with ExitStack() as undo:
        undo.callback(unpatch_model, model)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0)
        calibration = Calibration(lambda _: taken, compute_loss)
        run = Controller(model, optimizer, 1, config, calibration=calibration)
        run.prune_before_tuning(taken, compute_loss)
        run.leave()
        undo.pop_all()
    no_more = {"target_sparsity": 0.0, "target_speedup": None, "repair": "off", "rounds": 1}
    patch_state(model).config = config.with_overrides(**no_more)
    return model.eval()


def _settled(config: APTConfig | None, settings: dict[str, Any]) -> APTConfig:
    """The settings of a compression. Raises ValueError where one asks for training, or for nothing to go."""
    for name in ("prune", "prune_before_tuning", "use_self_distillation"):
        if settings.get(name, AS_IT_IS[name]) != AS_IT_IS[name]:
            raise ValueError(f"compress: nothing is trained here, so {name}={settings[name]} cannot be; leave it out")
    if settings.get("method") == "apt":
        raise ValueError("compress: ranks of method 'apt' grow in a run; leave method out, or take another")
    chosen: dict[str, Any] = {}
    if config is None:
        units = settings.get("unit_types", APTConfig().pruning.unit_types)
        chosen = chosen_for(units, settings.get("repair", "weights"))
    config = (config or APTConfig()).with_overrides(**(AS_IT_IS | chosen | settings))
    check_asks(config)
    return config


def check_asks(config: APTConfig) -> None:
    """Raise ValueError where nothing is to go."""
    if config.pruning.target_saving == 0.0:
        raise ValueError("compress: nothing is asked to go; give a sparsity above 0 and below 1")


def _on(device: torch.device, batch: Mapping[str, Any]) -> dict[str, Any]:
    if not isinstance(batch, Mapping):
        raise ValueError(
            f"compress: batches are mappings of tensors by name, as the model takes them; got a {type(batch).__name__}"
        )
    return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}
