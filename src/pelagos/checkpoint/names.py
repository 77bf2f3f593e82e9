"""The one table between the names `transformers` writes and the released ones.

Names already in the released spelling pass through unchanged. Source: released checkpoint and transformers 5.23,
whose `save_pretrained` writes a mixture of both unless told `save_original_format=False`.
"""

import re

# Applied in this order: scopes first, then the leaves inside them.
_RULES = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"^model\.", ""),
        (r"^lm_head\.", "head."),
        (r"^embed_tokens\.", "embed."),
        (r"^hc_head\.hc_", "hc_head_"),
        (r"\.self_attn\.", ".attn."),
        (r"\.mlp\.", ".ffn."),
        (r"\.input_layernorm\.", ".attn_norm."),
        (r"\.post_attention_layernorm\.", ".ffn_norm."),
        (r"\.(attn|ffn)_hc\.(fn|base|scale)$", r".hc_\1_\2"),
        (r"\.weight_scale_inv$", ".scale"),
        (r"\.compressor\.indexer\.scorer\.", ".indexer."),
        (r"\.compressor\.indexer\.q_b_proj\.", ".indexer.wq_b."),
        (r"\.compressor\.indexer\.", ".indexer.compressor."),
        (r"\.compressor\.kv_norm\.", ".compressor.norm."),
        (r"\.compressor\.gate_proj\.", ".compressor.wgate."),
        (r"\.position_bias$", ".ape"),
        (r"\.attn\.norm\.", ".attn.kv_norm."),
        (r"\.kv_proj\.", ".wkv."),
        (r"\.q_a_norm\.", ".q_norm."),
        (r"\.q_a_proj\.", ".wq_a."),
        (r"\.q_b_proj\.", ".wq_b."),
        (r"\.o_a_proj\.", ".wo_a."),
        (r"\.o_b_proj\.", ".wo_b."),
        (r"\.attn\.sinks$", ".attn.attn_sink"),
        (r"\.gate\.e_score_correction_bias$", ".gate.bias"),
        (r"\.shared_experts\.gate_proj\.", ".shared_experts.w1."),
        (r"\.shared_experts\.down_proj\.", ".shared_experts.w2."),
        (r"\.shared_experts\.up_proj\.", ".shared_experts.w3."),
    )
)
# Experts stacked along a first dimension: which released matrices lie one after another in each expert's rows.
_STACKED = {"experts.gate_up_proj": ("w1", "w3"), "experts.down_proj": ("w2",)}


def released_name(name: str) -> str:
    """Return the released spelling of a stored tensor name; released names come back as they are."""
    for pattern, replacement in _RULES:
        name = pattern.sub(replacement, name)
    return name


def stacked_parts(name: str) -> tuple[str, tuple[str, ...]] | None:
    """Split the name of stacked experts into its prefix and the matrices in each expert; None for other names."""
    for suffix, parts in _STACKED.items():
        if name.endswith("." + suffix):
            return name.removesuffix(suffix) + "experts", parts
    return None
