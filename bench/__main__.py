"""Run one benchmark: ``python3 -m bench NAME [options]``, the same as ``python3 -m bench.NAME``; no name: list all."""

import ast
import runpy
import sys
from pathlib import Path

HERE = Path(__file__).parent


def commands() -> dict[str, str]:
    """What can be run, by name, with the first sentence about it."""
    single = {path.stem: path for path in HERE.glob("*.py") if path != Path(__file__)}
    folders = {path.parent.name: path for path in HERE.glob("*/__main__.py")}
    found = {}
    for name, path in sorted((single | folders).items()):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        if any(isinstance(node, ast.If) and "__main__" in ast.unparse(node.test) for node in tree.body):
            found[name] = (ast.get_docstring(tree) or "").partition("\n")[0]
    return found


def main() -> int:
    name = sys.argv[1] if len(sys.argv) > 1 else ""
    known = commands()
    if name not in known:
        listed = "\n".join(f"  {each:<14} {said}" for each, said in known.items())
        if name:
            print(f"bench: there is no benchmark {name!r}; choose one of\n{listed}", file=sys.stderr)
            return 2
        print(f"python3 -m bench NAME [options]\n{listed}")
        return 0
    sys.argv = [f"bench.{name}", *sys.argv[2:]]
    runpy.run_module(f"bench.{name}", run_name="__main__", alter_sys=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
