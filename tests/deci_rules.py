"""What programs ask of a DeciLM folder, and its layers put into transformers' own Llama layers."""

import copy
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file


def config_of(folder: Path) -> Any:
    """config.json of a folder."""
    return json.loads((folder / "config.json").read_text(encoding="utf-8"))


def width_by_mult(ffn_mult: float, hidden: int) -> int:
    """The number of neurons that `ffn_mult` says, as nemotron_nas.py of vLLM, SGLang and mlx-lm has it."""
    return -(-int(2 * round(ffn_mult, 6) * hidden / 3) // 256) * 256


def check_rules(folder: Path) -> None:
    """Sizes that the configuration says are those of the tensors, and what is left out has none."""
    config, tensors = config_of(folder), load_file(folder / "model.safetensors")
    assert config["architectures"] == ["DeciLMForCausalLM"]
    assert len(config["block_configs"]) == config["num_hidden_layers"]
    heads, head_dim = config["num_attention_heads"], config["head_dim"]
    assert not config["block_configs"][0]["attention"]["no_op"]
    for number, block in enumerate(config["block_configs"]):
        layer = {name: tensor for name, tensor in tensors.items() if name.startswith(f"model.layers.{number}.")}
        attention = [name for name in layer if "self_attn" in name or "input_layernorm" in name]
        ffn = [name for name in layer if "mlp" in name or "post_attention" in name]
        assert (len(attention), len(ffn)) == (
            0 if block["attention"]["no_op"] else 5,
            0 if block["ffn"]["no_op"] else 4,
        )
        assert len(layer) == len(attention) + len(ffn)
        if attention:
            group = block["attention"]["n_heads_in_group"]
            assert heads % group == 0
            assert layer[f"model.layers.{number}.self_attn.q_proj.weight"].shape[0] == heads * head_dim
            assert layer[f"model.layers.{number}.self_attn.k_proj.weight"].shape[0] == heads // group * head_dim
        if ffn:
            assert layer[f"model.layers.{number}.mlp.up_proj.weight"].shape[0] == width_of(block["ffn"], config)


def width_of(ffn: Any, config: Any) -> int:
    """Neurons of a layer that has some."""
    return width_by_mult(ffn["ffn_mult"], config["hidden_size"]) if "ffn_mult" in ffn else ffn["intermediate_size"]


def in_llama_layers(folder: Path) -> Any:
    """The model of a DeciLM folder, each layer a Llama layer of transformers with a configuration of its own."""
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer

    config, tensors = config_of(folder), load_file(folder / "model.safetensors")
    llama = LlamaConfig(
        **{name: value for name, value in config.items() if name not in ("block_configs", "model_type")}
    )
    model = LlamaForCausalLM(llama).eval()
    for number, block in enumerate(config["block_configs"]):
        own = copy.deepcopy(model.config)
        own.num_key_value_heads = config["num_attention_heads"] // (block["attention"]["n_heads_in_group"] or 1)
        own.intermediate_size = 1 if block["ffn"]["no_op"] else width_of(block["ffn"], config)
        model.model.layers[number] = LlamaDecoderLayer(own, number).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()  # a part that is left out adds nothing
    missing, unexpected = model.load_state_dict(tensors, strict=False)
    assert not unexpected
    assert all("layers." in name or (name == "lm_head.weight" and llama.tie_word_embeddings) for name in missing)
    model.tie_weights()
    return model
