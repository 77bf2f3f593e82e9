"""Measures of a model on text and tasks and of the engine, and completion of files of requests."""
