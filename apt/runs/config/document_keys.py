"""Keys of a config that stand for others of ours: the words of the documents this project was written from."""

from collections.abc import Callable, Mapping
from typing import Any

from apt.files.reading import shown

# What the documents call a model, and its weights on the hub.
MODELS = {
    "roberta": "FacebookAI/roberta-base",
    "t5": "google/t5-base-lm-adapt",
    "llama": "meta-llama/Llama-2-7b-hf",
}
COMPONENTS = {  # a linear as families call it -> its role
    **dict.fromkeys(("q", "q_proj", "query"), "q"),
    **dict.fromkeys(("k", "k_proj", "key"), "k"),
    **dict.fromkeys(("v", "v_proj", "value"), "v"),
    **dict.fromkeys(("o", "o_proj", "out_proj"), "o"),
}
FFN_COMPONENTS = {
    **dict.fromkeys(("up", "up_proj", "wi", "wi_1", "intermediate_dense"), "up"),
    **dict.fromkeys(("gate", "gate_proj", "wi_0"), "gate"),
    **dict.fromkeys(("down", "down_proj", "wo", "output_dense"), "down"),
}
METRICS_OF = {  # metrics by task -> the task
    "evaluation.metrics.classification": "classification",
    "evaluation.metrics.regression": "regression",
    "evaluation.metrics.qa": "question_answering",
    "evaluation.metrics.summarization": "summarization",
    "evaluation.metrics.instruction_following": "instruction_following",
}
ATTENTION_ROLES = ("q", "v")  # where mha_components is left out


def _architecture(key: str, value: Any) -> str:
    names = value if isinstance(value, list) else [value]
    if len(names) != 1 or not isinstance(names[0], str):
        raise ValueError(f"config: {key} must name one model, as a run trains one, got {shown(value)}")
    return MODELS.get(names[0], names[0])


def _roles(key: str, value: Any, known: Mapping[str, str]) -> list[str]:
    names = value if isinstance(value, list) else [value]
    unknown = [name for name in names if not isinstance(name, str) or name not in known]
    if unknown:
        raise ValueError(
            f"config: {key} must name some of {', '.join(known)}, got {shown(unknown[0])}; for other linears use "
            f"model.target_modules"
        )
    return list(dict.fromkeys(known[name] for name in names))


def _switch(key: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError(f"config: {key} must be true or false, got {shown(value)}")
    return value


def _attention(key: str, value: Any) -> list[str]:
    return _roles(key, value, COMPONENTS)


def _ffn(key: str, value: Any) -> list[str]:
    if isinstance(value, bool):
        return ["up"] if value else []
    return _roles(key, value, FFN_COMPONENTS)


def _kurtosis(key: str, value: Any) -> str:
    return "paper" if _switch(key, value) else "off"


def _metrics(key: str, value: Any) -> list[str]:
    names = value if isinstance(value, list) else [value]
    if not names or not all(isinstance(name, str) for name in names):
        raise ValueError(f"config: {key} must name metrics, got {shown(value)}")
    return names


def _as_it_is(key: str, value: Any) -> Any:
    return value


# Key of the documents -> key of ours, and what its value becomes.
DOCUMENT_KEYS: dict[str, tuple[str, Callable[[str, Any], Any]]] = {
    "model.architectures": ("model.name", _architecture),
    "model.adapter.mha_components": ("model.target_modules", _attention),
    "model.adapter.apply_to_ffn": ("model.target_modules", _ffn),
    "pruning.use_kurtosis": ("pruning.kurtosis", _kurtosis),
    "tuning.update_frequency": ("tuning.growth_frequency", _as_it_is),
    **dict.fromkeys(METRICS_OF, ("evaluation.metrics", _metrics)),
}
MEANING = {  # for the table of the docs
    "model.architectures": "one name, or a list of one; `roberta`, `t5`, `llama` are the paper's models",
    "model.adapter.mha_components": "`q_proj`, `query`, ... become the roles `q`, `k`, `v`, `o`; left out: `q`, `v`",
    "model.adapter.apply_to_ffn": (
        "`true` adds the role `up`, as the authors' code does; a list (`[intermediate_dense, output_dense]`) those"
    ),
    "pruning.use_kurtosis": "`true` is `paper`, `false` is `off`",
    "tuning.update_frequency": "the same number",
    **dict.fromkeys(METRICS_OF, "one name or a list; counts where `model.task` is that task"),
}


def counterparts(key: str) -> list[str]:
    """The keys that say the same thing as this one, so that only one of them may be given."""
    if key in DOCUMENT_KEYS:
        return [DOCUMENT_KEYS[key][0]]
    return [name for name, (ours, _) in DOCUMENT_KEYS.items() if ours == key]


def translate(values: Mapping[str, Any]) -> dict[str, Any]:
    """``{"section.leaf": value}`` with the documents' keys replaced by ours.

    Raises:
        ValueError: a key stands beside the one it stands for, or its value means nothing.
    """
    twice = [(key, other) for key in values if key in DOCUMENT_KEYS for other in counterparts(key) if other in values]
    if twice:
        raise ValueError(f"config: {twice[0][0]} and {twice[0][1]} are one setting; give one of them")
    ours = {key: value for key, value in values.items() if key not in DOCUMENT_KEYS}
    task = values.get("model.task", "classification")
    for key, (name, convert) in DOCUMENT_KEYS.items():
        if key in values:
            value = convert(key, values[key])
            if METRICS_OF.get(key, task) != task:
                continue
            ours[name] = [*ours.get(name, []), *value] if name == "model.target_modules" else value
    if "model.adapter.apply_to_ffn" in values and "model.adapter.mha_components" not in values:
        ours["model.target_modules"] = [*ATTENTION_ROLES, *ours["model.target_modules"]]
    return ours
