"""Every public name says what it is: its arguments, what it gives back, and so does every method of its own."""

import dataclasses
import inspect
import re
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest

import apt
import apt_kernels

NAMES = [(module, name) for module in (apt, apt_kernels) for name in module.__all__]


def parameters(thing: Any) -> list[str]:
    """What a caller can give, `self` left out."""
    found = inspect.signature(thing).parameters.values()
    return [p.name for p in found if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD) and p.name != "self"]


def section(text: str, title: str) -> str:
    """A section of a docstring without its title, empty where there is none."""
    found = re.search(rf"^{title}:(.*?)(?=^\w|\Z)", text, re.MULTILINE | re.DOTALL)
    return found[1] if found else ""


def faults(name: str, thing: Any) -> Iterator[str]:
    """What the docstring of a public function or class lacks."""
    text = vars(thing).get("__doc__") if inspect.isclass(thing) else thing.__doc__
    if not text or (dataclasses.is_dataclass(thing) and text.startswith(f"{name}(")):  # one that dataclasses made
        yield f"{name} has no docstring"
        return
    text = inspect.cleandoc(text)
    told = section(text, "Args")
    beside = fields_with_a_word(thing) if dataclasses.is_dataclass(thing) else set()
    for parameter in parameters(thing):
        line = rf"^ +(?:[\w, ]+, )?{parameter}(?:, [\w, ]+)?:"
        if parameter not in beside and not re.search(line, told, re.MULTILINE):
            yield f"{name}: Args says nothing of {parameter}"
    if inspect.isclass(thing):
        yield from (f"{name}.{method} has no docstring" for method in silent_methods(thing))
        return
    gives = inspect.signature(thing).return_annotation not in (None, "None")
    if gives and parameters(thing) and not section(text, "Returns").strip():
        yield f"{name}: Returns is missing"


def fields_with_a_word(thing: Any) -> set[str]:
    """Fields of settings that a comment explains, on their line or the one above, or that are settings themselves."""
    source = inspect.getsource(thing)
    told = set(re.findall(r"^ +(\w+): [^\n]*#", source, re.MULTILINE))
    told |= set(re.findall(r"^ +#[^\n]*\n +(\w+):", source, re.MULTILINE))
    return told | {f.name for f in dataclasses.fields(thing) if dataclasses.is_dataclass(f.type)}


def silent_methods(thing: type) -> Iterator[str]:
    """Public methods and properties of a class's own without a docstring; one that overrides may have its base's."""
    for name, member in vars(thing).items():
        function = getattr(member, "fget", None) or getattr(member, "__func__", None) or member
        if not name.startswith("_") and inspect.isfunction(function) and not inspect.getdoc(getattr(thing, name)):
            yield name


@pytest.mark.parametrize(("module", "name"), NAMES, ids=lambda value: getattr(value, "__name__", value))
def test_a_public_name_is_explained(module: ModuleType, name: str) -> None:
    assert not list(faults(name, getattr(module, name)))


def test_what_is_missing_is_found() -> None:
    def bare(x: int) -> int:
        return x

    def half(x: int) -> int:
        """Half of it."""
        return x // 2

    class Silent:
        """Says nothing of its method."""

        def run(self) -> None:
            pass

    assert list(faults("bare", bare)) == ["bare has no docstring"]
    assert list(faults("half", half)) == ["half: Args says nothing of x", "half: Returns is missing"]
    assert list(faults("Silent", Silent)) == ["Silent.run has no docstring"]
