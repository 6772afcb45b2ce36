"""The command ``apt-lm``, under a name that no other package has: where another `apt` hides ours, it says so."""

import importlib
import sys


def main() -> int:
    """Run the command line. Where `apt` is another package (python3-apt of Debian), say which, and return 2."""
    try:
        command = importlib.import_module("apt.cli").main
    except ModuleNotFoundError as error:
        if error.name != "apt.cli":
            raise
        other = getattr(importlib.import_module("apt"), "__file__", None)
        print(
            f"apt-lm: error: the name apt stands for {other} here, which hides that of apt-lm; install apt-lm into a "
            f"virtual environment of its own (python3 -m venv, without --system-site-packages) and run it there",
            file=sys.stderr,
        )
        return 2
    code: int = command()
    return code


if __name__ == "__main__":
    sys.exit(main())
