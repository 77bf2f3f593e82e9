"""Model configuration: the released `config.json` keys verbatim, checked once, frozen.

Owns the presets and the only reading of the environment. A wrong value is an error; an unknown key is
kept (and written back) with one warning. Source: released `config.json` of V4-Flash and V4-Pro.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import os
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pelagos.errors import ConfigError

FLASH_RATIOS = (0, 0) + (4, 128) * 20 + (4, 0)
PRO_RATIOS = (128, 128) + (4, 128) * 29 + (4, 0)
GENERATIONS = ("preview", "0731")
HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")
# Written to every config.json and dropped on reading when they hold just this.
_WRITTEN_CONSTANTS: dict[str, Any] = {
    "architectures": ["DeepseekV4ForCausalLM"],
    "model_type": "deepseek_v4",
    "num_key_value_heads": 1,
    "topk_method": "noaux_tc",
    "hidden_act": "silu",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "torch_dtype": "bfloat16",
}
_MAY_BE_ZERO = frozenset(
    "qk_rope_head_dim num_hash_layers n_shared_experts num_nextn_predict_layers bos_token_id eos_token_id "
    "hc_eps".split()
)
# Keys that Hugging Face tooling writes and that change nothing in the forward.
_INERT_KEYS = frozenset(
    "architectures attention_bias attention_dropout auto_map dtype hidden_act initializer_range mlp_bias "
    "num_key_value_heads output_router_logits pad_token_id quantization_config router_aux_loss_coef "
    "router_jitter_noise topk_method torch_dtype transformers_version use_cache _name_or_path "
    "chunk_size_feed_forward id2label is_encoder_decoder label2id output_attentions output_hidden_states "
    "problem_type return_dict default_partial_rotary_factor max_window_layers".split()
)


@dataclass(frozen=True, kw_only=True, slots=True)
class RopeScaling:
    """YaRN settings; they act on frequencies only, and only in layers with a compressor."""

    factor: float = 16.0
    original_max_position_embeddings: int = 65536
    beta_fast: float = 32.0
    beta_slow: float = 1.0


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """Everything that decides the shape and arithmetic of one V4-architecture model."""

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    head_dim: int
    qk_rope_head_dim: int
    q_lora_rank: int
    o_groups: int
    o_lora_rank: int
    sliding_window: int
    compress_ratios: tuple[int, ...]
    index_n_heads: int
    index_head_dim: int
    index_topk: int
    n_routed_experts: int
    num_experts_per_tok: int
    moe_intermediate_size: int
    num_hash_layers: int
    routed_scaling_factor: float
    swiglu_limit: float
    n_shared_experts: int = 1
    rope_theta: float = 10000.0
    compress_rope_theta: float = 160000.0
    rope_scaling: RopeScaling | None = RopeScaling()
    scoring_func: str = "sqrtsoftplus"
    norm_topk_prob: bool = True
    hc_mult: int = 4
    hc_sinkhorn_iters: int = 20
    hc_eps: float = 1e-6
    num_nextn_predict_layers: int = 1
    rms_norm_eps: float = 1e-6
    max_position_embeddings: int = 1048576
    bos_token_id: int = 0
    eos_token_id: int = 1
    tie_word_embeddings: bool = False
    expert_dtype: str = "fp4"
    extra: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for f in dataclasses.fields(self):
            value = getattr(self, f.name)
            if f.type == "int" and (type(value) is not int or value < 0):
                raise ConfigError(f"{f.name}={value!r}: expected a non-negative integer")
            if f.type == "float" and (not isinstance(value, (int, float)) or isinstance(value, bool)):
                raise ConfigError(f"{f.name}={value!r}: expected a number")
            if f.type in ("int", "float") and f.name not in _MAY_BE_ZERO and not value > 0:
                raise ConfigError(f"{f.name}={value!r}: expected a value > 0")
        ratios, layers, heads, rope = (
            list(self.compress_ratios), self.num_hidden_layers, self.num_attention_heads, self.qk_rope_head_dim
        )  # fmt: skip
        for wrong, said in (
            (len(ratios) < layers, f"compress_ratios has {len(ratios)} entries, expected at least num_hidden_layers="
                                   f"{layers} (one per layer; draft layers may follow)"),
            (any(type(m) is not int or m < 0 or m == 1 for m in ratios),
             f"compress_ratios={ratios}: expected 0 or integers >= 2"),
            *((rope > size or rope % 2, f"qk_rope_head_dim={rope}: expected an even number <= {name}={size}")
              for name, size in (("head_dim", self.head_dim), ("index_head_dim", self.index_head_dim))),
            (heads % self.o_groups, f"o_groups={self.o_groups} does not divide num_attention_heads={heads}"),
            (self.num_experts_per_tok > self.n_routed_experts, f"num_experts_per_tok={self.num_experts_per_tok} is "
                                                               f"more than n_routed_experts={self.n_routed_experts}"),
            (self.n_shared_experts != 1, f"n_shared_experts={self.n_shared_experts}: V4 has exactly 1"),
            (self.scoring_func != "sqrtsoftplus", f"scoring_func={self.scoring_func!r}: V4 uses 'sqrtsoftplus'"),
            (self.norm_topk_prob is not True or self.tie_word_embeddings is not False,
             "V4 has norm_topk_prob=true and tie_word_embeddings=false; this config.json differs"),
            (self.expert_dtype not in ("fp4", "fp8"), f"expert_dtype={self.expert_dtype!r}: expected 'fp4' or 'fp8'"),
            (self.num_nextn_predict_layers > 1,
             f"num_nextn_predict_layers={self.num_nextn_predict_layers}: expected 0 or 1"),
            (self.generation not in GENERATIONS,
             f"generation={self.generation!r}: expected one of {', '.join(GENERATIONS)}"),
        ):  # fmt: skip
            if wrong:
                raise ConfigError(said)

    @property
    def layer_ratios(self) -> tuple[int, ...]:
        """Compression ratio of each backbone layer; draft slots of `compress_ratios` are cut off."""
        return self.compress_ratios[: self.num_hidden_layers]

    @property
    def generation(self) -> str:
        """Prompt generation (`preview` or `0731`); DSpark keys mark the 0731 builds, else `preview`."""
        if "generation" in self.extra:
            return self.extra["generation"]
        return "0731" if "dspark_block_size" in self.extra else "preview"

    def to_dict(self) -> dict[str, Any]:
        """Return the `config.json` object of this model, released keys and kept unknown keys together."""
        known = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "extra"}
        known["compress_ratios"] = list(self.compress_ratios)
        if self.rope_scaling is not None:
            known["rope_scaling"] = {"type": "yarn"} | dataclasses.asdict(self.rope_scaling)
        return _WRITTEN_CONSTANTS | known | dict(self.extra)

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any], *, source: str = "config") -> ModelConfig:
        """Build a config from a `config.json` object, in the released spelling or the one `transformers` saves.

        Raises ConfigError naming `source` and the key for anything missing, mistyped or impossible.
        """
        data = dict(raw)
        if data.pop("model_type", "deepseek_v4") != "deepseek_v4":
            raise ConfigError(f"{source}: model_type={raw['model_type']!r}, expected 'deepseek_v4'")
        for key in ("hidden_act", "attention_bias", "mlp_bias", "num_key_value_heads"):
            expected = _WRITTEN_CONSTANTS.get(key, False)
            if data.get(key, expected) != expected:  # would change the arithmetic if it were honoured
                raise ConfigError(f"{source}: {key}={data[key]!r}, DeepSeek-V4 has {expected!r}")
        data = {k: v for k, v in data.items() if k not in _WRITTEN_CONSTANTS or v != _WRITTEN_CONSTANTS[k]}
        _fold_transformers_spelling(data, source)
        names = {f.name for f in dataclasses.fields(cls)} - {"extra"}
        known = {k: data.pop(k) for k in list(data) if k in names}
        missing = [
            f.name
            for f in dataclasses.fields(cls)
            if f.name not in known and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        ]
        if missing:
            raise ConfigError(f"{source}: missing key {', '.join(missing)}; is this a DeepSeek-V4 config.json?")
        if not isinstance(ratios := known["compress_ratios"], (list, tuple)):
            raise ConfigError(f"{source}: compress_ratios={ratios!r}, expected a list of integers")
        known["compress_ratios"] = tuple(ratios)
        known["rope_scaling"] = _rope_scaling(known.get("rope_scaling", {}), source)
        unknown = [k for k in data if k not in _INERT_KEYS and not k.startswith("dspark_") and k != "generation"]
        for key in unknown:
            near = difflib.get_close_matches(key, names, n=1, cutoff=0.8)
            hint = f" (did you mean {near[0]!r}?)" if near else ""
            warnings.warn(f"{source}: unknown key {key!r} is kept but has no effect{hint}", stacklevel=2)
        try:
            return cls(**known, extra=data)
        except ConfigError as error:
            raise ConfigError(f"{source}: {error}") from None

    @classmethod
    def load(cls, path: str | Path) -> ModelConfig:
        """Read `config.json` from a directory or a file path."""
        file = Path(path)
        file = file / "config.json" if file.is_dir() else file
        try:
            raw = json.loads(file.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise ConfigError(f"{file}: not found; a checkpoint directory needs a config.json") from None
        except (OSError, ValueError) as error:
            raise ConfigError(f"{file}: not readable as JSON ({error})") from None
        if not isinstance(raw, dict):
            raise ConfigError(f"{file}: expected a JSON object, got {type(raw).__name__}")
        return cls.from_dict(raw, source=str(file))


def _rope_scaling(value: Any, source: str) -> RopeScaling | None:
    if value is None or isinstance(value, RopeScaling):
        return value
    if not isinstance(value, Mapping):
        raise ConfigError(f"{source}: rope_scaling={value!r}, expected an object or null")
    kind = value.get("type", value.get("rope_type", "yarn"))
    if kind != "yarn":
        raise ConfigError(f"{source}: rope_scaling type {kind!r}, expected 'yarn'")
    names = [f.name for f in dataclasses.fields(RopeScaling)]
    scaling = RopeScaling(**{k: value[k] for k in names if k in value})
    for name in names:
        number = getattr(scaling, name)
        if not isinstance(number, (int, float)) or isinstance(number, bool) or number <= 0:
            raise ConfigError(f"{source}: rope_scaling.{name}={number!r}, expected a number > 0")
    return scaling


def _fold_transformers_spelling(data: dict[str, Any], source: str) -> None:
    """Rewrite the keys `transformers` saves (layer_types, compress_rates, rope_parameters) to the released ones."""
    rates = data.pop("compress_rates", None) or {}
    kinds = {
        "sliding_attention": 0,
        "compressed_sparse_attention": rates.get("compressed_sparse_attention", 4),
        "heavily_compressed_attention": rates.get("heavily_compressed_attention", 128),
    }
    layer_types = data.pop("layer_types", None)
    if layer_types is not None and "compress_ratios" not in data:
        try:
            data["compress_ratios"] = [kinds[kind] for kind in layer_types]
        except KeyError as error:
            raise ConfigError(f"{source}: layer_types holds {error}, expected one of {', '.join(kinds)}") from None
    mlp_types = data.pop("mlp_layer_types", None)
    if mlp_types is not None and "num_hash_layers" not in data:
        hashed = [kind == "hash_moe" for kind in mlp_types]
        if hashed != sorted(hashed, reverse=True):
            raise ConfigError(f"{source}: mlp_layer_types={mlp_types}, expected all hash_moe layers first")
        data["num_hash_layers"] = sum(hashed)
    factor = data.pop("partial_rotary_factor", None)
    if factor is not None and "qk_rope_head_dim" not in data and isinstance(data.get("head_dim"), int):
        data["qk_rope_head_dim"] = round(data["head_dim"] * factor)
    rope = data.pop("rope_parameters", None)
    if isinstance(rope, Mapping) and "rope_scaling" not in data:
        compress = rope.get("compress", rope)
        data["rope_scaling"] = None if compress.get("rope_type", "default") == "default" else dict(compress)
        data.setdefault("rope_theta", rope.get("main", {}).get("rope_theta", 10000.0))
        data.setdefault("compress_rope_theta", compress.get("rope_theta", 160000.0))


def flash() -> ModelConfig:
    """DeepSeek-V4-Flash: 284B parameters, 13B activated."""
    return ModelConfig(
        vocab_size=129280, hidden_size=4096, num_hidden_layers=43, num_attention_heads=64, head_dim=512,
        qk_rope_head_dim=64, q_lora_rank=1024, o_groups=8, o_lora_rank=1024, sliding_window=128,
        compress_ratios=FLASH_RATIOS, index_n_heads=64, index_head_dim=128, index_topk=512, n_routed_experts=256,
        num_experts_per_tok=6, moe_intermediate_size=2048, num_hash_layers=3, routed_scaling_factor=1.5,
        swiglu_limit=10.0,
    )  # fmt: skip


def pro() -> ModelConfig:
    """DeepSeek-V4-Pro: 1.6T parameters, 49B activated."""
    return dataclasses.replace(
        flash(), hidden_size=7168, num_hidden_layers=61, num_attention_heads=128, q_lora_rank=1536, o_groups=16,
        compress_ratios=PRO_RATIOS, index_topk=1024, n_routed_experts=384, moe_intermediate_size=3072,
        routed_scaling_factor=2.5,
    )  # fmt: skip


def nano() -> ModelConfig:
    """The bundled model: true ratios, window, hash layers, four streams and MTP at 26M parameters."""
    return ModelConfig(
        vocab_size=4096, hidden_size=256, num_hidden_layers=8, num_attention_heads=8, head_dim=128,
        qk_rope_head_dim=64, q_lora_rank=128, o_groups=2, o_lora_rank=128, sliding_window=128,
        compress_ratios=(0, 4, 128, 4, 128, 4, 128, 4, 0), index_n_heads=8, index_head_dim=64, index_topk=128,
        n_routed_experts=20, num_experts_per_tok=4, moe_intermediate_size=128, num_hash_layers=2,
        routed_scaling_factor=1.5, swiglu_limit=10.0, extra={"generation": "0731"},
    )  # fmt: skip


def tiny() -> ModelConfig:
    """A model for tests: every mechanism, both number modes, 0.5M parameters, boundaries within a few dozen tokens."""
    return ModelConfig(
        vocab_size=128, hidden_size=64, num_hidden_layers=6, num_attention_heads=4, head_dim=32, qk_rope_head_dim=8,
        q_lora_rank=24, o_groups=2, o_lora_rank=16, sliding_window=16, compress_ratios=(0, 4, 8, 4, 8, 0, 0),
        index_n_heads=16, index_head_dim=32, index_topk=4, n_routed_experts=8, num_experts_per_tok=2,
        moe_intermediate_size=32, num_hash_layers=2, routed_scaling_factor=1.5, swiglu_limit=10.0,
        rope_scaling=RopeScaling(original_max_position_embeddings=64),
    )  # fmt: skip


PRESETS = {"flash": flash, "pro": pro, "nano": nano, "tiny": tiny}


def preset(name: str) -> ModelConfig:
    """Return a preset by name; raises ConfigError listing the known ones."""
    if name not in PRESETS:
        raise ConfigError(f"unknown preset {name!r}; known: {', '.join(PRESETS)}")
    return PRESETS[name]()


def bundled_model_dir(name: str) -> Path:
    """Return where the bundled model `name` lies (or would): `models/` of the repository, else of the package."""
    package = Path(__file__).resolve().parent
    repository = package.parents[1] / "models"
    return (repository if repository.is_dir() else package / "models") / name


def hub_snapshot(hub_id: str) -> Path | str:
    """Return the snapshot of `refs/main` of `org/name` in the local hub cache, or where it was sought and why not."""
    organisation, _, name = hub_id.partition("/")
    repository = read_environment().hub_cache / f"models--{organisation}--{name}"
    if not repository.is_dir():
        return f"{repository} (not downloaded)"
    try:
        revision = (repository / "refs" / "main").read_text(encoding="utf-8").strip()
    except (OSError, ValueError):
        return f"{repository} (no refs/main; name a directory under its snapshots/ instead)"
    snapshot = repository / "snapshots" / revision
    if not re.fullmatch(r"\w+", revision) or not (snapshot / "config.json").is_file():
        return f"{repository} (refs/main is {revision!r}, which has no snapshot with a config.json; download it again)"
    return snapshot


def local_model(path_or_name: str | Path) -> Path:
    """Return the directory of a bundled name or of a hub id in the local cache; anything else is the path it spells."""
    path, text = Path(path_or_name), str(path_or_name)
    if text and path.name == text and bundled_model_dir(text).is_dir():
        return bundled_model_dir(text)
    if HUB_ID.fullmatch(text) and not path.exists() and isinstance(found := hub_snapshot(text), Path):
        return found
    return path


@dataclass(frozen=True, kw_only=True, slots=True)
class Environment:
    """The environment variables Pelagos honours; nothing else reads `os.environ`."""

    hub_cache: Path
    threads: int | None
    cache_home: Path
    docker_host: str


def read_environment() -> Environment:
    """Read HF_HUB_CACHE / HF_HOME (hub cache), XDG_CACHE_HOME (our own), PELAGOS_THREADS (CPU threads) and DOCKER_HOST.

    Raises ConfigError for a bad value.
    """
    home = Path(os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface")
    hub = Path(os.environ.get("HF_HUB_CACHE") or home / "hub")
    threads = os.environ.get("PELAGOS_THREADS")
    if threads is not None and (not threads.isdigit() or int(threads) == 0):
        raise ConfigError(f"PELAGOS_THREADS={threads!r}: expected a whole number > 0")
    own = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    engine = os.environ.get("DOCKER_HOST") or "unix:///var/run/docker.sock"
    return Environment(hub_cache=hub, threads=int(threads) if threads else None, cache_home=own, docker_host=engine)
