"""Whether this host's library keeps the rules that exactness rests on, tried on the model's own parts and shapes.

No library promises that a row of a product has the same bits whatever the other rows, so `PagedForward(exact=True)`
looks before it starts. What the rules are and why each part follows from them: docs/numerics.md.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from pelagos.errors import ConfigError
from pelagos.kernels.layout import Span
from pelagos.kernels.ref import hyper_connection as hc
from pelagos.kernels.ref.gemm import THREAD_ELEMENTS, elementwise
from pelagos.kernels.ref.tiles import TILE, TiledAttention, tile_scores
from pelagos.model.attention import Attention, Step
from pelagos.model.decode import Decoder
from pelagos.model.transformer import Block, Transformer

SEQUENCES, NEAR = 10, 700  # in the decoder's trial, and where the first of them stands
ROWS = (4, 16)  # tried in turn: a product's rows keep their bits in any company that is a multiple of it

Named = Iterator[tuple[str, Tensor]]


def exact_rows(model: Transformer) -> int:
    """Return the first of ROWS that keeps the bits here; raises ConfigError with the part the last fails in."""
    broken = None
    for rows in ROWS:
        broken = broken_rule(model, rows)
        if broken is None:
            return rows
    raise ConfigError(
        f"exact=True: this host's library does not keep a row's bits in {broken}; take exact=False "
        "(logits then depend on their batch in the last bits) or the compiled helper (native=True)"
    )


@torch.inference_mode()
def keeps_rows(decoder: Decoder, pages: Tensor, slots: Tensor) -> bool:
    """Whether the decoder's rows have the bits alone that they have together; leaves the pools' first units zeroed."""
    layout, generator = decoder.layout, torch.Generator().manual_seed(0)
    count, tokens = min(SEQUENCES, len(slots), len(pages)), np.arange(layout.rewind + 1)
    pools = [pool[:count].view(-1).view(torch.float32) for pool in (pages, slots)]
    drawn = [torch.randn(pool.shape, generator=generator) for pool in pools]
    spans = [  # a sequence's table holds one page again and again, so its entries are frozen
        Span(tokens, end - len(tokens), which, np.full(layout.pages_for(end), which), frozen=end, logits=len(tokens))
        for which, end in enumerate(range(NEAR, NEAR + 61 * count, 61))
    ]

    def logits(calls: list[list[Span]]) -> np.ndarray:
        for pool, values in zip(pools, drawn, strict=True):
            pool.copy_(values)
        return np.concatenate([decoder.forward(part).logits for part in calls])

    def alone(span: Span) -> list[list[Span]]:
        return [[span._replace(tokens=tokens[at : at + 1], start=span.start + at, logits=1)] for at in tokens]

    together = logits([spans]).reshape(count, len(tokens), -1)
    same = [np.array_equal(logits(alone(spans[which])), together[which]) for which in (0, -1)]
    for pool in pools:
        pool.zero_()
    return all(same)


@torch.inference_mode()
def broken_rule(model: Transformer, rows: int) -> str | None:
    """Return the first part whose bits depend on company that is a multiple of `rows`, None when there is none."""
    generator = torch.Generator().manual_seed(0)
    device, config, company = model.embed.weight.device, model.config, 256 + rows

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, model.carrier)

    streams = drawn(1, company, config.hc_mult, config.hidden_size)
    ids = torch.randint(config.vocab_size, (1, company), generator=generator).to(device)
    kinds = {block.attn.ratio: block for block in model.blocks}
    for ratio, block in kinds.items():
        whole = dict(_tokens(model, block, streams, ids, rows, 0, company))
        for begin, end in ((0, rows), (rows, 3 * rows), (96, 160)):
            for name, part in _tokens(model, block, streams, ids, rows, begin, end):
                if not torch.equal(part, whole[name][:, begin:end]):
                    return f"{name} of a layer of ratio {ratio}: {end - begin} tokens by themselves or among {company}"
        q, keys = drawn(TILE, block.attn.heads, block.attn.width), drawn(2 * TILE, block.attn.width)
        whole = dict(_blocks(block.attn, q, keys, rows, TILE))
        for size in (1, 8):
            for name, part in _blocks(block.attn, q, keys, rows, size):
                if not torch.equal(part, whole[name]):
                    return f"{name} of a layer of ratio {ratio}: in blocks of {size} queries or of {TILE}"
    x = torch.randn(3 * THREAD_ELEMENTS + 40, generator=generator).to(device)
    for function in (torch.exp, torch.sigmoid, torch.cos, torch.sin, functional.softplus, functional.silu):
        if not torch.equal(elementwise(function, x)[7:100], elementwise(function, x[7:100])):
            return f"{function.__name__}: 93 values by themselves or among {len(x)}"
    return None


def _tokens(
    model: Transformer, block: Block, streams: Tensor, ids: Tensor, multiple: int, begin: int, end: int
) -> Named:
    """Yield what tokens begin..end-1 compute without each other, (1, S, ...)."""
    rows, own = streams[:, begin:end], ids[:, begin:end]
    step = Step(model.config, own, 0, torch.arange(begin, end, device=ids.device).unsqueeze(0))
    entered, post, comb = block.site_input(rows, "attn", None)
    x = block.attn_norm(entered)
    yield "the hyper-connection", torch.cat((x.flatten(2), post.flatten(2), comb.flatten(2)), 2)
    latent, q, kv = block.attn.inputs(x, step)
    yield "the attention's inputs", torch.cat((latent, q.flatten(2), kv), 2)
    indexer = block.attn.indexer
    for name, compressor in (("", block.attn.compressor), ("index ", indexer and indexer.compressor)):
        if compressor is not None:
            kv, score = compressor.rows(x, step.positions[0])
            yield f"the {name}compressor", torch.cat((kv, score), 2)
            slots = score[..., None, : compressor.width].expand(-1, -1, compressor.ratio, -1)
            yield f"the {name}pooling", compressor.pool(slots, slots, step.table(True), x.dtype)
    if indexer is not None:
        q_index, weights = indexer.queries(x, latent, step)
        yield "the indexer's queries", torch.cat((q_index.flatten(2), weights), 2)
    rows = hc.hc_post(block.attn.output(q, step), rows, post, comb)
    yield "the attention's output", rows.flatten(2)
    rows = block.expert_site(rows, own, None, multiple)
    yield "the experts", rows.flatten(2)
    if block is model.blocks[-1]:
        yield "the head", model.logits(model.collapse(rows, model.config))


def _blocks(attn: Attention, q: Tensor, keys: Tensor, rows: int, size: int) -> Named:
    """Yield what queries q (64, H, C) make of shared keys and of keys of their own (128, C), in blocks of `size`."""
    blocks, place = TILE // size, torch.arange(2 * TILE, device=q.device)
    mask = (place[:TILE, None] + TILE // 2 > place).view(blocks, size, -1)
    tiles = TiledAttention(q.view(blocks, size, *q.shape[1:]), attn.attn_sink, multiple=rows)
    tiles.add(keys.repeat(blocks, 1, 1), mask)
    tiles.add(keys.repeat(blocks, 1, 1) if size == TILE else keys.repeat(blocks, size, 1, 1), mask)
    yield "attention", tiles.result().view(q.shape)
    if attn.indexer is not None:
        heads, width = attn.indexer.heads, attn.indexer.width
        index_q = q.repeat(1, heads, -(-width // attn.width))[:, :heads, :width].view(blocks, size, heads, width)
        index_keys = keys.repeat(blocks, 1, -(-width // attn.width))[..., :width]
        yield "index scores", tile_scores(index_q, index_keys, index_q[..., 0], multiple=rows).view(TILE, -1)
