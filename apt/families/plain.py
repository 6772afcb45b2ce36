"""Whether an adapter can take the place of a linear: a plain forward, no hooks of others, a dense weight that is there.

An adapted linear takes weight and bias over and drops the rest. So what has a rest is kept as it is.
"""

import ast
import inspect
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import nn

from apt.families.linears import CONV1D, features, is_linear

# A forward of its own that computes W x + b, as weights were once rounded otherwise.
AS_PLAIN = ("FalconLinear",)
PLAIN_TENSORS = ("Parameter", "FakeTensor")  # the second, of a prediction without numbers, by name: it loads much
SHARDED = "DTensor"  # what a weight is that FSDP's fully_shard has spread, by name: it loads much
ELSEWHERE = "has no weight here: it is offloaded or sharded"
DENSE = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
PACKED = ("qweight", "W_q", "weight_packed")  # what quantised layers that are no nn.Linear hold (GPTQ, AWQ, HQQ, ...)
FACTS = ("dtype", "device", "shape", "size", "ndim", "dim", "numel", "requires_grad", "data_ptr")  # asked of a weight
QUESTIONS = ("isinstance", "hasattr", "getattr")
PLUMBING = ("torch.nn.modules.module", "transformers.modeling_utils", "transformers.generation")  # no layers of its own


@dataclass(frozen=True)
class Obstacle:
    """Why a linear is kept as it is.

    Args:
        text: goes on after its name.
        advice: what the user can do.
        quantised: whether its weight is stored in another form.
    """

    text: str
    advice: str
    quantised: bool = False


def is_linear_like(module: nn.Module | None) -> bool:
    """Whether a layer is meant as a linear, whatever else it does: also a quantised one that is no `nn.Linear`."""
    return is_linear(module) or any(hasattr(module, name) for name in PACKED)


def find_obstacle(model: nn.Module, name: str) -> Obstacle | None:
    """Why an adapter cannot take the place of a linear of a model, None where it can.

    Args:
        model: plain.
        name: of the linear, in full.
    """
    linear = model.get_submodule(name)
    parent, _, child = name.rpartition(".")
    reader: Any = type(model.get_submodule(parent))
    found = _storage(linear, model) or _forward(linear)
    if found is None and name and child in weights_read(reader):
        text = f"is read past: {reader.__name__} takes its weight without calling it, so an adapter would not learn"
        return Obstacle(text, "leave it out of target_modules")
    return found


def _storage(linear: Any, model: nn.Module) -> Obstacle | None:
    """What is unusual about where the numbers are."""
    kind = type(linear).__name__
    if hasattr(linear, "parametrizations"):
        return Obstacle("is parametrized", "call torch.nn.utils.parametrize.remove_parametrizations first")
    weight = dict(linear.named_parameters(recurse=False)).get("weight")
    if type(weight).__name__ == SHARDED:
        return Obstacle(ELSEWHERE, "load the whole model on one device")
    packed = weight is None and any(hasattr(linear, name) for name in (*PACKED, "weight_scale"))
    if packed or (weight is not None and not _is_dense(weight)):
        advice = "load the model without quantization (no quantization_config), in bfloat16 say"
        return Obstacle(f"is quantised or packed ({kind})", advice, quantised=True)
    if weight is None:  # old weight_norm and prune compute it in a hook
        text = "has no weight parameter, its weight is computed"
        return Obstacle(text, "make it plain first (torch.nn.utils.remove_weight_norm, torch.nn.utils.prune.remove)")
    offloaded = weight.is_meta and not all(parameter.is_meta for parameter in model.parameters())
    if offloaded or weight.shape != _stored_shape(linear):
        return Obstacle(ELSEWHERE, "load the whole model on one device")
    return None


def _is_dense(weight: nn.Parameter) -> bool:
    return type(weight).__name__ in PLAIN_TENSORS and weight.dtype in DENSE


def _stored_shape(linear: nn.Module) -> tuple[int, ...]:
    outputs, inputs = features(linear)
    return (outputs, inputs) if isinstance(linear, nn.Linear) else (inputs, outputs)


def _forward(linear: nn.Module) -> Obstacle | None:
    """What else happens in its forward."""
    if "forward" in vars(linear):
        return Obstacle("has its forward replaced, as accelerate does to move weights", "load the model on one device")
    kind = type(linear)
    if kind.__name__ not in AS_PLAIN and _own_forward(kind):
        return Obstacle(f"has a forward of its own ({kind.__name__})", "leave it out of target_modules")
    if any(getattr(linear, table, None) for table in HOOKS):
        return Obstacle("has hooks", "remove them first, as they would be lost")
    return None


def _own_forward(kind: type[nn.Module]) -> bool:
    """Whether the forward of a class is neither that of `nn.Linear` nor that of transformers' ``Conv1D``."""
    first = next(base for base in kind.__mro__ if "forward" in vars(base))
    return first is not nn.Linear and (first.__module__, first.__name__) != CONV1D


@cache
def weights_read(kind: Any) -> frozenset[str]:
    """Children of a class of modules whose weight its code uses itself, as Mamba does with ``dt_proj``.

    Those are the children that it never calls, and those whose weight a forward multiplies by itself or hands to
    another function, as where a fused kernel does the work. What is asked of a weight (dtype, shape) does not count.
    Empty for a class without source text.
    """
    called: set[str] = set()
    read: set[str] = set()
    passed: set[str] = set()
    for function in _methods(kind):
        around = {inner: outer for outer in ast.walk(function) for inner in ast.iter_child_nodes(outer)}
        for node in ast.walk(function):
            child = _child_of_self(node.func) if isinstance(node, ast.Call) else None
            if child is not None:
                called.add(child)
            child = _child_of_self(node.value) if isinstance(node, ast.Attribute) and node.attr == "weight" else None
            if child is None or not _is_used(node, around[node]):
                continue
            read.add(child)
            if "forward" in function.name and isinstance(around[node], ast.BinOp | ast.Call | ast.keyword):
                passed.add(child)
    return frozenset((read - called) | passed)


def _methods(kind: type[nn.Module]) -> Iterator[ast.FunctionDef]:
    """The methods of a class and of those it stands on, but for those that make or initialise parameters."""
    for base in kind.__mro__:
        if base is object or base.__module__.startswith(PLUMBING):
            continue
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(base)))
        except (OSError, TypeError, SyntaxError):  # built in, or typed at a prompt
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef) and "init" not in node.name and node.name != "reset_parameters":
                yield node


def _child_of_self(node: ast.AST) -> str | None:
    """X of the expression ``self.X``."""
    is_own = isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "self"
    return node.attr if isinstance(node, ast.Attribute) and is_own else None


def _is_used(node: ast.AST, around: ast.AST) -> bool:
    """Whether the numbers of a weight are used, and not only what kind of tensor it is asked for."""
    if not isinstance(getattr(node, "ctx", None), ast.Load):
        return False
    if isinstance(around, ast.Attribute):
        return around.attr not in FACTS
    if isinstance(around, ast.Call) and isinstance(around.func, ast.Name):
        return around.func.id not in QUESTIONS
    return not isinstance(around, ast.Compare)
