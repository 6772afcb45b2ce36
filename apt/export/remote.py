"""What lets ``AutoModel`` load a free export with ``trust_remote_code=True``: sizes in its config, and a file of code.

The sizes are what the model differs in from the one that its stock class makes of the config.
"""

import ast
import inspect
import json
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

from apt.export import remote_model
from apt.export.files import ENTRIES
from apt.families import Anatomy, EmptyAttention, anatomy_of, empty, layer_config, own_method, t5_heads
from apt.families.layer_config import LayerConfig
from apt.process import per_thread

CODE = "modeling_apt.py"
GENERAL = ("AutoModel", "AutoModelForPreTraining")  # of any task
BUNDLE: tuple[ModuleType, ...] = (per_thread, own_method, layer_config, empty, t5_heads, remote_model)  # in this order
PLAIN = (bool, int, float, str, tuple, list)  # attributes that are compared


def write_remote_code(folder: Path, model: Any, config: Any) -> dict[str, Any]:
    """Write the code beside an export; what its config has to say for it: the sizes, and the classes.

    Args:
        folder: of the export.
        model: plain, with the sizes of the export; it may be without memory.
        config: of the export.
    """
    from accelerate import init_empty_weights

    with init_empty_weights(include_buffers=False):
        stock = type(model)(config)
    classes = _classes(stock)
    (folder / CODE).write_text(code(sorted(set(classes.values()))), encoding="utf-8")
    auto_map = {auto: f"{CODE.removesuffix('.py')}.Apt{kind}" for auto, kind in classes.items()}
    return dict(zip(ENTRIES, (sizes_of(model, stock), auto_map), strict=True))


def remote_class(folder: Path) -> str | None:
    """The class of transformers by which ``from_pretrained(folder, trust_remote_code=True)`` makes the whole model.

    None where the folder has no code of ours.
    """
    classes = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("auto_map", {})
    if not (folder / CODE).exists():
        return None
    return next((name for name in classes if name not in GENERAL), next(iter(classes)))


def _classes(stock: Any) -> dict[str, str]:
    """The auto classes that make such a model, and the one for it without its head -> their stock classes."""
    from transformers.models.auto import modeling_auto

    found = {}
    for name, auto in vars(modeling_auto).items():
        if not name.startswith("AutoModel") or type(stock.config) not in auto._model_mapping:
            continue
        kinds = auto._model_mapping[type(stock.config)]
        kinds = kinds if isinstance(kinds, tuple) else (kinds,)
        if name == "AutoModel":
            found[name] = kinds[0].__name__
        elif type(stock) in kinds:
            found[name] = type(stock).__name__
    return found


def sizes_of(model: nn.Module, stock: nn.Module) -> dict[str, dict[str, Any]]:
    """What `give_sizes` must know to make the one out of the other; its argument `sizes`."""
    sizes: dict[str, dict[str, Any]] = {
        name: {} for name in ("empty", "linear", "tensors", "attributes", "config", "head_order")
    }
    sizes["empty"] = dict(_empty(anatomy_of(model)))
    theirs = dict(stock.named_modules())
    for name, module in model.named_modules():
        there = theirs.get(name)
        if there is None or isinstance(module, EmptyAttention):
            continue
        if type(module) is not type(there):
            assert isinstance(module, nn.Linear), f"{name} is a {type(module).__name__}, which no file here can make"
            sizes["linear"][name] = [module.out_features, module.in_features, module.bias is not None]
            continue
        order = getattr(module, "head_order", None)
        if order is not None:
            sizes["head_order"][name] = order.tolist()
        own = vars(getattr(module, "config", None)) if isinstance(getattr(module, "config", None), LayerConfig) else {}
        if own:
            sizes["config"][name] = {key: value for key, value in own.items() if key != "_shared"}
        differing = {key: value for key, value in vars(module).items() if _differs(key, value, vars(there).get(key))}
        if differing:
            sizes["attributes"][name] = differing
        for leaf, parameter in module.named_parameters(recurse=False):
            if parameter.shape != there.get_parameter(leaf).shape:
                sizes["tensors"][f"{name}.{leaf}"] = list(parameter.shape)
    return sizes


def _empty(anatomy: Anatomy) -> Iterator[tuple[str, list[Any]]]:
    for part in anatomy.attentions:
        table, layer = part.attention, part.layer
        module = layer.module.get_submodule(table.module)
        if isinstance(module, EmptyAttention):
            inner = table.o.removeprefix(".") if table.o.startswith(".") else ""
            yield f"{layer.path}.{table.module}", [type(module).__name__, inner, table.weights, module.width]


def _differs(key: str, ours: Any, theirs: Any) -> bool:
    hidden = key.startswith("_") or key == "training"
    return not hidden and isinstance(ours, PLAIN) and isinstance(theirs, PLAIN) and ours != theirs


def code(kinds: list[str]) -> str:
    """The text of the file: what the modules of `BUNDLE` hold, and a subclass for each of these classes."""
    imports: set[str] = set()
    bodies = []
    for module in BUNDLE:
        text = inspect.getsource(module)
        for node in ast.parse(text).body:
            segment = ast.get_source_segment(text, node) or ""
            if isinstance(node, ast.Import | ast.ImportFrom):
                if not segment.startswith("from apt."):
                    imports |= set(_lines_of(node))
            elif not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)):  # a docstring
                bodies.append("\n".join(text.splitlines()[_first_line(node) - 1 : node.end_lineno]))
    told = "with layers of their own sizes."
    subclasses = [f'class Apt{kind}(OwnSizes, {kind}):\n    """{kind} {told}"""' for kind in kinds]
    imports |= {f"from transformers import {kind}" for kind in kinds}
    head = '"""Written by apt-lm: a pruned model whose layers differ in size, which no stock configuration can say."""'
    return "\n\n".join([head, "\n".join(sorted(imports)), *bodies, *subclasses]) + "\n"


def _first_line(node: ast.stmt) -> int:
    """Decorators stand above what they decorate."""
    decorators = getattr(node, "decorator_list", [])
    return min([node.lineno, *(each.lineno for each in decorators)])


def _lines_of(node: ast.Import | ast.ImportFrom) -> Iterator[str]:
    """One import a line, so that the same one of two files is one."""
    for alias in node.names:
        single: Any = type(node)(**{**vars(node), "names": [alias]})
        yield ast.unparse(single)
