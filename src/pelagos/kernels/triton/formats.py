"""The released number formats inside Triton kernels, exact and in integer arithmetic that every target has.

Source: numerics.py; the bit identities of E2M1 and E4M3 in bfloat16 hold for every finite code.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

PTX, ANY, INTERPRETER = "ptx", "any", "interpreter"  # what a kernel is made for


def target() -> str:
    """Return what kernels of this process are made for: PTX (Hopper and later) may use packed instructions."""
    if triton.knobs.runtime.interpret:
        return INTERPRETER
    return PTX if torch.version.hip is None and torch.cuda.get_device_capability() >= (9, 0) else ANY


def hopper(device: torch.device) -> bool:
    """Return whether kernels of this process run on compute capability 9.0, which alone takes those of `hopper_*`."""
    return target() == PTX and torch.cuda.get_device_capability(device) == (9, 0)


def launch(made_for: str, **options: int) -> dict[str, int | bool]:
    """Return launch options; where the target can, a kernel starts while the one before it ends."""
    return {**options, "launch_pdl": True} if made_for == PTX else options


# Four bytes of E2M1 pairs and their groups' scales to bfloat16: even columns in the first two registers. A nibble
# becomes the bits of value * 2^-126, which one packed multiply by scale * 2^126 turns into the value.
_SPREAD = tl.constexpr(
    """{
    .reg .b32 p, q, a;
    prmt.b32 p, $4, 0, 0x4140;
    prmt.b32 q, $4, 0, 0x4342;
    and.b32 a, p, 0x000F000F; mul.lo.u32 a, a, 0x1040; and.b32 a, a, 0x81C081C0; mul.rn.bf16x2 $0, a, $5;
    and.b32 a, q, 0x000F000F; mul.lo.u32 a, a, 0x1040; and.b32 a, a, 0x81C081C0; mul.rn.bf16x2 $1, a, $6;
    and.b32 a, p, 0x00F000F0; mul.lo.u32 a, a, 0x0104; and.b32 a, a, 0x81C081C0; mul.rn.bf16x2 $2, a, $5;
    and.b32 a, q, 0x00F000F0; mul.lo.u32 a, a, 0x0104; and.b32 a, a, 0x81C081C0; mul.rn.bf16x2 $3, a, $6;
    }"""
)

# Four E4M3 bytes to bfloat16: the bits of value * 2^-120, times 2^120 and their scale.
_WIDEN = tl.constexpr(
    """{
    .reg .b32 p, q, a, b;
    prmt.b32 p, $2, 0, 0x1404;
    prmt.b32 q, $2, 0, 0x3424;
    shr.u32 a, p, 4; and.b32 a, a, 0x07F007F0; and.b32 b, p, 0x80008000; or.b32 a, a, b; mul.rn.bf16x2 $0, a, $3;
    shr.u32 a, q, 4; and.b32 a, a, 0x07F007F0; and.b32 b, q, 0x80008000; or.b32 a, a, b; mul.rn.bf16x2 $1, a, $4;
    }"""
)


@triton.jit
def dot(a, b, total, TARGET: tl.constexpr):
    """total + a @ b of bfloat16 or E4M3 operands; the interpreter multiplies no bfloat16."""
    if TARGET == "interpreter":
        return tl.dot(a.to(tl.float32), b.to(tl.float32), total, input_precision="ieee")
    if TARGET == "ptx":  # the compiler sets no fence between its copies to shared memory and what the unit reads there
        tl.inline_asm_elementwise(
            "fence.proxy.async.shared::cta; mov.b32 $0, $1;", "=r,r", [tl.arange(0, 128)], dtype=tl.int32,
            is_pure=False, pack=1,
        )  # fmt: skip
    return tl.dot(a, b, total)


@triton.jit
def settled(total, TARGET: tl.constexpr):
    """`total`, waited for. At a loop's end the compiler may leave products of operands in registers in flight, and the
    next round's operands overwrite them."""
    if TARGET == "ptx":
        return tl.inline_asm_elementwise("mov.b32 $0, $1;", "=f,f", [total], dtype=tl.float32, is_pure=False, pack=1)
    return total


@triton.jit
def let_next_start(TARGET: tl.constexpr):
    """Allow the next kernel's programs onto the device; they wait for this kernel's results by themselves."""
    if TARGET == "ptx":
        gdc_launch_dependents()


@triton.jit
def wait_for_inputs(TARGET: tl.constexpr):
    """Wait for all that earlier kernels write; before it only weights may be read, and nothing written."""
    if TARGET == "ptx":
        gdc_wait()


@triton.jit
def meet(counter, count, TARGET: tl.constexpr):
    """Wait until `count` programs have come here; what they stored before is seen behind it. Each must `part` later.

    All of them have to be on the device together, so a launch may have no more than one for each multiprocessor. None
    of them is kept from it: programs of earlier launches end without waiting for later ones, and the next launch's
    begin only when all of this one have let them.
    """
    tl.debug_barrier()
    came = tl.atomic_add(counter, 1, sem="acq_rel") + 1
    if TARGET == "ptx":  # every thread looks for itself
        tl.inline_asm_elementwise(
            """{
            .reg .pred p; .reg .b32 n;
            again: ld.acquire.gpu.global.b32 n, [$1]; setp.lt.s32 p, n, $2; @p bra again;
            mov.b32 $0, n;
            }""",
            "=r,l,r", [counter.to(tl.uint64), count], dtype=tl.int32, is_pure=False, pack=1,
        )  # fmt: skip
    else:
        while came < count:
            came = tl.atomic_add(counter, 0, sem="acq_rel")
    tl.debug_barrier()


@triton.jit
def part(counter, count):
    """Leave a `meet`; the last of `count` programs to do so leaves zero."""
    if tl.atomic_add(counter, 1, sem="relaxed") == 2 * count - 1:
        tl.store(counter, 0)


@triton.jit
def reciprocal(x, TARGET: tl.constexpr):
    """1 / x of float32 x in 1e-6..1e6, within one unit in the last place."""
    if TARGET == "ptx":
        return tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=r,r", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    return 1.0 / x


@triton.jit
def pinned(x, TARGET: tl.constexpr):
    """bfloat16 x as it is, computed once: a matrix operand's layout would else make every warp compute all of it."""
    if TARGET == "ptx":
        return tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [x], dtype=tl.bfloat16, is_pure=False, pack=2)
    return x


@triton.jit
def power_of_two(byte):
    """float32 2^(byte - 127) of a UE8M0 byte >= 1."""
    return (byte.to(tl.int32) << 23).to(tl.float32, bitcast=True)


@triton.jit
def bits_to_bfloat16(bits):
    return bits.to(tl.uint16).to(tl.bfloat16, bitcast=True)


@triton.jit
def to_bfloat16(x, TARGET: tl.constexpr):
    """float32 x rounded to the nearest bfloat16, ties to even; the interpreter's own cast cuts."""
    if TARGET == "interpreter":
        bits = x.to(tl.int32, bitcast=True)
        return bits_to_bfloat16(((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16) & 0xFFFF)
    return x.to(tl.bfloat16)


@triton.jit
def rounded(x, TARGET: tl.constexpr):
    """float32 x rounded to the nearest bfloat16."""
    return to_bfloat16(x, TARGET).to(tl.float32)


@triton.jit
def e4m3_to_float(code):
    """float32 of E4M3 codes (any integer type, 0..255)."""
    wide = code.to(tl.int32)
    bits = ((wide & 0x80) << 24) | ((wide & 0x7F) << 20)
    return bits.to(tl.float32, bitcast=True) * 1.329227995784916e36  # 2^120


@triton.jit
def e4m3_times(code, byte, TARGET: tl.constexpr):
    """bfloat16 values of uint8 E4M3 codes times 2^(byte - 127), a scalar UE8M0 byte of 7..134; exact."""
    factor = bits_to_bfloat16((byte.to(tl.int32) + 120) << 7)
    if TARGET == "ptx":
        both = tl.zeros(code.shape, tl.bfloat16) + factor
        return tl.inline_asm_elementwise(_WIDEN, "=r,=r,r,r,r", [code, both], dtype=tl.bfloat16, is_pure=True, pack=4)
    return (e4m3_to_float(code) * power_of_two(byte)).to(tl.bfloat16)


@triton.jit
def expert_scale(byte):
    """bfloat16 2^(byte - 1): what `e2m1_pair` multiplies the bits of a code by; byte <= 128."""
    return bits_to_bfloat16((byte.to(tl.int32) + 126) << 7)


@triton.jit
def e2m1_pair(byte, scale, TARGET: tl.constexpr):
    """bfloat16 (even, odd) columns of packed E2M1 bytes; scale is `expert_scale` of each byte's group.

    PTX takes four bytes at a time.
    """
    if TARGET == "ptx":
        even, odd = tl.inline_asm_elementwise(
            _SPREAD, "=r,=r,=r,=r,r,r,r", [byte, scale], dtype=(tl.bfloat16, tl.bfloat16), is_pure=True, pack=4
        )
    else:
        wide = byte.to(tl.int32)
        factor = scale.to(tl.float32)
        even = ((((wide & 0x08) << 28) | ((wide & 0x07) << 22)).to(tl.float32, bitcast=True) * factor).to(tl.bfloat16)
        odd = ((((wide & 0x80) << 24) | ((wide & 0x70) << 18)).to(tl.float32, bitcast=True) * factor).to(tl.bfloat16)
    return even, odd


# Four bytes of E2M1 pairs to E4M3 of value * 2^-6: even columns, then odd ones.
_NIBBLES = tl.constexpr(
    """{
    .reg .b32 a, b;
    shl.b32 a, $2, 4; shl.b32 b, $2, 2; and.b32 b, b, 0x1C1C1C1C; and.b32 a, a, 0x80808080; or.b32 $0, a, b;
    shr.u32 b, $2, 2; and.b32 b, b, 0x1C1C1C1C; and.b32 a, $2, 0x80808080; or.b32 $1, a, b;
    }"""
)


@triton.jit
def e2m1_to_e4m3(byte, TARGET: tl.constexpr):
    """E4M3 (even, odd) columns of packed E2M1 bytes times 2^-6, exact; codes where the target has no such type."""
    if TARGET == "ptx":
        even, odd = tl.inline_asm_elementwise(
            _NIBBLES, "=r,=r,r", [byte], dtype=(tl.float8e4nv, tl.float8e4nv), is_pure=True, pack=4
        )
    else:
        wide = byte.to(tl.int32)
        even = (((wide << 4) & 0x80) | ((wide << 2) & 0x1C)).to(tl.uint8)
        odd = ((wide & 0x80) | ((wide >> 2) & 0x1C)).to(tl.uint8)
    return even, odd


@triton.jit
def fp8_scale_exponent(amax):
    """int32 UE8M0 byte of the smallest power of two >= max(amax, 1e-4) / 448."""
    bits = tl.div_rn(tl.maximum(amax, 1e-4), 448.0).to(tl.int32, bitcast=True)
    return (bits >> 23) + tl.where((bits & 0x7FFFFF) != 0, 1, 0)


@triton.jit
def round_to_e4m3(x):
    """float32 |x| <= 448 rounded to the nearest E4M3 value, ties to even: one addition far above and back."""
    exponent = tl.maximum((x.to(tl.int32, bitcast=True) >> 23) & 0xFF, 121)
    far = (exponent + 20 << 23).to(tl.float32, bitcast=True) * 1.5
    return (x + far) - far


@triton.jit
def quantise_block(x, exponent):
    """float32 E4M3 values of x / 2^(exponent - 127), clamped to 448."""
    inverse = ((254 - exponent) << 23).to(tl.float32, bitcast=True)
    return round_to_e4m3(tl.minimum(tl.maximum(x * inverse, -448.0), 448.0))


@triton.jit
def e4m3_code(value):
    """uint8 codes of float32 values that are E4M3 values."""
    bits = value.to(tl.int32, bitcast=True)
    magnitude = tl.abs(value)
    normal = ((bits & 0x7FFFFFFF) >> 20) - 960
    code = tl.where(magnitude >= 0.015625, normal, (magnitude * 512.0).to(tl.int32))
    return (code | ((bits >> 24) & 0x80)).to(tl.uint8)


@triton.jit
def e4m3_block(x, exponent):
    """uint8 codes of `quantise_block`."""
    return e4m3_code(quantise_block(x, exponent))
