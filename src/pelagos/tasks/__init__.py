"""Environments for agents: task folders in the Harbor layout, made from templates, run in a sandbox, graded outside."""

from pelagos.tasks.environment import Grade, Task, grade, image_of, load, load_all, solve
from pelagos.tasks.generate import KINDS, write_all

__all__ = ["KINDS", "Grade", "Task", "grade", "image_of", "load", "load_all", "solve", "write_all"]
