"""Join checkpoint and model: fill a Transformer from named tensors, and write one back.

Names, shapes and kinds are compared before any value is read, so a wrong checkpoint fails in a second.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from pelagos.checkpoint import Checkpoint, TensorInfo, open_checkpoint, resolve_model, write_checkpoint
from pelagos.checkpoint.write import SHARD_BYTES
from pelagos.config import ModelConfig
from pelagos.errors import CheckpointError, ConfigError
from pelagos.model import Transformer
from pelagos.model.cuda_group import cut_tensors, cut_width
from pelagos.model.cuda_weights import Weights
from pelagos.model.streaming import ExpertBlocks, ExpertStore, StreamedExperts
from pelagos.model.transformer import Block

_LISTED = 5  # names an error lists before it only counts
_log = logging.getLogger(__name__)


def load_model(
    path_or_name: str | Path,
    *,
    mode: str = "reference",
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    expert_bytes: int | None = None,
    part: Callable[[Transformer], object] | None = None,
) -> Transformer:
    """Load a bundled name, a directory or a cached hub id into a Transformer in evaluation state.

    `dtype` (None = float32) is the parameters' and the carrier's. With `expert_bytes` routed experts are read when they
    are chosen and so many bytes of them kept. `part` may cut the model, before it has memory: what is left is read. Of
    a GA build the backbone is loaded and a logged notice says which draft was left out. Raises CheckpointError naming
    tensor, file, expected and got; ConfigError for a bad `config.json`, mode, dtype or device. Peak memory is the model
    plus one tensor.
    """
    dtype = torch.float32 if dtype is None else dtype
    if not dtype.is_floating_point or dtype.itemsize < 2:
        raise ConfigError(f"dtype={dtype}: expected float32, bfloat16, float16 or float64")
    target = usable_device("cpu" if device is None else device)
    checkpoint, config, found = _opened(path_or_name)
    model = Transformer(config, mode=mode, dtype=dtype, device="meta")
    _compare(checkpoint.path, {name: tensor for name, tensor, _ in model.released_tensors()}, found)
    if part is not None:
        part(model)
    if expert_bytes is not None:
        if dtype != torch.float32 or target.type != "cpu":
            raise ConfigError(
                f"expert_bytes={expert_bytes}: for float32 on a CPU or released mode on CUDA, not {dtype} on {target}"
            )
        _stream_experts(model, checkpoint, expert_bytes)
    model.to_empty(device=target)
    targets = {name: tensor for name, tensor, _ in model.released_tensors(streamed=False)}
    with torch.no_grad():
        for name, values, stored in checkpoint.stream(targets):
            targets[name].copy_(values)
            model.set_format(name, stored)
    return model.eval()


def _stream_experts(model: Transformer, checkpoint: Checkpoint, budget_bytes: int) -> None:
    """Put experts that stay in the checkpoint's file in the place of the model's."""

    def read(names: Sequence[str]) -> dict[str, Tensor]:
        return {name: values for name, values, _ in checkpoint.stream(names)}

    infos = {name: info for name, info in checkpoint.tensors.items() if ".ffn.experts." in name}
    kinds = {info.format if info.scale is None else info.scale.dtype for info in infos.values()}
    sizes = {name: info.num_bytes for name, info in infos.items()}
    store = ExpertStore(model.config, read, sizes, budget_bytes, narrow=kinds <= {"bf16", "F8_E8M0"})
    for layer, block in enumerate((*model.blocks, *model.mtp)):
        assert isinstance(block, Block)
        block.ffn.experts = StreamedExperts(block.ffn.experts, store, layer)
    for name, info in infos.items():
        model.set_format(name, info.format)


def load_served(
    path_or_name: str | Path,
    *,
    mode: str = "reference",
    device: torch.device | str | None = None,
    expert_bytes: int | None = None,
) -> Transformer | Weights:
    """Load what an engine serves: on CUDA in released mode packed weights if kernels take their shapes, else a model.

    Raises as `load_model`.
    """
    if mode == "released" and device is not None and usable_device(device).type == "cuda":
        try:
            weights = load_weights(path_or_name, device, expert_bytes=expert_bytes)
            weights.bases()  # refuses scales that the kernels of prompts do not take
            return weights
        except (ConfigError, CheckpointError) as error:  # what is wrong with the files themselves is said again below
            _log.warning("the captured step does not take this model, it runs in torch: %s", error)
    return load_model(path_or_name, mode=mode, device=device, expert_bytes=expert_bytes)


def load_weights(
    path_or_name: str | Path,
    device: torch.device | str,
    *,
    expert_bytes: int | None = None,
    rank: int = 0,
    ranks: int = 1,
) -> Weights:
    """Load a checkpoint into the merged weights of the captured step, packed as released; one tensor at a time.

    With `expert_bytes` so many bytes of routed experts are on the device, the others in host memory. Of several
    `ranks` each has a part of every expert's width (`model.cuda_group`). Raises as `load_model`, and CheckpointError
    for values that the released formats do not hold.
    """
    target = usable_device(device)
    checkpoint, config, names = _opened(path_or_name)
    config = cut_width(config, ranks) if ranks > 1 else config
    blocks = None if expert_bytes is None else ExpertBlocks(config, target, expert_bytes)
    tensors = ((name, values) for name, values, _ in checkpoint.stream(names))
    return Weights(config, target, blocks).fill(cut_tensors(tensors, rank, ranks))


def save_model(model: Transformer, path: str | Path, *, shard_bytes: int = SHARD_BYTES, exact: bool = False) -> None:
    """Write a model as a released-format checkpoint directory, atomically; the tokenizer is the caller's to copy.

    With `exact` every float tensor is stored in float32 instead of the release's FP8, FP4 and BF16.
    Raises CheckpointError when a value does not fit its format or the disk fails; an old checkpoint then stays.
    """
    tensors = (
        (name, tensor, "f32" if exact and tensor.is_floating_point() else release)
        for name, tensor, release in model.released_tensors()
    )
    write_checkpoint(path, tensors, model.config, shard_bytes=shard_bytes)


def usable_device(device: torch.device | str) -> torch.device:
    """Return the device a name stands for; raises ConfigError unless it can compute here."""
    try:
        found = torch.device(device)
        torch.zeros(1, device=found).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).partition("\n")[0]
        raise ConfigError(f"device {str(device)!r} is not usable here ({reason}); try --device cpu") from None
    return found


def _opened(path_or_name: str | Path) -> tuple[Checkpoint, ModelConfig, dict[str, TensorInfo]]:
    """Open a checkpoint; return config and tensors of what this build has, and say which draft is left out."""
    checkpoint = open_checkpoint(resolve_model(path_or_name))
    found = dict(checkpoint.tensors)
    if checkpoint.draft == "dspark":
        left = {name: found.pop(name) for name in checkpoint.tensors if name.startswith("mtp.")}
        stages, size = len({name.split(".")[1] for name in left}), sum(info.num_bytes for info in left.values())
        _log.warning(
            "%s: backbone loaded, DSpark draft left out (%d stages mtp.*, %d tensors, %d bytes)",
            checkpoint.path, stages, len(left), size,
        )  # fmt: skip
    elif checkpoint.draft is None and checkpoint.config.num_nextn_predict_layers:
        _log.warning("%s: config.json announces an MTP draft, the files hold none; loaded without", checkpoint.path)
    drafts = int(checkpoint.draft == "mtp")
    return checkpoint, dataclasses.replace(checkpoint.config, num_nextn_predict_layers=drafts), found


def _compare(path: Path, wanted: dict[str, Tensor], found: dict[str, TensorInfo]) -> None:
    """Raise CheckpointError unless the checkpoint holds exactly the model's tensors in their shapes and kinds."""
    missing = [f"{name} {list(wanted[name].shape)}" for name in wanted if name not in found]
    extra = [
        f"{name} {list(info.shape)} in {info.stored.file.name}" for name, info in found.items() if name not in wanted
    ]
    if missing or extra:
        said = [f"{len(each)} {what}: {_some(each)}" for what, each in (("missing", missing), ("extra", extra)) if each]
        raise CheckpointError(f"{path}: expected the {len(wanted)} tensors of config.json; {'; '.join(said)}")
    for name, info in found.items():
        expected = tuple(wanted[name].shape)
        if info.shape != expected:
            raise CheckpointError(
                f"{info.stored.place}: {info.format} values of shape {list(info.shape)}, "
                f"expected {list(expected)} by config.json"
            )
        if (info.format == "i64") == wanted[name].is_floating_point():
            kind = "a float format" if wanted[name].is_floating_point() else "I64 or I32"
            raise CheckpointError(f"{info.stored.place}: dtype {info.stored.dtype}, expected {kind}")


def _some(items: list[str]) -> str:
    rest = len(items) - _LISTED
    return ", ".join(items[:_LISTED]) + (f" and {rest} more" if rest > 0 else "")
