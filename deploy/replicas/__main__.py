"""`python -m deploy.replicas`: classes must come from modules that other processes can import, so none is here."""

import sys

from deploy.replicas.front import main

from pelagos.errors import PelagosError

if __name__ == "__main__":
    try:
        main()
    except PelagosError as error:
        sys.exit(f"error: {error}")
