"""Self-distillation: a teacher that shares the student's frozen weights."""

from apt.distiller.config import DistillationConfig
from apt.distiller.distiller import DistillTerms, SelfDistiller, TeacherOutput, place_transform, release
from apt.distiller.layers import TRANSFORM, LayerTransform

__all__ = [
    "TRANSFORM",
    "DistillTerms",
    "DistillationConfig",
    "LayerTransform",
    "SelfDistiller",
    "TeacherOutput",
    "place_transform",
    "release",
]
