"""RunConfig: the settings of a whole run. YAML and ``key=value`` in, YAML out."""

from apt.runs.config.load import KEYS, SECTIONS, SHORTHANDS, load_config, read_table
from apt.runs.config.settings import HardwareConfig, ModelConfig, RunConfig, TrainingSettings
from apt.runs.data import DataConfig
from apt.runs.evaluation import EvaluationConfig

__all__ = [
    "KEYS",
    "SECTIONS",
    "SHORTHANDS",
    "DataConfig",
    "EvaluationConfig",
    "HardwareConfig",
    "ModelConfig",
    "RunConfig",
    "TrainingSettings",
    "load_config",
    "read_table",
]
