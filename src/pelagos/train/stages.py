"""Pipeline parallelism: consecutive layers on each stage, micro-batches one after another through all of them.

What passes between stages is four streams of every token, the draft's embedding (the table is on the first stage only)
and two sums of loss terms. The schedule is 1F1B of torch.distributed.pipelining. Source: technical report 3.4.2.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe

from pelagos.errors import ConfigError
from pelagos.kernels.cross_entropy import cross_entropy
from pelagos.model import Transformer
from pelagos.train.context import Context
from pelagos.train.data import Batch
from pelagos.train.forward import Forward
from pelagos.train.objective import Losses, LossWeights, finish, noted, prepare
from pelagos.train.ranks import Ranks, exchange


def cut_layers(model: Transformer, stage: int, stages: int) -> None:
    """Leave a model the layers of one stage, embedding on the first, head and MTP on the last; names stay.

    The last stage counts its MTP block as a layer. Raises ConfigError for fewer layers than stages.
    """
    count = len(model.layers) + len(model.mtp)
    if count < 2 * stages:
        raise ConfigError(f"pp={stages}: {count} layers, expected at least two a stage")
    own = range(stage * count // stages, (stage + 1) * count // stages)
    for index in range(len(model.layers)):
        if index not in own:
            model.layers[index] = nn.Identity()
    gone = ["embed"] if stage else []
    gone += ["head", "norm", "mtp"] if stage < stages - 1 else []
    for name in gone:
        setattr(model, name, nn.ModuleList())
    if stage < stages - 1:
        for name in ("fn", "base", "scale"):
            delattr(model, f"hc_head_{name}")


class Pipeline(nn.Module):
    """Runs this rank's micro-batches through all stages; `done` is called after each one's backward here.

    As a module it is this stage's forward of one of them, and keeps the terms and loads of those that passed.
    """

    def __init__(
        self, forward: Forward, ranks: Ranks, done: Callable[[], None], loss: Callable[..., Tensor] = cross_entropy
    ) -> None:
        super().__init__()
        self._run, self.ranks, self._done, self._loss = forward, ranks, done, loss
        self.first, self.last = ranks.pp.rank == 0, ranks.pp.rank == ranks.pp.size - 1

    def forward(self, streams: Tensor, sums: Tensor | None = None, **rows: Tensor) -> tuple[Tensor, ...] | Tensor:
        """Return (streams and draft's embedding (B, S, n + 1, D), sums (2,)), or on the last stage the loss (1,)."""
        model = self._run.model
        context = Context(model.config, self.ranks.cp) if self.ranks.cp.size > 1 else None
        batch, n = prepare(model, **rows, dense=self._dense, context=context), model.config.hc_mult
        if self.first:
            tokens = [batch.step.ids, *[batch.next_ids] * model.config.num_nextn_predict_layers]
            made = [model.embed(ids).to(model.carrier).unsqueeze(2) for ids in tokens]
            streams, embedded = made[0].repeat(1, 1, n, 1), torch.cat(made[1:] or [made[0][:, :, :0]], 2)
            sums = streams.new_zeros(2, dtype=torch.float32)
        else:
            streams, embedded = streams[:, :, :n].contiguous(), streams[:, :, n:]
        assert sums is not None
        notes: list[dict[str, Tensor]] = []
        streams = self._run.through(streams, batch.step, batch.cache, notes)
        if self.last:
            draft = embedded.squeeze(2) if embedded.shape[2] else None
            found = finish(self._run, batch, streams, draft, self._weights, self._loss, notes, (sums[0], sums[1]))
            self._passed.append(found)
            return found.total.unsqueeze(0)
        balance, indexer, load, _ = noted(model, batch, notes, (sums[0], sums[1]))
        here = balance.detach()  # the last stage says the terms
        self._passed.append(Losses(here, here, here, here, here, load, []))
        return torch.cat((streams, embedded), 2), torch.stack((balance, indexer))

    def run(
        self, batches: Sequence[Batch], weights: LossWeights, *, dense: bool, share: float, train: bool = True
    ) -> list[Losses]:
        """Run micro-batches of equal shape, each loss times `share`; return what this stage has of each one's terms."""
        self._weights, self._dense, self._passed = weights, dense, list[Losses]()
        model, pp = self._run.model, self.ranks.pp
        config, device = model.config, next(model.parameters()).device
        stacked = [torch.cat([torch.from_numpy(part) for part in parts]).to(device)
                   for parts in zip(*batches, strict=True)]  # fmt: skip
        rows, length = batches[0].ids.shape
        width = config.hc_mult + config.num_nextn_predict_layers
        shape = (rows, length // self.ranks.cp.size, width, config.hidden_size)
        between = (torch.empty(shape, dtype=model.carrier, device=device, requires_grad=True),
                   torch.empty(2, device=device, requires_grad=True))  # fmt: skip
        inputs = stacked[0][:rows] if self.first else between
        outputs = torch.empty(1, device=device, requires_grad=True) if self.last else between
        stage = PipelineStage(self, pp.rank, pp.size, device, inputs, outputs, group=pp.group)
        backward = stage.backward_one_chunk  # behind which a micro-batch's gradients are complete, added in their order
        stage.backward_one_chunk = lambda *args, **options: (backward(*args, **options), self._done())[0]
        kind = Schedule1F1B if train else ScheduleGPipe
        schedule = kind(stage, len(batches), lambda out, _: out.sum() * share, scale_grads=False)
        target = torch.zeros(len(batches), device=device) if self.last else None
        call: Callable[..., Any] = schedule.step if train else schedule.eval
        with exchange():
            call(*stacked[: self.first], target=target, **dict(zip(Batch._fields, stacked, strict=True)))
        return self._passed

    def score(self, batch: Batch, *, dense: bool) -> Losses:
        """Return the terms of one micro-batch on every rank, without gradients."""
        terms = self.run([batch], LossWeights(), dense=dense, share=1.0, train=False)[0]
        return self.ranks.agree(terms, terms.load, False)[0]
