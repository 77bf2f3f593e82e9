"""Operators of the V4 forward. `ref/` holds their meaning in plain torch; it runs on any device."""
