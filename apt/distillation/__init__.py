"""Self-distillation: a teacher that shares the student's frozen weights."""

from apt.distillation.config import DistillationConfig
from apt.distillation.distiller import DistillTerms, SelfDistiller, TeacherOutput, place_transform, release

__all__ = [
    "DistillTerms",
    "DistillationConfig",
    "SelfDistiller",
    "TeacherOutput",
    "place_transform",
    "release",
]
