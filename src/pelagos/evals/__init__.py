"""Measures of a model on text and tasks."""
