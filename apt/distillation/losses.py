"""What the student is told to match: predictions and hidden states of the teacher, padding left out. Pure functions.

Letters: B batch, T tokens, C classes (or the vocabulary), D hidden dimensions.
"""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from apt.families import IGNORED

SPANS = ("start_logits", "end_logits")
EPSILON = 1e-6  # of the mean square of a hidden state, as in the norms of decoders


def tempered_kl(student: Tensor, teacher: Tensor, valid: Tensor | None, tau: float) -> Tensor:
    """``tau^2 KL(softmax(teacher / tau) || softmax(student / tau))``, the mean over the rows that count.

    Args:
        student: logits ``[..., C]``.
        teacher: the same of the teacher.
        valid: rows that count, ``[...]``; None is all.
        tau: temperature.
    """
    wide = torch.promote_types(student.dtype, torch.float32)
    log_q = F.log_softmax(student.to(wide) / tau, -1)
    log_p = F.log_softmax(teacher.to(wide) / tau, -1)
    rows = (log_p.exp() * (log_p - log_q)).sum(-1)
    if valid is None:
        return tau * tau * rows.sum() / max(1, rows.numel())
    return tau * tau * rows.masked_fill(~valid, 0.0).sum() / valid.sum().clamp(min=1)


def prediction_loss(
    student: Mapping[str, Tensor],
    teacher: Mapping[str, Tensor],
    *,
    labels: Tensor | None,
    valid: Tensor | None,
    loss_type: str | None,
    problem_type: str | None,
    tau: float,
) -> Tensor:
    """How far the student's predictions are from the teacher's.

    Classes and tokens: `tempered_kl`. Tokens count where their label is not -100 and they are no padding; in a
    causal language model position t predicts token t + 1. Start and end of a span: the mean of both, over the tokens
    that are no padding. Labels of which several may hold: each as two classes. Regression: the mean squared error.

    Args:
        student: predictions by name: ``logits``, or ``start_logits`` and ``end_logits``.
        teacher: the same of the teacher.
        labels: of the batch, as the model takes them.
        valid: padding mask ``[B, T]`` of the tokens that are predicted; None is all valid.
        loss_type: as transformers names it.
        problem_type: of a classifier, as transformers names it; None is one class of several.
        tau: temperature.
    """
    if SPANS[0] in student:
        terms = [_span_loss(student[name], teacher[name], valid, tau) for name in SPANS]
        return (terms[0] + terms[1]) / 2.0
    ours, theirs = student["logits"], teacher["logits"]
    if problem_type == "regression" or ours.shape[-1] == 1:
        wide = torch.promote_types(ours.dtype, torch.float32)
        return F.mse_loss(ours.to(wide), theirs.to(wide))
    if problem_type == "multi_label_classification":
        ours, theirs = (torch.stack([logits, torch.zeros_like(logits)], -1) for logits in (ours, theirs))
    if ours.dim() == 2 or problem_type == "multi_label_classification":
        return tempered_kl(ours, theirs, None, tau)
    counts = _token_mask(ours, labels, valid)
    if counts is not None and loss_type == "ForCausalLM":
        ours, theirs, counts = ours[:, :-1], theirs[:, :-1], counts[:, 1:]
    return tempered_kl(ours, theirs, counts, tau)


def _span_loss(student: Tensor, teacher: Tensor, valid: Tensor | None, tau: float) -> Tensor:
    if valid is not None:
        shut = torch.finfo(torch.float16 if student.dtype == torch.float16 else torch.float32).min / 8.0
        student, teacher = (logits.masked_fill(valid == 0, shut) for logits in (student, teacher))
    return tempered_kl(student, teacher, None, tau)


def _token_mask(logits_BTC: Tensor, labels: Tensor | None, valid: Tensor | None) -> Tensor | None:
    """The tokens whose prediction counts, ``[B, T]``; None is all of them."""
    shape = logits_BTC.shape[:2]
    masks = [] if labels is None or labels.shape != shape else [labels != IGNORED]
    masks += [] if valid is None or valid.shape != shape else [valid != 0]
    return torch.stack(masks).all(0) if masks else None


def layer_loss(student_BTD: Tensor, teacher_BTD: Tensor, valid: Tensor | None, normalize: bool) -> Tensor:
    """Mean squared error of hidden states over dimensions and valid tokens, in at least float32.

    Args:
        student_BTD: after Tr.
        teacher_BTD: without a graph.
        valid: padding mask ``[B, T]``; None is all valid.
        normalize: divide each side by its root mean square over the dimensions of a token first.
    """
    wide = torch.promote_types(student_BTD.dtype, torch.float32)
    ours, theirs = student_BTD.to(wide), teacher_BTD.to(wide)
    if normalize:
        ours, theirs = (h * torch.rsqrt(h.square().mean(-1, keepdim=True) + EPSILON) for h in (ours, theirs))
    error_BT = (ours - theirs).square().mean(-1)
    if valid is None:
        return error_BT.mean()
    weight_BT = valid.reshape(error_BT.shape).to(wide)
    return (error_BT * weight_BT).sum() / weight_BT.sum().clamp(min=1.0)


def predictions_of(output: Any) -> dict[str, Tensor]:
    """The predictions in a model's output by name: logits, or start_logits and end_logits.

    Raises:
        ValueError: it names none.
    """
    named = dict(output) if isinstance(output, Mapping) else {}
    named = {name: named[name] for name in ("logits", *SPANS) if name in named}
    if not named:
        raise ValueError(
            f"distillation: needs the predictions of the student, got {type(output).__name__}; hand in what the model "
            f"returned (run.loss(model(**batch), batch)), with return_dict=True and, under Liger, "
            f"fused_linear_cross_entropy=False"
        )
    return named
