"""Tool-call ids as DeepSeek's service makes them: an index, random letters and digits, a checksum."""

import random
import string

# The first 32 bytes of XXH3's secret and its constants (xxHash specification): enough for inputs of 17 to 32 bytes.
_SECRET = bytes.fromhex("b8fe6c3923a44bbe7c01812cf721ad1cded46de9839097db7240a4a4b7b3671f")
_PRIME, _AVALANCHE, _MASK = 0x9E3779B185EBCA87, 0x165667919E3779F9, (1 << 64) - 1


def new_tool_call_id(index: int, *, empty_reasoning: bool, rng: random.Random) -> str:
    """Return an id like `call_00_...`; `ET_` marks a thinking turn with empty reasoning. Source: deepseek-recipe."""
    letters = "".join(rng.choices(string.ascii_letters + string.digits, k=20))
    stem = f"call_{index:02}_{'ET_' if empty_reasoning else ''}{letters}"
    return f"{stem}{_xxh3_64(stem.replace('_', '').encode()) % 10_000:04}"


def _xxh3_64(data: bytes) -> int:
    total = len(data) * _PRIME
    for lane, secret in ((data[:16], _SECRET[:16]), (data[-16:], _SECRET[16:])):
        mixed = int.from_bytes(lane, "little") ^ int.from_bytes(secret, "little")
        product = (mixed & _MASK) * (mixed >> 64)
        total += (product & _MASK) ^ (product >> 64)
    total &= _MASK
    total = (total ^ (total >> 37)) * _AVALANCHE & _MASK
    return total ^ (total >> 32)
