"""What is asked for, made definite: the form of each linear, and the sequences to calibrate with. Errors come from here."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from builder_svc.checkpoint.quantized.method import names_module
from builder_svc.checkpoint.quantized.resolve import in_ranges
from builder_svc.models.config import ExpertsSpec
from builder_svc.models.decoder import Decoder
from builder_svc.models.packed import Fp8, Int4, Int8, Packed
from builder_svc.pretrained import PretrainedConfig
from builder_svc.quant_config import GROUP_SIZES, INT4, CalibConfig, QuantAlgo, QuantConfig
from builder_svc.quantize.text import Tokens, read_text, sequences
from builder_svc.tokenizer import NormalizedTokenizer
from engine.errors import FailedPrecondition, InvalidArgument, Unimplemented

VERSION = 1  # raised when the same inputs give other weights than before
_EXACT = ("mlp.router", "mlp.shared_gate")  # a choice among experts: small, and what rounding moves most

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Plan:
    """What will be done.

    Attributes:
        packed: a linear's name -> its form.
        sequences: token ids to calibrate with, int64 [samples, tokens]; None where nothing is calibrated.
        device: where to calibrate, as CalibConfig says it.
        facts: all that decides the result beside the model, as JSON values.
    """

    quant_config: QuantConfig
    packed: Mapping[str, Packed]
    sequences: Tensor | None
    device: str
    facts: dict[str, Any]


def make_plan(
    config: PretrainedConfig,
    quant_config: QuantConfig,
    calib: CalibConfig,
    tokenizer: NormalizedTokenizer | None,
    *,
    target: str = "",
    compute_capability: str | None = None,
    measures: bool = False,
    dummy: bool = False,
) -> Plan:
    """Checks everything that can be checked before weights are read.

    Args:
        quant_config: one that asks for something.
        target: the device that an engine will run on, if it is known, and its compute capability.
        measures: whether errors are to be measured, for which any algorithm needs the text.
        dummy: weights are random: nothing is calibrated.

    Raises:
        InvalidArgument: an excluded module that matches nothing, a group size that does not divide, a target that cannot run it,
            text that is too short or empty.
        Unimplemented: an algorithm that is not made here, a head that is tied.
        NotFound: no calibration text.
        FailedPrecondition: no tokenizer, no GPU where one was asked for.
    """
    quant_config.check()
    calib.check()
    _check_target(quant_config, target, compute_capability)
    packed = _forms(config, quant_config)
    facts: dict[str, Any] = {"method": "enginehouse", "version": VERSION, **quant_config.facts()}
    found = None
    if (quant_config.calibrates or measures) and not dummy:
        _check_device(calib.device)
        text = read_text(calib.calib_dataset)
        found = sequences(Tokens(text, tokenizer and tokenizer.files()), calib, config.max_position_embeddings)
        if len(found) < calib.samples:
            log.info("%s gives %d sequences of %d tokens", text.where, *found.shape)
    if quant_config.calibrates and found is not None:
        facts["calibration"] = {
            "text": text.digest, "samples": len(found), "tokens": found.shape[1], "seed": calib.random_seed,
        }  # fmt: skip
    facts["packed"] = in_ranges({name: str(form) for name, form in packed.items()})
    return Plan(quant_config, packed, found, calib.device, facts)


def _forms(config: PretrainedConfig, quant_config: QuantConfig) -> dict[str, Packed]:
    """The form of each linear that is to be quantized."""
    algo = quant_config.quant_algo
    columns = Decoder.on_meta(config.decoder, "float32").linears()
    excluded = _excluded(config, columns, quant_config.exclude_modules or [])
    if algo is None:
        return {}
    if quant_config.quantize_lm_head and "lm_head" not in columns:
        raise Unimplemented(
            f"quantize_lm_head: the head of {config.source} is its embedding, which stays as it is: leave it out",
            reason="QUANTIZATION_UNSUPPORTED",
        )
    if not quant_config.quantize_lm_head:
        excluded = excluded | {"lm_head"}
    form: Packed = {
        QuantAlgo.W8A16: Int8("float32"),
        QuantAlgo.W8A8_SQ_PER_CHANNEL: Int8("float32", "token"),
        QuantAlgo.FP8: Fp8(activations="tensor"),
        QuantAlgo.FP8_PER_CHANNEL_PER_TOKEN: Fp8(activations="token"),
    }.get(algo) or Int4(quant_config.group_size, quant_config.has_zero_point, "float16")
    found = {name: form for name in columns if name not in excluded and not name.endswith(_EXACT)}
    if not found:
        raise InvalidArgument(
            "exclude_modules leaves nothing to quantize: name fewer", reason="QUANTIZATION_EXCLUDES_ALL"
        )
    if algo in INT4:
        _check_groups({name: columns[name] for name in found}, quant_config.group_size)
    if any(isinstance(layer.mlp, ExpertsSpec) for layer in config.decoder.layers):
        log.warning("%s: experts have no packed operator, and stay as they are", config.source)
    return found


def _excluded(config: PretrainedConfig, columns: Mapping[str, int], patterns: list[str]) -> set[str]:
    names = config.family.NAMES
    sources = names.sources(config.decoder, (names.prefix,))
    called = {
        linear: [linear, *(name.removesuffix(".weight") for name in sources[f"{linear}.weight"].names)]
        for linear in columns
    }
    called.setdefault("lm_head", ["lm_head"])
    found: set[str] = set()
    for pattern in patterns:
        matched = {linear for linear, known in called.items() if any(names_module(pattern, name) for name in known)}
        if not matched:
            some = ", ".join(dict.fromkeys(known[-1] for known in list(called.values())[:4]))
            raise InvalidArgument(
                f"exclude_modules: {pattern!r} matches no linear of {config.source}; they are called {some}, ...",
                reason="EXCLUDED_MODULE_UNKNOWN",
            )
        found |= matched
    return found


def _check_groups(columns: Mapping[str, int], group_size: int) -> None:
    wrong = {name: count for name, count in columns.items() if count % group_size}
    if not wrong:
        return
    fitting = [size for size in GROUP_SIZES if not any(count % size for count in columns.values())]
    name, count = next(iter(wrong.items()))
    instead = (
        f"group_size {' or '.join(map(str, fitting))} would fit" if fitting else "exclude these with exclude_modules"
    )
    raise InvalidArgument(
        f"group_size {group_size} does not divide the {count} inputs of {name}, nor those of {len(wrong) - 1} more linears: "
        f"{instead}",
        reason="GROUP_SIZE_INVALID",
    )


def _check_target(quant_config: QuantConfig, target: str, compute_capability: str | None) -> None:
    """Products and caches of float8 need the GPU's own instructions; the CPU multiplies with the matrices they stand for."""
    asked = [algo for algo in (quant_config.quant_algo, quant_config.kv_cache_quant_algo) if algo and "FP8" in algo]
    if target != "cuda" or not asked or compute_capability is None:
        return
    if tuple(map(int, compute_capability.split("."))) < (8, 9):
        raise InvalidArgument(
            f"{asked[0]} needs a GPU of compute capability 8.9 or more, not {compute_capability}: choose W8A16, W4A16_AWQ or "
            "W8A8_SQ_PER_CHANNEL, and INT8 for the KV cache",
            reason="QUANTIZATION_TARGET",
        )


def _check_device(device: str) -> None:
    if device != "cuda":
        return
    import torch

    if not torch.cuda.is_available():
        raise FailedPrecondition(
            "calibration device 'cuda': torch finds no GPU here; choose auto or cpu", reason="DEVICE_MISSING"
        )
