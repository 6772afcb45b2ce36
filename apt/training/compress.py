"""A model made smaller without training: calibrate, choose, repair, cut."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from apt.apt_config import APTConfig
from apt.surgery import patch_model, patch_state
from apt.training.controller import Calibration, Controller
from apt.training.controller.calibration import Loss, model_loss, output_entropy

AS_IT_IS: dict[str, Any] = {  # that no training follows
    "method": "lora",
    "prune": True,
    "prune_before_tuning": True,
    "use_self_distillation": False,
}
CHOSEN: dict[str, Any] = {  # on top of the defaults, where nothing else is said
    "repair": "weights",
    "rounds": 3,
    "salience": "fisher",
    "balance": "none",
    "kurtosis": "off",
}


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

    By default units are chosen by the mean squared gradient times the mean squared input, in rounds, on
    `calibration_batches` of the data; the projections that read them are repaired from `moment_batches`. More tokens
    make a better repair: some 40,000 are good. Save the result with `apt.export_model`, or train it on: it has LoRA
    adapters that add nothing yet, and its settings ask for no further cut.

    Args:
        model: of Hugging Face, of a known family, not patched.
        batches: of text like that the model will see; tensors by name, with labels or without, on any device.
        target_sparsity: fraction of the block parameters that goes, [0, 1).
        config: of units, floors and choice; None is what is written above.
        compute_loss: from the model and a batch, to score units by; None: the loss of the model itself where the
            batches have labels, else the entropy of its output.
        settings: leaves of `APTConfig` on top: ``layout="uniform"``, ``unit_types=["neuron"]``, ``rounds=1``, ...

    Returns:
        The model itself, patched and smaller, in evaluation mode.

    Raises:
        ValueError: there is no batch, a setting is wrong, the floors exclude the sparsity, or the family is unknown.
        FloatingPointError: a loss, a score or an input is NaN or infinite.
    """
    chosen = CHOSEN if config is None else {}
    settings = AS_IT_IS | chosen | {"target_sparsity": target_sparsity} | settings
    config = (config or APTConfig()).with_overrides(**settings)
    device = next(model.parameters()).device
    most = max(config.pruning.calibration_batches, config.pruning.moment_batches)
    taken = [_on(device, batch) for batch, _ in zip(batches, range(most), strict=False)]
    if not taken:
        raise ValueError("compress: there is no batch to calibrate on; give some")
    if compute_loss is None:
        labelled = any(name in taken[0] for name in ("labels", "start_positions"))
        compute_loss = model_loss if labelled else output_entropy
    patch_model(model, config)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0)
    calibration = Calibration(lambda _: taken, compute_loss)
    run = Controller(model, optimizer, 1, config, calibration=calibration)
    run.prune_before_tuning(taken, compute_loss)
    run.leave()
    patch_state(model).config = config.with_overrides(target_sparsity=0.0, repair="off", rounds=1)
    return model.eval()


def _on(device: torch.device, batch: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}
