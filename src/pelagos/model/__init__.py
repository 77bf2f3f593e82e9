"""The model room: layers, the forward and the cache interface."""

from pelagos.model.cache import Cache, ContiguousCache, FullSequence, LayerCache
from pelagos.model.transformer import Transformer

__all__ = ["Cache", "ContiguousCache", "FullSequence", "LayerCache", "Transformer"]
