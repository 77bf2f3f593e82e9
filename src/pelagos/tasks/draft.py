"""What a template gives: words, files, a solution and a check; and the made-up names templates share."""

import random
from dataclasses import dataclass

WORDS = (
    "amber anchor basil birch cedar cobalt copper coral delta ember falcon fern flint garnet harbor hazel indigo iris "
    "ivory jasper juniper kelp lagoon linen maple marble meadow moss nectar oak olive onyx opal orchid pearl pine plum "
    "quartz raven reef river rowan saffron sage sable silver slate sorrel tawny thistle topaz umber velvet willow"
).split()


@dataclass(frozen=True, slots=True)
class Draft:
    """One task before it has a folder: a file whose content starts with "-> " is a link to what follows."""

    instruction: str
    files: dict[str, str]
    solution: str  # a shell script, run in /workspace
    check: str  # Python after a prelude (`read`, `run`); an exception fails it


def words(r: random.Random, n: int) -> list[str]:
    """Return n different words."""
    return r.sample(WORDS, n)


def moment(second: int) -> str:
    """Return an ISO time so many seconds into a made-up day."""
    return f"2031-04-{11 + second // 86400:02d}T{second // 3600 % 24:02d}:{second // 60 % 60:02d}:{second % 60:02d}Z"
