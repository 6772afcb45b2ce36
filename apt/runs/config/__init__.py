"""RunConfig: the settings of a whole run. YAML and ``key=value`` in, YAML out."""

from apt.runs.config.load import KEYS, SECTIONS, SHORTHANDS, load_config, read_table
from apt.runs.config.settings import (
    TASKS,
    DataConfig,
    EvaluationConfig,
    HardwareConfig,
    ModelConfig,
    RunConfig,
    TrainingSettings,
)

__all__ = [
    "KEYS",
    "SECTIONS",
    "SHORTHANDS",
    "TASKS",
    "DataConfig",
    "EvaluationConfig",
    "HardwareConfig",
    "ModelConfig",
    "RunConfig",
    "TrainingSettings",
    "load_config",
    "read_table",
]
