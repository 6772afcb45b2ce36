"""How much code there is: ``python -m bench.code_size [REF ...]``, of this tree and of each git revision beside it.

Nodes are those of the syntax tree, docstrings left out: they do not fall when a line is only made longer, or a comment
shorter. Lines are all lines of the files, or from ``def`` to the end of a function. Names are what ``ls`` shows of a
folder, files and folders with Python in them.
"""

import argparse
import ast
import io
import subprocess
import tarfile
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
FOLDERS = ("apt", "apt_kernels", "bench", "tests")
LONG = (50, 60)  # lines of a function
HEADERS = ("nodes", "statements", "lines", "functions", *(f"over {lines}" for lines in LONG), "names", "tests")
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
DOCUMENTED = (ast.Module, ast.ClassDef, *FUNCTIONS)
Files = dict[str, str]  # path from the root -> text


def files_here(root: Path) -> Files:
    """The Python files of the working tree that git does not ignore, new ones too."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "--", "*.py"]
    listing = subprocess.run(command, cwd=root, check=True, stdout=subprocess.PIPE, text=True).stdout
    return {name: (root / name).read_text(encoding="utf-8") for name in listing.splitlines() if (root / name).exists()}


def files_at(ref: str, root: Path) -> Files:
    """The Python files of a git revision."""
    archive = subprocess.run(["git", "archive", ref], cwd=root, check=True, stdout=subprocess.PIPE).stdout
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        members = [member for member in tar if member.isfile() and member.name.endswith(".py")]
        return {member.name: tar.extractfile(member).read().decode("utf-8") for member in members}


def nodes_of(tree: ast.AST) -> Iterator[ast.AST]:
    """A node and every node below it, without the docstrings."""
    docstring = None
    if isinstance(tree, DOCUMENTED) and ast.get_docstring(tree) is not None:
        docstring = tree.body[0]
    yield tree
    for child in ast.iter_child_nodes(tree):
        if child is not docstring:
            yield from nodes_of(child)


def size_of(files: Files, folder: str) -> tuple[int, ...]:
    """The counts of a folder, in the order of `HEADERS`."""
    own = {name: text for name, text in files.items() if name.startswith(f"{folder}/")}
    nodes = [node for text in own.values() for node in nodes_of(ast.parse(text))]
    functions = [node for node in nodes if isinstance(node, FUNCTIONS)]
    lengths = [function.end_lineno - function.lineno + 1 for function in functions]
    return (
        len(nodes),
        sum(isinstance(node, ast.stmt) for node in nodes),
        sum(len(text.splitlines()) for text in own.values()),
        len(functions),
        *(sum(length > most for length in lengths) for most in LONG),
        len({name.split("/")[1] for name in own}),
        sum(function.name.startswith("test_") for function in functions),
    )


def table(trees: dict[str, Files]) -> str:
    """A row for each folder and tree."""
    lines = [["folder", "tree", *HEADERS], ["---", "---", *["---:"] * len(HEADERS)]]
    for folder in FOLDERS:
        lines += [[folder, name, *map("{:,}".format, size_of(files, folder))] for name, files in trees.items()]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def main(argv: list[str] | None = None, root: Path = ROOT) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("refs", nargs="*", metavar="REF", help="any name that git knows")
    refs = parser.parse_args(argv).refs
    print(table({"here": files_here(root)} | {ref: files_at(ref, root) for ref in refs}))


if __name__ == "__main__":
    main()
