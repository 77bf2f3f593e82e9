"""Rows of the cache pools as tensors: the float32 layout and the released one, read and written by index.

Source: kernels/layout.py for the places, numerics.py for the formats.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pelagos import numerics
from pelagos.kernels.layout import CacheLayout, Section, Tail

Parts = tuple[Tensor, ...]


class Rows:
    """The rows of one section in every unit (page or slot) of a pool (N, bytes) uint8. This class keeps float32."""

    def __init__(self, pool: Tensor, section: Section, dtypes: tuple[torch.dtype, ...] = (torch.float32,)) -> None:
        self.count, self.width = section.rows, section.width
        self.parts = [_Part(pool, section, index, dtype) for index, dtype in enumerate(dtypes)]

    def encode(self, values: Tensor) -> Parts:
        """Return the stored parts (..., elements) of values (..., width)."""
        return (values.float(),)

    def decode(self, parts: Parts) -> Tensor:
        """Return the float32 values (..., width) that stored parts stand for."""
        return parts[0]

    def read(self, unit: Tensor, row: Tensor) -> Tensor:
        """Return values (..., width) float32 of rows `row` of units `unit`, int64 (...) that broadcast."""
        return self.decode(tuple(part.read(unit, row) for part in self.parts))

    def write(self, unit: Tensor, row: Tensor, parts: Parts) -> None:
        """Store parts (N, elements) as rows `row` (N,) of units `unit` (N,)."""
        for place, part in zip(self.parts, parts, strict=True):
            place.rows[unit, row] = part


class _Part:
    """Part `index` of a section as elements of `dtype`."""

    def __init__(self, pool: Tensor, section: Section, index: int, dtype: torch.dtype) -> None:
        begin, size = section.part(index), section.parts[index]
        self.rows = pool[:, begin : begin + section.rows * size].view(dtype).unflatten(1, (section.rows, -1))
        whole, width = pool.view(dtype), self.rows.shape[2]
        begin //= dtype.itemsize
        # A row every `grid` elements: overlapping rows of one matrix, of which torch copies those chosen in one go.
        grid = math.gcd(whole.shape[1], width)
        count = max(0, (whole.numel() - begin - width) // grid + 1)
        self._grid = whole.as_strided((count, width), (grid, 1), whole.storage_offset() + begin)
        self._unit, self._row = whole.shape[1] // grid, width // grid

    def read(self, unit: Tensor, row: Tensor) -> Tensor:
        """Return rows `row` of units `unit`, int64 (...) that broadcast: (..., elements)."""
        place = torch.add(unit * self._unit, row, alpha=self._row)
        return self._grid.index_select(0, place.flatten()).view(*place.shape, -1)


class MainRows(Rows):
    """Window rows and compressed entries as released: FP8 nope with a scale byte per 64 channels, BF16 rope."""

    def __init__(self, pool: Tensor, section: Section, rope: int) -> None:
        super().__init__(pool, section, (torch.uint8, torch.uint8))
        self.nope = section.width - rope

    def encode(self, values: Tensor) -> Parts:
        codes, scale = numerics.encode_fp8(values[..., : self.nope], numerics.KV_BLOCK)
        rope = values[..., self.nope :].to(torch.bfloat16).contiguous().view(torch.uint8)
        scales = torch.nn.functional.pad(scale.view(torch.uint8), (0, self.parts[1].rows.shape[2] - scale.shape[-1]))
        return torch.cat((codes.view(torch.uint8), rope), -1), scales

    def decode(self, parts: Parts) -> Tensor:
        rows, scales = parts
        blocks = -(-self.nope // numerics.KV_BLOCK[1])
        codes = rows[..., : self.nope].view(torch.float8_e4m3fn)
        scale = scales[..., :blocks].view(torch.float8_e8m0fnu)
        rope = rows[..., self.nope :].contiguous().view(torch.bfloat16).float()
        return torch.cat((numerics.decode_fp8(codes, scale, numerics.KV_BLOCK), rope), -1)


class IndexRows(Rows):
    """Index keys as released: FP4, two a byte, with a scale byte per 32 channels."""

    def __init__(self, pool: Tensor, section: Section) -> None:
        super().__init__(pool, section, (torch.uint8, torch.uint8))

    def encode(self, values: Tensor) -> Parts:
        codes, scale = numerics.encode_fp4(values)
        return codes.view(torch.uint8), scale.view(torch.uint8)

    def decode(self, parts: Parts) -> Tensor:
        return numerics.decode_fp4(parts[0].view(torch.int8), parts[1].view(torch.float8_e8m0fnu))


class LayerRows:
    """Where one layer keeps what: window rows and tails in the slots, entries and index keys in the pages."""

    def __init__(self, layout: CacheLayout, index: int, pages: Tensor, slots: Tensor) -> None:
        place, released = layout.layers[index], layout.mode == "released"
        rope = layout.config.qk_rope_head_dim

        def main(pool: Tensor, section: Section) -> Rows:
            return MainRows(pool, section, rope) if released else Rows(pool, section)

        def tail(found: Tail | None) -> tuple[Rows, Rows] | None:
            return found and (Rows(slots, found.kv), Rows(slots, found.score))

        self.ratio = place.ratio
        self.window = main(slots, place.window)
        self.main = place.main and main(pages, place.main)
        self.index = place.index and (IndexRows(pages, place.index) if released else Rows(pages, place.index))
        self.main_tail, self.index_tail = tail(place.main_tail), tail(place.index_tail)
