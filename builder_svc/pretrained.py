"""A model's configuration: Hugging Face's config.json, what follows from it, and what was chosen about it."""

from collections.abc import Mapping as Values
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from builder_svc.build_config import DTYPES
from builder_svc.checkpoint.gguf_file import GgufFile
from builder_svc.checkpoint.huggingface import declared_dtype, eos_token_ids, read_json
from builder_svc.checkpoint.reader import open_gguf, read_configs
from builder_svc.mapping import Mapping
from builder_svc.models.config import AttentionSpec, DecoderConfig, LongRope, MlpSpec
from builder_svc.models.decoder import Decoder
from builder_svc.models.families import Family, find_family
from builder_svc.models.fields import Fields
from builder_svc.quant_config import QuantConfig, checked
from builder_svc.quantized import Quantized
from engine.errors import InvalidArgument, Unimplemented

OURS = "enginehouse"
"""The field of a saved config.json that the others follow from: {"format", "auto_dtype", "config", "generation_config"}, and
"quantized" where it is."""

_FORMAT = 1
_NOT_QUANTIZED = {"quant_algo": None, "kv_cache_quant_algo": None}
_QUANTIZATION = ("quant_algo", "kv_cache_quant_algo", "group_size", "has_zero_point", "exclude_modules")
_FACTS = (
    "architecture", "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_size",
    "hidden_act", "intermediate_size", "norm_epsilon", "position_embedding_type", "max_position_embeddings",
)  # fmt: skip


@dataclass(frozen=True)
class PretrainedConfig:
    """What a model is, without its weights. `AutoConfig.from_hugging_face` makes one.

    Attributes:
        hugging_face: the config.json that all else follows from.
        dtype: of the weights: "float16", "bfloat16" or "float32".
        auto_dtype: nobody has chosen the dtype, it is the checkpoint's own: a build for the CPU takes float32.
        mapping: the ranks.
        generation_config: generation_config.json, for its end-of-sequence ids; empty if there is none.
        path: the directory with the tokenizer, or the GGUF file; None if there is none.
        gguf: the opened file that config and tokenizer come out of, if it is a GGUF file.
        source: where it was found, for people.
        quantized: how the weights are packed, of a model that `quantize` has made.
        quant_config: how a build is to quantize them.

    Raises:
        InvalidArgument: (a ValueError) a config that does not hold together, or a dtype that is none.
        Unimplemented: (a NotImplementedError) an architecture that is not supported; the message lists those that are.

    Example:
        >>> from enginehouse import AutoConfig, PretrainedConfig
        >>> config = AutoConfig.from_hugging_face("examples/demo-model", dtype="float16")
        >>> PretrainedConfig.from_dict(config.to_dict()).hidden_size
        256
    """

    hugging_face: Values[str, Any]
    dtype: str
    auto_dtype: bool = False
    mapping: Mapping = Mapping()  # noqa: RUF009  (frozen)
    generation_config: Values[str, Any] = field(default_factory=dict)
    path: Path | None = field(default=None, compare=False)
    gguf: GgufFile | None = field(default=None, compare=False)
    source: str = field(default="a config", compare=False)
    quantized: Quantized | None = None
    quant_config: QuantConfig | None = None

    def __post_init__(self) -> None:
        if not self.auto_dtype and self.dtype not in DTYPES[1:]:
            raise InvalidArgument(f"dtype {self.dtype!r}: choose one of {', '.join(DTYPES)}")
        if not isinstance(self.mapping, Mapping):
            raise InvalidArgument(f"mapping {self.mapping!r}: give a Mapping, or leave it out")
        checked(self.quant_config)
        self.decoder, self.eos_token_ids  # noqa: B018  (they raise what is wrong with the configs)

    @property
    def _where(self) -> str:
        if self.gguf:
            return str(self.gguf.path)
        return str(self.path / "config.json") if self.path else self.source

    @cached_property
    def fields(self) -> Fields:
        """`hugging_face`, with errors that name the file."""
        return Fields(self.hugging_face, self._where)

    @property
    def _family(self) -> tuple[Family, str]:
        return find_family(self.fields)

    @property
    def family(self) -> Family:
        """The page that reads it."""
        return self._family[0]

    @property
    def architecture(self) -> str:
        """Its name in config.json, such as "LlamaForCausalLM"."""
        return self._family[1]

    @cached_property
    def decoder(self) -> DecoderConfig:
        """The decoder that a build makes."""
        return self.family.decoder_config(self.fields, self.architecture)

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """End-of-sequence ids. Raises InvalidArgument for what is no id."""
        return eos_token_ids(self.fields, self.generation_config)

    @property
    def checked_dtype(self) -> str:
        """The dtype. Raises Unimplemented for one that a checkpoint may have and an engine not."""
        if self.dtype not in DTYPES[1:]:
            raise Unimplemented(
                f"{self.source} is stored in {self.dtype}; choose one of {', '.join(DTYPES[1:])} for the engine"
            )
        return self.dtype

    @property
    def vocab_size(self) -> int:
        """Rows of the embedding."""
        return self.decoder.vocab_size

    @property
    def hidden_size(self) -> int:
        """Columns of the embedding."""
        return self.decoder.hidden_size

    @property
    def num_hidden_layers(self) -> int:
        """Decoder layers."""
        return len(self.decoder.layers)

    @property
    def num_attention_heads(self) -> int:
        """Query heads of a layer; where layers differ, this and what follows is the first one's."""
        return self._attention.num_heads

    @property
    def num_key_value_heads(self) -> int:
        """Key heads of a layer."""
        return self._attention.num_kv_heads

    @property
    def head_size(self) -> int:
        """Columns of a head."""
        return self._attention.head_dim

    @property
    def hidden_act(self) -> str:
        """The activation of the feed-forward part."""
        mlp = self.decoder.layers[0].mlp
        return mlp.activation if isinstance(mlp, MlpSpec) else "silu"

    @property
    def intermediate_size(self) -> int:
        """Columns of the feed-forward part, or of one expert."""
        return self.decoder.layers[0].mlp.intermediate_size

    @property
    def norm_epsilon(self) -> float:
        """What norms add to the variance."""
        return self.decoder.final_norm.eps

    @property
    def position_embedding_type(self) -> str:
        """How positions are told: learned_absolute, alibi, rope_gptj (pairs side by side), rope_gpt_neox, long_rope or none."""
        rope = self._attention.rope
        if self.decoder.learned_positions:
            return "learned_absolute"
        if rope is None:
            return "alibi" if self._attention.alibi else "none"
        if isinstance(rope.by_length, LongRope):
            return "long_rope"
        return "rope_gptj" if rope.interleaved else "rope_gpt_neox"

    @property
    def max_position_embeddings(self) -> int:
        """The longest sequence."""
        return self.decoder.max_position_embeddings

    @property
    def _attention(self) -> AttentionSpec:
        return self.decoder.layers[0].attention

    def to_dict(self) -> dict[str, Any]:
        """As a checkpoint's config.json has it: JSON values, from which `from_dict` makes the same config."""
        return {
            **{name: getattr(self, name) for name in _FACTS},
            "dtype": self.dtype,
            "logits_dtype": "float32",
            "mapping": self.mapping.sizes(),
            "quantization": self._quantization,
            OURS: {
                "format": _FORMAT,
                "auto_dtype": self.auto_dtype,
                "config": {name: value for name, value in self.hugging_face.items() if name != "quantization_config"},
                "generation_config": dict(self.generation_config),
                **({"quantized": self.quantized.to_dict()} if self.quantized else {}),
            },
        }

    @property
    def _quantization(self) -> dict[str, Any]:
        """TensorRT-LLM's fields of it."""
        facts = self.quantized.facts if self.quantized else {}
        return _NOT_QUANTIZED | {name: facts[name] for name in _QUANTIZATION if name in facts}

    @staticmethod
    def from_dict(values: Values[str, Any], path: Path | None = None, where: str = "the config") -> "PretrainedConfig":
        """What `to_dict` has made.

        Args:
            path: the directory with the tokenizer.
            where: what to call it in an error.

        Raises:
            InvalidArgument: a field is missing, of another type, or does not follow from the Hugging Face config.
            Unimplemented: another program's config, or a later release's.
        """
        fields = Fields(values, where)
        if OURS not in values:
            raise _foreign(values, where)
        ours = Fields(fields.require(OURS, dict), f"{where}: {OURS!r}")
        if (found := ours.require("format", int)) != _FORMAT:
            raise Unimplemented(f"{where} has format {found}, this release reads {_FORMAT}: save the model again")
        quantization = fields.get("quantization", dict, {})
        packed = ours.get("quantized", dict, {})
        if not packed and any(quantization.get(name) is not None for name in _NOT_QUANTIZED):
            raise Unimplemented(
                f"{where}: quantization {quantization} is not supported: say it to from_hugging_face or to the build",
                reason="QUANTIZATION_UNSUPPORTED",
            )
        config = PretrainedConfig(
            hugging_face=ours.require("config", dict),
            dtype=fields.require("dtype", str),
            auto_dtype=ours.get("auto_dtype", bool, False),
            mapping=Mapping.from_dict(fields.get("mapping", dict, {})),
            generation_config=ours.get("generation_config", dict, {}),
            path=path,
            source=str(path) if path else where,
        )
        for name in _FACTS:
            if name in values and values[name] != getattr(config, name):
                raise InvalidArgument(
                    f"{where}: {name!r} is {values[name]!r}, but by the Hugging Face config in {OURS!r} it is "
                    f"{getattr(config, name)!r}: change it there",
                    reason="CONFIG_FIELD_INVALID",
                )
        if not packed:
            return config
        linears = Decoder.on_meta(config.decoder, "float32").linears()
        where = f"{where}: {OURS!r}: 'quantized'"
        return replace(config, quantized=Quantized.from_dict(packed, where, linears, len(config.decoder.layers)))

    @staticmethod
    def from_json_file(file: str | Path) -> "PretrainedConfig":
        """The config.json that `save_checkpoint` has written. Raises what `from_dict` raises, and NotFound."""
        path = Path(file)
        return PretrainedConfig.from_dict(read_json(path), path.parent, str(path))

    @staticmethod
    def from_path(
        path: Path,
        dtype: str = "auto",
        mapping: Mapping | None = None,
        source: str | None = None,
        quant_config: QuantConfig | None = None,
    ) -> "PretrainedConfig":
        """Of a directory in Hugging Face layout, which need not have weights, or a GGUF file. Reads what is beside weights.

        Raises:
            NotFound: no config.json.
            InvalidArgument, Unimplemented: as the class does.
        """
        gguf = open_gguf(path)
        config, generation_config = read_configs(path, gguf)
        return PretrainedConfig(
            hugging_face=config.values,
            dtype=(declared_dtype(config.values) or "float32") if dtype == "auto" else dtype,
            auto_dtype=dtype == "auto",
            mapping=mapping or Mapping(),
            generation_config=generation_config,
            path=path,
            gguf=gguf,
            source=source or str(path),
            quant_config=checked(quant_config),
        )


def hugging_face_config(values: Values[str, Any]) -> Values[str, Any]:
    """The Hugging Face config of a config.json, whether it is one or was saved with one in it."""
    ours = values.get(OURS)
    found = ours.get("config") if isinstance(ours, dict) else None
    return found if isinstance(found, dict) else values


def _foreign(values: Values[str, Any], where: str) -> Exception:
    if "architectures" in values:
        return InvalidArgument(
            f"{where} is a Hugging Face config: read it with from_hugging_face", reason="CONFIG_FIELD_MISSING"
        )
    return Unimplemented(
        f"{where} has no {OURS!r}: it was written by another program. Save the checkpoint with Enginehouse, from the Hugging "
        "Face model",
        reason="CHECKPOINT_FOREIGN",
    )
