"""The released number formats, bit-exact: FP8 e4m3, FP4 e2m1 and their UE8M0 power-of-two scales.

Owns encode, decode and the fake-quantisation of training, which equals decode(encode(x)) bitwise.
Source: technical report 5.2.1 and the released inference/kernel.py and convert.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pelagos.errors import CheckpointError

E4M3_MAX = 448.0
E2M1_MAX = 6.0
FP8_BLOCK = (128, 128)  # weights
ACT_BLOCK = (1, 128)  # activations entering an FP8 or FP4 product
KV_BLOCK = (1, 64)  # nope dims of a cached entry
FP4_GROUP = 32
E2M1_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
# Below this amax the released kernels stop shrinking the scale, so an all-zero block has a finite one.
FP8_AMAX_FLOOR = 1e-4
FP4_AMAX_FLOOR = 6.0 * 2.0**-126
# E4M3 holds 0.5 * 2^k exactly down to k = -8 and 6 * 2^k up to k = 6: 14 binades of scale in one block.
LOSSLESS_BINADES = 14


def ceil_power_of_two(x: Tensor) -> Tensor:
    """Return the smallest power of two >= x for positive normal float32 x, by exponent bits, never by a logarithm."""
    bits = x.contiguous().view(torch.int32)
    exponent = (bits >> 23) + (bits & 0x7FFFFF != 0).to(torch.int32)
    return (exponent.clamp(1, 254) << 23).view(torch.float32)


def _scale(amax: Tensor, largest: float, floor: float) -> Tensor:
    return ceil_power_of_two(amax.float().clamp_min(floor) / largest)


def _blocked(x: Tensor, block: tuple[int, int]) -> Tensor:
    """View (..., R, C) float as (..., R/r, r, C/c, c), zero-padded to whole blocks."""
    rows, cols = block
    pad_rows, pad_cols = -x.shape[-2] % rows, -x.shape[-1] % cols
    if pad_rows or pad_cols:
        x = torch.nn.functional.pad(x, (0, pad_cols, 0, pad_rows))
    return x.unflatten(-1, (-1, cols)).unflatten(-3, (-1, rows))


def _block_scale(x: Tensor, block: tuple[int, int], largest: float, floor: float) -> Tensor:
    """Return float32 power-of-two scales: (..., R/r, C/c) for x (..., R, C), (..., C/c) when r is 1."""
    if block[0] == 1 and x.shape[-1] % block[1] == 0:
        return _scale(x.unflatten(-1, (-1, block[1])).abs().amax(-1), largest, floor)
    return _scale(_blocked(x, block).abs().amax((-3, -1)), largest, floor)


def _spread(scale: Tensor, shape: torch.Size, block: tuple[int, int]) -> Tensor:
    """Repeat block scales to one scale per element of `shape`."""
    if block[0] > 1:
        scale = scale.repeat_interleave(block[0], -2)[..., : shape[-2], :]
    return scale.repeat_interleave(block[1], -1)[..., : shape[-1]]


def encode_fp8(x: Tensor, block: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Quantise x (..., R, C) to e4m3 with one UE8M0 scale per block.

    Returns float8_e4m3fn (..., R, C) and float8_e8m0fnu (..., ceil(R/r), ceil(C/c)). Source: kernel.py act_quant.
    """
    x = x.float()
    scale = _block_scale(x, block, E4M3_MAX, FP8_AMAX_FLOOR)
    codes = _to_e4m3(x / _spread(scale, x.shape, block))
    return codes, scale.to(torch.float8_e8m0fnu)


def _to_e4m3(x: Tensor) -> Tensor:
    return x.clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)


def decode_fp8(codes: Tensor, scale: Tensor, block: tuple[int, int]) -> Tensor:
    """Return the float32 values of e4m3 codes (..., R, C) under UE8M0 or float32 block scales.

    Raises CheckpointError when the scale has not one entry a block.
    """
    expected = (-(-codes.shape[-2] // block[0]), -(-codes.shape[-1] // block[1]))
    if tuple(scale.shape[-2:]) != expected:
        raise CheckpointError(
            f"FP8 scale {tuple(scale.shape)} for weight {tuple(codes.shape)}: expected {expected} blocks of {block}"
        )
    return codes.float() * _spread(scale.float(), codes.shape, block)


def _e2m1_codes(x: Tensor) -> Tensor:
    """Round float32 |x| <= 6 to e2m1; uint8 nibbles with the sign in bit 3."""
    magnitude = _round_e2m1(x).abs()
    code = torch.bucketize(magnitude, torch.tensor(E2M1_VALUES, device=x.device), out_int32=True).to(torch.uint8)
    return code | (torch.signbit(x).to(torch.uint8) << 3)


def _round_e2m1(x: Tensor) -> Tensor:
    """Round float32 x to the nearest e2m1 value, at most 6, ties to the even code."""
    magnitude = x.abs().clamp_max(E2M1_MAX)
    # Steps are 0.5 below 2, 1 below 4, 2 above; torch.round ties to even multiples, which are the even codes.
    step = torch.where(magnitude < 2.0, 0.5, torch.where(magnitude < 4.0, 1.0, 2.0))
    return torch.copysign(torch.round(magnitude / step) * step, x)


def encode_fp4(x: Tensor) -> tuple[Tensor, Tensor]:
    """Quantise x (..., C) to e2m1, two a byte (low nibble = even column), one UE8M0 scale per 32 columns.

    Returns int8 (..., C/2) and float8_e8m0fnu (..., C/32); raises CheckpointError when 32 does not divide C.
    Source: technical report 5.2.1; kernel.py fp4_act_quant.
    """
    _check_group(x.shape[-1])
    x = x.float()
    scale = _block_scale(x, (1, FP4_GROUP), E2M1_MAX, FP4_AMAX_FLOOR)
    codes = _e2m1_codes((x / scale.repeat_interleave(FP4_GROUP, -1)).clamp(-E2M1_MAX, E2M1_MAX))
    packed = codes[..., 0::2] | (codes[..., 1::2] << 4)
    return packed.view(torch.int8), scale.to(torch.float8_e8m0fnu)


def decode_fp4(packed: Tensor, scale: Tensor) -> Tensor:
    """Return float32 (..., C) from packed e2m1 (..., C/2) int8 and its scales (..., C/32).

    Raises CheckpointError when the scale does not fit.
    """
    columns = packed.shape[-1] * 2
    if tuple(scale.shape) != (*packed.shape[:-1], -(-columns // FP4_GROUP)):
        raise CheckpointError(f"FP4 scale {tuple(scale.shape)} for {columns} columns: expected one per {FP4_GROUP}")
    table = torch.tensor(E2M1_VALUES + tuple(-v for v in E2M1_VALUES), device=packed.device)
    byte = packed.view(torch.uint8)
    codes = torch.stack((byte & 0xF, byte >> 4), -1).flatten(-2)
    return table[codes.int()] * scale.float().repeat_interleave(FP4_GROUP, -1)


def encode_weight(x: Tensor, format: str) -> tuple[Tensor, Tensor]:
    """Quantise a weight as released in `fp8` or `fp4`."""
    return encode_fp8(x, FP8_BLOCK) if format == "fp8" else encode_fp4(x)


def decode_weight(codes: Tensor, scale: Tensor, format: str) -> Tensor:
    """Return the float32 values of a weight stored in `fp8` or `fp4`; raises CheckpointError for a wrong scale."""
    return decode_fp8(codes, scale, FP8_BLOCK) if format == "fp8" else decode_fp4(codes, scale)


def _check_group(columns: int) -> None:
    if columns % FP4_GROUP:
        raise CheckpointError(f"FP4 needs a multiple of {FP4_GROUP} columns, got {columns}")


class _StraightThrough(torch.autograd.Function):
    """Forward the second argument, hand the gradient to the first; exact where x + (q - x).detach() is not."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor, quantised: Tensor) -> Tensor:
        ctx.set_materialize_grads(False)  # what has no gradient leaves none, not zeros
        return quantised.view_as(quantised)

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return grad, None


def straight_through(x: Tensor, quantised: Tensor) -> Tensor:
    """Return what stands for x; x takes its gradient, in its own dtype."""
    return _StraightThrough.apply(x, quantised) if x.requires_grad else quantised


def fake_quant_fp8(x: Tensor, block: tuple[int, int]) -> Tensor:
    """Return decode_fp8(encode_fp8(x)) in x's dtype, bitwise, with a straight-through gradient.

    x (..., R, C) or, for blocks of one row, (..., C); any float dtype.
    """
    plain = x.detach().float()
    scale = _spread(_block_scale(plain, block, E4M3_MAX, FP8_AMAX_FLOOR), plain.shape, block)
    return straight_through(x, (_to_e4m3(plain / scale).float() * scale).to(x.dtype))


def fake_quant_fp4(x: Tensor) -> Tensor:
    """Return decode_fp4(encode_fp4(x)) in x's dtype, bitwise, with a straight-through gradient; x (..., C)."""
    _check_group(x.shape[-1])
    plain = x.detach().float().unflatten(-1, (-1, FP4_GROUP))
    scale = _scale(plain.abs().amax(-1, keepdim=True), E2M1_MAX, FP4_AMAX_FLOOR)
    return straight_through(x, (_round_e2m1(plain / scale) * scale).flatten(-2).to(x.dtype))


def hadamard(x: Tensor) -> Tensor:
    """Multiply the last dimension (a power of two, n) by the Sylvester-Hadamard matrix times n^-0.5; keeps the dtype.

    Source: inference/model.py rotate_activation.
    """
    n = x.shape[-1]
    if n & (n - 1):
        raise CheckpointError(f"Hadamard needs a power of two, got {n}")
    matrix = torch.ones(1, 1, device=x.device)
    while len(matrix) < n:
        matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)))
    return x @ (matrix * n**-0.5).to(x.dtype)
