"""P-tuning and prefix tuning beside PEFT's own, with the same numbers copied over."""

import copy
from typing import Any

import pytest
import torch
from check import close
from peft import PrefixTuningConfig, PromptEncoderConfig, get_peft_model
from tiny_models import tiny_batch, tiny_model
from torch import nn

import apt

TASKS = {"bert": "SEQ_CLS", "roberta": "SEQ_CLS", "llama_gqa": "CAUSAL_LM", "gpt2": "CAUSAL_LM", "opt": "CAUSAL_LM"}
TASKS |= {"qwen2": "CAUSAL_LM", "t5": "SEQ_2_SEQ_LM"}
SETTINGS = {"t5": {"d_kv": 8, "num_decoder_layers": 3, "initializer_factor": 2.0}}  # PEFT knows one depth and width
KINDS = list(TASKS)
GENERATORS = ["llama_gqa", "gpt2", "opt", "t5"]
P, HIDDEN = 5, 12
CLOSE = {torch.float32: 1e-6, torch.float64: 1e-12}
WAYS = ["p_tuning", "prefix_tuning", "prefix_projection"]


def pair(kind: str, way: str, dtype: torch.dtype, **sizes: Any) -> tuple[Any, Any]:
    """PEFT's model and ours, of the same base and the same prompt; texts end nowhere. `sizes` go into its config."""
    base = tiny_model(kind, dtype, **{**SETTINGS.get(kind, {}), **sizes})
    settings: dict[str, Any] = {"num_virtual_tokens": P, "encoder_hidden_size": HIDDEN}
    projects = way == "prefix_projection"
    config: Any
    if way == "p_tuning":
        config = PromptEncoderConfig(task_type=TASKS[kind], **settings)
    else:
        config = PrefixTuningConfig(task_type=TASKS[kind], prefix_projection=projects, **settings)
    torch.manual_seed(3)
    theirs = get_peft_model(copy.deepcopy(base), config).to(dtype).eval()
    network = {"mlp_layers": 3, "layer_norm": False} if way == "p_tuning" else {"prefix_projection": projects}
    method = "p_tuning" if way == "p_tuning" else "prefix_tuning"
    ours = apt.patch_model(base, method=method, **settings, **network)
    copy_prompt(kind, theirs.prompt_encoder["default"], ours.apt_prompt)
    return theirs, ours


@torch.no_grad()
def copy_prompt(kind: str, encoder: Any, prompt: Any) -> None:
    """PEFT's numbers into ours.

    With an encoder-decoder PEFT lists the layers' prefixes twice and gives every second one to the cross-attention,
    which drops it: layer i of L gets prefix 2 i mod L, each once where L is odd.
    """
    if isinstance(prompt, apt.PTuningEmbedding):
        prompt.virtual_embeddings.copy_(encoder.embedding.weight[:P])  # T5's are made for a decoder too, and not used
        for theirs, mine in zip(linears(encoder.mlp_head), linears(prompt.mlp), strict=True):
            mine.load_state_dict(theirs.state_dict())
        return
    layers = [(2 * i if kind == "t5" else i) % prompt.num_layers for i in range(prompt.num_layers)]
    width = prompt.widths[0]
    if not prompt.prefix_projection:
        flat = encoder.embedding.weight.split(width, dim=1)
        for layer, mine in zip(layers, prompt.prefix_embeddings, strict=True):
            mine.copy_(flat[layer])
        return
    prompt.virtual_embeddings.copy_(encoder.embedding.weight)
    first, last = linears(encoder.transform)
    prompt.projection[0].load_state_dict(first.state_dict())
    for name, mine in prompt.projection[2].named_parameters():
        mine.copy_(torch.cat([last.get_parameter(name).split(width)[layer] for layer in layers]))


def linears(steps: nn.Module) -> list[nn.Linear]:
    return [step for step in steps.children() if isinstance(step, nn.Linear)]


@pytest.mark.parametrize("dtype", list(CLOSE))
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_pefts(kind: str, way: str, dtype: torch.dtype) -> None:
    # At 2.0 T5's softmax, which nothing scales, makes 1e-12 of the last bit.
    mild = {"initializer_factor": 1.0} if kind == "t5" else {}
    theirs, ours = pair(kind, way, dtype, **mild)
    batch = tiny_batch(kind)
    with torch.no_grad():
        wanted, found = theirs(**batch).logits, ours(**batch).logits
        plain = tiny_model(kind, dtype, **{**SETTINGS.get(kind, {}), **mild})(**batch).logits
    wanted = wanted[:, -found.shape[1] :] if found.dim() == 3 else wanted  # PEFT answers for virtual tokens too
    if kind in ("llama_gqa", "gpt2", "opt", "qwen2", "t5"):
        seen = batch["attention_mask"].bool() if kind != "t5" else torch.ones_like(batch["labels"]).bool()
        wanted, found, plain = wanted[seen], found[seen], plain[seen]
    assert found.shape == plain.shape
    assert (plain - found).abs().max() > 1e-2
    assert ((found - wanted).abs() / wanted.abs().clamp(min=1.0)).max() <= CLOSE[dtype]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", ["bert", "t5"])  # where both read a label a text, or a label a decoder's token
def test_gradients_are_pefts(kind: str, way: str) -> None:
    theirs, ours = pair(kind, way, torch.float64)
    batch = tiny_batch(kind)
    losses = [model(**batch).loss for model in (theirs, ours)]
    close("loss", losses[1], losses[0])
    for loss in losses:
        loss.backward()
    wanted = copy.deepcopy(ours.apt_prompt)
    encoder = copy.deepcopy(theirs.prompt_encoder["default"])
    for parameter, source in zip(encoder.parameters(), theirs.prompt_encoder["default"].parameters(), strict=True):
        parameter.data = source.grad
    copy_prompt(kind, encoder, wanted)
    for mine, grad in zip(ours.apt_prompt.parameters(), wanted.parameters(), strict=True):
        assert mine.grad is not None
        assert mine.grad.abs().max() > 0
        close("gradient", mine.grad, grad.data)


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", GENERATORS)
def test_generates_what_peft_does(kind: str, way: str, cached: bool) -> None:
    theirs, ours = pair(kind, way, torch.float64)
    ids = tiny_batch(kind, size=3, length=6)["input_ids"].clamp(min=1)
    settings = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 9, "do_sample": False}
    wanted = theirs.generate(input_ids=ids, **settings)
    found = ours.generate(input_ids=ids, use_cache=cached, **settings)
    assert torch.equal(found, wanted)
    plain = tiny_model(kind, **SETTINGS.get(kind, {})).generate(input_ids=ids, **settings)
    assert not torch.equal(found, plain)
