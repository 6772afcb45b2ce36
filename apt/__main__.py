"""``python -m apt``."""

import sys

from apt.cli import main

if __name__ == "__main__":
    sys.exit(main())
