"""The mixture-of-experts site: hash or learned routing, clamped SwiGLU experts, one shared expert.

Source: technical report 2.1; inference/model.py Gate, Expert, MoE.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional

from pelagos.config import ModelConfig
from pelagos.kernels import grouped_experts
from pelagos.kernels.ref import experts as ops
from pelagos.kernels.ref.gemm import elementwise, linear, ordered_linear
from pelagos.model.layers import Linear, in_product, quantize_activations

FEW_TOKENS = 3  # up to here a loop over the chosen experts is quicker than sorting tokens


class Router(nn.Module):
    """Choose experts a token: by table in the first layers, else by score plus balance bias; weights are scores."""

    def __init__(self, config: ModelConfig, hashed: bool) -> None:
        super().__init__()
        self.topk, self.scaling = config.num_experts_per_tok, config.routed_scaling_factor
        self.weight = nn.Parameter(torch.empty(config.n_routed_experts, config.hidden_size))
        self.tid2eid: Tensor | None
        self.bias: Tensor | None
        table = torch.zeros(config.vocab_size, self.topk, dtype=torch.int64) if hashed else None
        self.register_buffer("tid2eid", table)
        self.simulate = False
        self.routes: Tensor | None = None  # (T, K) int64 choices made elsewhere, taken instead of its own
        self.register_buffer("bias", None if hashed else torch.zeros(config.n_routed_experts))

    def forward(self, x: Tensor, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return chosen (T, K) int64, weights (T, K) and all scores (T, E) float32 for x (T, D), ids (T,)."""
        product = ordered_linear if self.simulate and not x.is_cuda else linear  # a device has an order of its own
        scores = elementwise(functional.softplus, product(x.float(), self.weight)).sqrt()
        if self.routes is not None:
            chosen = self.routes
        elif self.tid2eid is not None:
            chosen = self.tid2eid[ids]
        else:
            assert self.bias is not None
            chosen = (scores.detach() + self.bias).topk(self.topk, -1).indices
        return chosen, ops.route(scores, chosen, self.scaling), scores


class Experts(nn.Module):
    """All routed experts of a layer, stacked: w13 (E, 2F, D) is w1 over w3, w2 (E, D, F)."""

    streamed = False  # whether the weights are elsewhere until they are chosen

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        count, width, dim = config.n_routed_experts, config.moe_intermediate_size, config.hidden_size
        self.w13 = nn.Parameter(torch.empty(count, 2 * width, dim))
        self.w2 = nn.Parameter(torch.empty(count, dim, width))
        self.first = 0  # number of the first expert here, where this is a part of them
        self.limit = float(config.swiglu_limit)
        self.release = "fp8" if config.expert_dtype == "fp8" else "fp4"
        self.stored = self.release
        self.simulate = self.master = False
        self.hits: Tensor | None = None  # training: counters of `ops.swiglu`, and what sees the products' gradients
        self.leave: ops.Quantizer | None = None

    def forward(self, x: Tensor, chosen: Tensor, weights: Tensor, multiple: int = 0) -> Tensor:
        """Return the weighted sum (T, D) float32 of the chosen experts for x (T, D); for `multiple` see `mixture`."""
        inputs = (x, chosen, weights, *self.in_products(x.dtype))
        if x.is_cuda and x.dtype == torch.bfloat16:
            return grouped_experts.mixture(*inputs, self.hits, self.leave)
        few = x.shape[0] <= FEW_TOKENS and not x.is_cuda
        return ops.mixture_few(*inputs) if few else ops.mixture(*inputs, multiple, self.hits, self.leave)

    def in_products(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, float, ops.Quantizer | None]:
        """Return w13, w2, limit and quantizer as `mixture` takes them; masters that nobody quantises as they are."""
        own = [in_product(w, self.stored, dtype) if self.master else w for w in (self.w13, self.w2)]
        quantized = self.simulate and self.stored in ("fp8", "fp4")
        return own[0], own[1], self.limit, quantize_activations if quantized else None

    def released(self, dot: str) -> Iterator[tuple[str, Tensor, str]]:
        """Yield (official name after `dot`, live view, released format) of each expert's weights."""
        width = self.w2.shape[2]
        for expert in range(self.w2.shape[0]):
            views = {"w1": self.w13[expert, :width], "w2": self.w2[expert], "w3": self.w13[expert, width:]}
            for name, view in views.items():
                yield f"{dot}{self.first + expert}.{name}.weight", view, self.release


class SharedExpert(nn.Module):
    """The expert every token passes; clamped like the routed ones."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.w1 = Linear(config.hidden_size, config.moe_intermediate_size, "fp8")
        self.w3 = Linear(config.hidden_size, config.moe_intermediate_size, "fp8")
        self.w2 = Linear(config.moe_intermediate_size, config.hidden_size, "fp8")
        self.limit = float(config.swiglu_limit)
        self.hits: Tensor | None = None  # training: counters of `ops.swiglu`

    def forward(self, x: Tensor) -> Tensor:
        kernel = x.is_cuda and x.dtype == torch.bfloat16 and torch.is_grad_enabled()
        swiglu = grouped_experts.swiglu if kernel else ops.swiglu
        return self.w2(swiglu(self.w1(x), self.w3(x), self.limit, self.hits).to(x.dtype))


class MoE(nn.Module):
    """Router, routed experts and the shared expert; the sum is float32, cast once."""

    def __init__(self, config: ModelConfig, hashed: bool) -> None:
        super().__init__()
        self.gate = Router(config, hashed)
        self.experts = Experts(config)
        self.shared_experts = SharedExpert(config)

    def forward(self, x: Tensor, ids: Tensor, aux: dict[str, Tensor] | None = None, multiple: int = 0) -> Tensor:
        """Return (B, S, D) for x (B, S, D), ids (B, S); `aux` collects scores and choices."""
        flat = x.flatten(0, 1)
        chosen, weights, scores = self.gate(flat, ids.flatten())
        if aux is not None:
            aux["router_scores"], aux["chosen"], aux["chosen_weights"] = scores, chosen, weights
        out = self.experts(flat, chosen, weights, multiple) + self.shared_experts(flat).float()
        return out.to(x.dtype).view(x.shape)
