"""Checkpoints: named tensors in and out of sharded safetensors, in the released format; knows no model."""

from pelagos.checkpoint.read import Checkpoint, TensorInfo, open_checkpoint, resolve_model
from pelagos.checkpoint.write import write_checkpoint

__all__ = ["Checkpoint", "TensorInfo", "open_checkpoint", "resolve_model", "write_checkpoint"]
