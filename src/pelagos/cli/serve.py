"""`pelagos serve`; its options are the settings of the server, from a file and from flags."""

from collections.abc import Sequence


def main(argv: Sequence[str]) -> None:
    """Serve until told to end."""
    from pelagos.serve import read_settings, run

    run(read_settings(argv))
