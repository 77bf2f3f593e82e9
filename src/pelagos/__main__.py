"""`python -m pelagos COMMAND`: the same as the `pelagos` program."""

import sys

from pelagos.cli import main

if __name__ == "__main__":
    sys.exit(main())
