"""Adapters trained apart, in one plain model, beside the mean of the weights taken literally in float64."""

from typing import Any

import pytest
import torch
from check import Unrounded, close
from tiny_models import tiny_batch, tiny_model
from torch import Tensor, nn

import apt
from apt.export.fuse import fuse_adapters
from apt.layers import adapted


def tuned(method: str, seed: int, kind: str = "bert", **settings: Any) -> Any:
    model = apt.patch_model(tiny_model(kind), method=method, rank=2, target_modules=("q", "v"), **settings)
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=draw, dtype=torch.float64))
    return model


def logits(model: Any, kind: str) -> Tensor:
    with torch.no_grad(), Unrounded():
        found = model(**tiny_batch(kind)).logits
    assert isinstance(found, Tensor)
    return found


@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_the_fused_weights_are_the_mean(kind: str) -> None:
    """Of a Spectral-A on the second block of directions and a LoRA, each merged on its own, three to one."""
    models = [tuned("spectral_a", 1, kind, idx=1), tuned("lora", 2, kind)]
    fused = fuse_adapters(models, [3.0, 1.0])
    merged = [apt.unpatch_model(model, merge=True) for model in models]
    expected = tiny_model(kind)
    parts = [model.state_dict() for model in merged]
    expected.load_state_dict({name: 0.75 * parts[0][name] + 0.25 * parts[1][name] for name in parts[0]})
    assert fused.state_dict().keys() == parts[0].keys()
    for name, tensor in fused.state_dict().items():
        close(name, tensor, expected.state_dict()[name])
    close("logits", logits(fused, kind), logits(expected, kind))
    assert (logits(fused, kind) - logits(merged[0], kind)).abs().max() > 1e-3


def test_blocks_of_directions_do_not_overlap() -> None:
    """Rotations of two blocks, averaged: each block of singular values has half of its own adapter's scale."""
    models = [tuned("spectral_r", 1, idx=0), tuned("spectral_r", 2, idx=1)]
    with torch.no_grad():
        for model in models:
            for _, linear in adapted(model):
                if linear.rank:
                    linear.delta.turn_U.zero_()
                    linear.delta.turn_V.zero_()
                    linear.delta.C.fill_(1.5)
    fused = fuse_adapters(models).bert.encoder.layer[0].attention.self.query.weight  # type: ignore[union-attr, index]
    u, s, vh = torch.linalg.svd(tiny_model("bert").bert.encoder.layer[0].attention.self.query.weight)
    s[:4] *= 1.25
    close("weight", fused.detach(), (u @ torch.diag(s) @ vh).detach())


def test_what_cannot_be_averaged_is_refused() -> None:
    with pytest.raises(ValueError, match="at least two models"):
        fuse_adapters([tuned("lora", 1)])
    with pytest.raises(ValueError, match="one weight above 0 for each"):
        fuse_adapters([tuned("lora", 1), tuned("lora", 2)], [1.0, 0.0])
    other: nn.Module = tuned("lora", 2)
    with torch.no_grad():
        other.get_parameter("bert.embeddings.word_embeddings.weight")[3, 3] += 1.0
    with pytest.raises(ValueError, match=r"one base, bert\.embeddings\.word_embeddings\.weight differs"):
        fuse_adapters([tuned("lora", 1), other])
    with pytest.raises(ValueError, match="depends on the example"):
        fuse_adapters([tuned("dynacsg", 1), tuned("dynacsg", 2)])
