"""Pelagos: the DeepSeek-V4 system in Python. See `docs/tour.md` for the way in."""
