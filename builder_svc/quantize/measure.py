"""Perplexity of a model over a text, computed layer by layer like calibration, whatever its weights are packed as."""

import math
from dataclasses import dataclass

from torch import Tensor

from builder_svc.build_config import Progress
from builder_svc.causal_lm import CausalLM
from builder_svc.quantize.forward import Stream, compute_device
from builder_svc.quantize.text import HELD_OUT, Tokens, read_text
from engine.errors import FailedPrecondition, InvalidArgument


@dataclass(frozen=True)
class Perplexity:
    """exp of the mean of -log p over so many tokens, each of which sees those before it in its sequence."""

    value: float
    tokens: int


def held_out(model: CausalLM, most: int, length: int = 1024) -> tuple[Tensor, int]:
    """The held-out text for a model: (token ids, int64 [sequences, length]; how many in front of each are no text).

    Args:
        most: tokens of the text, at most.
        length: of a sequence, at most.

    Raises:
        FailedPrecondition: the model has no tokenizer.
        InvalidArgument: fewer tokens than one sequence.
    """
    tokenizer = model.tokenizer()
    if tokenizer is None:
        raise FailedPrecondition(f"{model.config.source} has no tokenizer", reason="TOKENIZER_MISSING")
    if most < 2:
        raise InvalidArgument(f"{most} tokens: to measure perplexity takes at least 2")
    tokens = Tokens(read_text(HELD_OUT), tokenizer.files())
    length = min(length, model.config.max_position_embeddings, most + len(tokens.start))
    own = length - len(tokens.start)
    return tokens.sequences(length, max(1, -(-most // own))), len(tokens.start)


def perplexity(
    model: CausalLM, sequences: Tensor, start: int, device: str = "auto", progress: Progress = lambda *_: None
) -> Perplexity:
    """Of a model, dense or quantized by `quantize`: products and caches as their operators' references have them.

    Args:
        sequences: token ids, int64 [sequences, length].
        start: how many of each are not counted; never the first, which nothing is before.
        device: as CalibConfig says it.
        progress: told of phase "perplexity", in layers.
    """
    config, quantized, weights = model.config, model.config.quantized, model.weights()
    packed = quantized.packed if quantized else {}
    scales = quantized.kv_scales if quantized and quantized.kv_scales else None
    kv_int8 = bool(quantized and quantized.kv_int8)
    stream = Stream(config.decoder, weights.__getitem__, sequences, compute_device(device), packed, scales, kv_int8)
    count = len(config.decoder.layers)
    for number in range(count):
        progress("perplexity", number, count, "")
        stream.pass_layer(number, stream.layer_tensors(number))
    total, tokens = stream.loss(stream.head_tensors(), start)
    progress("perplexity", count, count, "")
    return Perplexity(math.exp(total / tokens), tokens)
