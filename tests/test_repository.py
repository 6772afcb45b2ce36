"""What the text of the repository promises: no path of one machine, examples that parse, links that lead somewhere."""

import ast
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "bench").rglob("*.md")])
MACHINE_PATHS = [b"/" + name + b"/" for name in (b"work", b"farm")]
CODE = sorted(path for top in ("apt", "apt_kernels") for path in (ROOT / top).rglob("*.py"))
LONGEST = 60  # lines of a function, as CONTRIBUTING.md says
FENCE = re.compile(r"^( *)```(\w*)\n(.*?)^\1```", re.MULTILINE | re.DOTALL)
TEST = re.compile(r"`(tests/[\w/]+\.py)::(\w+)`")
LINK = re.compile(r"\]\(([^)\s]+)\)")


def page_id(path: Path) -> str:
    return str(path.relative_to(ROOT))


def test_one_version() -> None:
    first = [
        re.search(pattern, (ROOT / name).read_text(encoding="utf-8"), re.MULTILINE)
        for name, pattern in [
            ("setup.py", r'version="(.+)"'),
            ("apt/version.py", r'^__version__ = "(.+)"'),
            ("CHANGELOG.md", r"^## (\S+)"),
        ]
    ]
    assert len({match and match[1] for match in first}) == 1


def test_no_path_of_a_development_machine() -> None:
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listing = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if listing.returncode:
        pytest.skip("not a git checkout")
    paths = [ROOT / line for line in listing.stdout.splitlines()]
    found = [
        f"{path.relative_to(ROOT)}: {pattern.decode()}"
        for path in paths
        for pattern in MACHINE_PATHS
        if path.is_file() and pattern in path.read_bytes()
    ]
    assert not found


def test_the_page_of_settings_is_what_the_code_says() -> None:
    """Made in a process of its own, as it imports the package."""
    code = "import make_settings as m, sys; sys.exit(m.page() != m.PAGE.read_text(encoding='utf-8'))"
    path = os.pathsep.join(map(str, (ROOT, ROOT / "docs")))
    command = [sys.executable, "-c", code]
    run = subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, check=False)
    assert run.returncode == 0, f"docs/settings.md is stale; run: python docs/make_settings.py {run.stderr}"


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_python_in_pages_parses(page: Path) -> None:
    for _, language, code in FENCE.findall(page.read_text(encoding="utf-8")):
        if language == "python":
            ast.parse(textwrap.dedent(code), filename=page.name)


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_relative_links_lead_somewhere(page: Path) -> None:
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    targets = [link.partition("#")[0] for link in LINK.findall(text) if "://" not in link]
    broken = [target for target in targets if target and not (page.parent / target).exists()]
    assert not broken


def test_the_index_of_the_pages_names_each() -> None:
    index = ROOT / "docs/README.md"
    links = LINK.findall(index.read_text(encoding="utf-8"))
    assert not {path.name for path in index.parent.glob("*.md")} - {*links, index.name}


def lost_tests(text: str) -> list[str]:
    """The last cells of the rows of tables that name no test which is there."""
    lost = []
    for row in re.findall(r"^\| (?!case )(.+) \|$", text, re.MULTILINE):
        cells = row.split(" | ")
        found = TEST.fullmatch(cells[-1])
        path = ROOT / found[1] if found else None
        tree = ast.parse(path.read_text(encoding="utf-8") if path is not None and path.is_file() else "")
        names = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
        if len(cells) != 4 or found is None or found[2] not in names:
            lost.append(row)
    return lost


def test_each_case_of_the_corners_has_the_test_that_it_names() -> None:
    text = (ROOT / "tests/corners.md").read_text(encoding="utf-8")
    assert len(TEST.findall(text)) > 100
    assert not lost_tests(text)
    there = "`tests/test_repository.py::test_one_version`"
    assert not lost_tests(f"| a | b | c | {there} |")
    for cell in (there.replace("version", "thing"), there.replace("tests/", "tests/no/"), "", f"{there} too"):
        assert lost_tests(f"| a | b | c | {cell} |")


@pytest.mark.parametrize("path", CODE, ids=page_id)
def test_one_idea_a_line(path: Path) -> None:
    """What CONTRIBUTING.md says of long functions, of docstrings and of nested conditional expressions."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert (node.end_lineno or 0) - node.lineno < LONGEST, f"{node.name} has more than {LONGEST} lines"
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            assert not (ast.get_docstring(node) or "").startswith("Of "), ast.get_docstring(node)
        if isinstance(node, ast.IfExp):
            nested = [inner for inner in ast.walk(node) if inner is not node and isinstance(inner, ast.IfExp)]
            assert not nested, f"line {node.lineno}: {ast.unparse(node)}"


def test_the_limit_of_a_function_is_told_once() -> None:
    assert f"a function at most {LONGEST} lines" in (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
