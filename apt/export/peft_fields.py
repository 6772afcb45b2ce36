"""Which settings of a PEFT LoRA folder say no more than a plain LoRA does; all others are refused by name."""

from typing import Any

# Where the adapter sits, how it was trained, where it comes from: the tensors say the rest.
HARMLESS = {
    "alpha_pattern",
    "auto_mapping",
    "base_model_name_or_path",
    "ensure_weight_tying",
    "exclude_modules",
    "fan_in_fan_out",
    "inference_mode",
    "layers_pattern",
    "layers_to_transform",
    "lora_alpha",
    "lora_dropout",
    "megatron_core",
    "modules_to_save",
    "peft_type",
    "peft_version",
    "qalora_group_size",
    "r",
    "rank_pattern",
    "revision",
    "runtime_config",
    "target_modules",
    "task_type",
    "use_rslora",
}
# Starts that leave the base as it is. Those of PiSSA, OLoRA, CorDA, LoRA-GA and LoftQ take a part out of its weights.
PLAIN_STARTS = (True, False, None, "gaussian", "orthogonal", "eva")
START = "init_lora_weights"
OF_STARTS = ("eva_config",)  # how such a start is found


def more_than_lora(config: dict[str, Any]) -> str | None:
    """The first setting by which a folder is more than ``W + s B A``; None where it is that.

    A setting that is not known here counts as one, unless it is off: null, false or empty.

    Args:
        config: of the folder, ``adapter_config.json``.
    """
    if config.get("peft_type") != "LORA":
        return f"peft_type={config.get('peft_type')!r}"
    if config.get("bias", "none") != "none":
        return f"bias={config['bias']!r}"
    if config.get(START) not in PLAIN_STARTS:
        return f"{START}={config[START]!r}, which changes the base"
    known = {*HARMLESS, *OF_STARTS, START, "bias"}
    return next((f"{name}={value!r}" for name, value in config.items() if value and name not in known), None)
