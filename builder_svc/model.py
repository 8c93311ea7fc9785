"""A model and the options of a build, put together: what will be made of it."""

from dataclasses import dataclass, replace
from pathlib import Path

from builder_svc.auto import open_model
from builder_svc.build_config import BuildConfig
from builder_svc.causal_lm import CausalLM
from builder_svc.checkpoint.quantized.resolve import Resolved, on_device
from builder_svc.mapping import Mapping
from builder_svc.models.config import DecoderConfig
from builder_svc.models.decoder import KVScales
from builder_svc.pretrained import PretrainedConfig
from builder_svc.quant_config import QuantAlgo, checked
from builder_svc.quantize.plan import Plan
from builder_svc.shard import check_shards
from builder_svc.tokenizer import NormalizedTokenizer
from engine.errors import InvalidArgument
from engine.manifest import Limits, Parallelism


@dataclass(frozen=True)
class Model:
    """A model, and what will be made of it.

    Attributes:
        kv_scales: of a KV cache of 8 bits.
        mapping: the ranks, all of which the engine is for.
        kv_int8: such a cache is int8, not float8_e4m3fn.
        plan: how it is to be quantized; `weights` and `kv_scales` are then what that will make, without values.
    """

    pretrained: CausalLM
    weights: Resolved
    tokenizer: NormalizedTokenizer | None
    dtype: str
    limits: Limits
    kv_scales: KVScales | None = None
    mapping: Mapping = Mapping()  # noqa: RUF009  (frozen)
    kv_int8: bool = False
    plan: Plan | None = None

    @property
    def config(self) -> DecoderConfig:
        """Its decoder."""
        return self.pretrained.config.decoder


def read_model(model: Path | CausalLM, options: BuildConfig) -> Model:
    """Opens a checkpoint, if it is not open, and resolves what the options leave open. Reads no weights."""
    if isinstance(model, Path):
        model = open_model(model, options.dummy_weights)
    elif options.dummy_weights and not model.dummy:
        model = type(model)(model.config)
    config = model.config
    mapping = _mapping(config, options)
    longest = config.max_position_embeddings
    max_seq_len = options.max_seq_len or longest
    if max_seq_len > longest:
        raise InvalidArgument(
            f"max_seq_len is {max_seq_len}, more than the model's {longest} positions: give at most {longest}",
            reason="MAX_SEQ_LEN_INVALID",
        )
    limits = Limits(options.max_batch_size, max_seq_len, options.max_num_tokens)
    plan = _plan(model, options)
    weights = model.resolve(options.target)
    if plan:
        packed = {name: on_device(options.target, form) for name, form in plan.packed.items()}
        weights = Resolved(weights.checkpoint, weights.sources, packed, facts=plan.facts)
    check_shards(config.decoder, mapping, weights.packed)
    kv_scales, kv_int8 = _kv_cache(model, options, plan)
    dtype = _dtype(config, options)
    return Model(model, weights, model.tokenizer(), dtype, limits, kv_scales, mapping, kv_int8, plan)


def _plan(model: CausalLM, options: BuildConfig) -> Plan | None:
    """How the options, or else the model's own config, want it to be quantized."""
    asked, own = checked(options.quant_config), checked(model.config.quant_config)
    if asked and own and asked != own:
        raise InvalidArgument(
            f"quant_config: the model's is {own}, the options say {asked}: choose one of both",
            reason="QUANTIZATION_AMBIGUOUS",
        )
    quant_config = asked or own
    if quant_config is None:
        return None
    capability = options.compute_capability
    return model.plan(quant_config, options.calib_config, target=options.target, compute_capability=capability)


def _kv_cache(model: CausalLM, options: BuildConfig, plan: Plan | None) -> tuple[KVScales | None, bool]:
    """The scales of a KV cache of 8 bits, or None; whether it is int8. Of one that will be calibrated, scales of 1."""
    made = model.config.quantized
    algo = plan.quant_config.kv_cache_quant_algo if plan else None
    if made and made.kv_scales:
        algo = QuantAlgo.INT8 if made.kv_int8 else QuantAlgo.FP8
    if algo is QuantAlgo.INT8 and options.kv_cache_dtype == "fp8":
        raise InvalidArgument(
            "kv_cache_dtype is 'fp8', but the KV cache is to be quantized as INT8: choose one of both, or kv_cache_dtype='auto'",
            reason="KV_CACHE_DTYPE_AMBIGUOUS",
        )
    if algo is None and options.kv_cache_dtype == "auto":
        return None, False
    return model.kv_scales(), algo is QuantAlgo.INT8


def _mapping(config: PretrainedConfig, options: BuildConfig) -> Mapping:
    """The model's, or the options' where it has none."""
    chosen = Mapping(options.tp_size * options.pp_size, tp_size=options.tp_size, pp_size=options.pp_size)
    own = replace(config.mapping, rank=0)
    if own.world_size > 1 and chosen.world_size > 1 and own.sizes() != chosen.sizes():
        raise InvalidArgument(
            f"mapping: the model's has tp_size {own.tp_size} and pp_size {own.pp_size}, the options say {chosen.tp_size} and "
            f"{chosen.pp_size}: choose one of both, or leave those of the options at 1",
            reason="MAPPING_AMBIGUOUS",
        )
    return own if own.world_size > 1 else chosen


def parallelism(mapping: Mapping) -> Parallelism:
    """As manifests have it."""
    return Parallelism(**mapping.sizes())


def _dtype(config: PretrainedConfig, options: BuildConfig) -> str:
    """The options' dtype, the model's, or what its checkpoint has."""
    if config.auto_dtype and options.dtype == "auto":
        return "float32" if options.target == "cpu" else config.checked_dtype
    if config.auto_dtype or options.dtype in ("auto", config.dtype):
        return config.dtype if options.dtype == "auto" else options.dtype
    raise InvalidArgument(
        f"dtype: the model is {config.dtype}, the options say {options.dtype}: choose one of both, or dtype='auto' here",
        reason="DTYPE_AMBIGUOUS",
    )
