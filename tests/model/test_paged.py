"""The ragged forward over paged pools against the plain forward, and its exactness: the same bits in any company."""

import numpy as np
import pytest
import torch

from drawn import TINY, TRUE, drawn, ids_of
from pelagos.config import ModelConfig
from pelagos.kernels.layout import CacheLayout, Span
from pelagos.model import FullSequence, Transformer
from pelagos.model.paged import PagedForward


class Served:
    """A model over pools of its own."""

    def __init__(self, model: Transformer, *, exact: bool = True, pages: int = 24, slots: int = 18) -> None:
        self.layout = CacheLayout(model.config, model.mode, 4)
        self.pages = torch.zeros(pages, self.layout.page_bytes, dtype=torch.uint8)
        self.slots = torch.zeros(slots, self.layout.slot_bytes, dtype=torch.uint8)
        self.forward = PagedForward(model, self.layout, self.pages, self.slots, exact=exact)

    def logits(
        self, ids: np.ndarray, cuts: list[int], *, slot: int = 0, pages: tuple[int, ...] = (3, 0, 5, 2)
    ) -> np.ndarray:
        """Return the logits of all positions, computed in chunks that end at `cuts`."""
        table, parts, begin = np.array(pages, np.int32), [], 0
        for end in cuts:
            parts.append(self.forward.forward([Span(ids[begin:end], begin, slot, table, 0, end - begin)]).logits)
            begin = end
        return np.concatenate(parts)


def whole(model: Transformer, ids: torch.Tensor) -> np.ndarray:
    with torch.no_grad():
        return model(ids)[0].numpy()


@pytest.mark.parametrize(("config", "length"), [(TINY, 150), (TRUE, 300)], ids=["tiny", "true ratios"])
def test_it_equals_the_forward(config: ModelConfig, length: int) -> None:
    model, ids = drawn(config, 0), ids_of(config, 1, length)
    got = Served(model).logits(ids[0].numpy(), [9, 10, length // 2, length])
    np.testing.assert_allclose(got, whole(model, ids), rtol=0, atol=2e-5)
