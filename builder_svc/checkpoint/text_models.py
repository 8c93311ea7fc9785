"""Checkpoints of models of text and images: of them the text model alone is built."""

import logging
import re
from collections.abc import Mapping
from typing import Any

import torch

from builder_svc.checkpoint.tensors import Weights
from builder_svc.models.fields import Fields

# Architecture -> its text model's, and what config.json leaves out of that one's config where it is as transformers has it.
_TEXT_MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "Gemma3ForConditionalGeneration": (
        "Gemma3ForCausalLM",
        {
            "vocab_size": 262_208, "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26,
            "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256, "max_position_embeddings": 131_072,
            "rms_norm_eps": 1e-6, "sliding_window": 4096, "tie_word_embeddings": True,
        },
    ),
}  # fmt: skip
_OUTER = ("dtype", "torch_dtype", "eos_token_id", "quantization_config", "tie_word_embeddings")
_NAME = re.compile(r"(?:model\.language_model|language_model)\.(?:model\.)?(?P<rest>.+)")

log = logging.getLogger(__name__)


def text_config(config: Fields) -> Fields:
    """The config of the text model, as if it had been published alone; any other config as it is.

    Raises InvalidArgument if there is no text_config in it.
    """
    found = _find(config)
    if found is None:
        return config
    architecture, defaults = found
    outer = {name: config.values[name] for name in _OUTER if config.values.get(name) is not None}
    inner = config.require("text_config", dict)
    return Fields({**defaults, **outer, **inner, "architectures": [architecture]}, config.where)


def text_weights(config: Fields, weights: Weights) -> Weights:
    """The text model's tensors by the names that it would have alone; those of other models as they are."""
    return _TextWeights(weights, config.where) if _find(config) else weights


def _find(config: Fields) -> tuple[str, dict[str, Any]] | None:
    names = config.values.get("architectures")
    known = [name for name in names if name in _TEXT_MODELS] if isinstance(names, list) else []
    return _TEXT_MODELS[known[0]] if known else None


class _TextWeights:
    def __init__(self, weights: Weights, where: str) -> None:
        self._weights = weights
        self._names = {ours: name for name in weights.shapes if (ours := _text_name(name))}
        self.shapes: Mapping[str, tuple[int, ...]] = {ours: weights.shapes[name] for ours, name in self._names.items()}
        left = len(weights.shapes) - len(self.shapes)
        log.info("%s: the engine takes text; %d tensors of the image encoder are left out", where, left)

    def read(self, name: str) -> torch.Tensor:
        """One tensor. Raises KeyError for an unknown name."""
        return self._weights.read(self._names[name])


def _text_name(name: str) -> str | None:
    if name.endswith("lm_head.weight"):
        return "lm_head.weight"
    match = _NAME.fullmatch(name)
    return f"model.{match['rest']}" if match else None
