"""Measures of a model on text and tasks, and of the engine."""
