"""Rotary positions from a GGUF file: its metadata, and the tensors in which it keeps factors of frequencies."""

import math
from collections.abc import Mapping
from typing import Any

import torch

from builder_svc.checkpoint.gguf_file import Metadata
from engine.errors import Unimplemented

ROPE_TENSORS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
"""What becomes a part of the config, and is no weight."""


def rope(meta: Metadata) -> dict[str, Any]:
    """The fields of config.json: base, share of a head, scaling. Raises Unimplemented for an unknown scaling."""
    rotary_dim, head_dim = meta.size("rope.dimension_count", meta.head_dim), meta.head_dim
    partial = {"partial_rotary_factor": rotary_dim / head_dim} if rotary_dim != head_dim else {}
    scaling = _scaling(meta, rotary_dim)
    return {
        "rope_theta": meta.get("rope.freq_base", float, 10000.0),
        **partial,
        **({"rope_scaling": scaling} if scaling else {}),
        **(
            {"original_max_position_embeddings": scaling["original_max_position_embeddings"]}
            if scaling.get("rope_type") == "longrope"
            else {}
        ),
    }


def _scaling(meta: Metadata, rotary_dim: int) -> dict[str, Any]:
    length = meta.size("context_length")
    original = meta.size("rope.scaling.original_context_length", length)
    if "rope_freqs.weight" in meta.file.shapes:
        return _factors(meta, meta.file.read("rope_freqs.weight"), rotary_dim)
    if "rope_factors_long.weight" in meta.file.shapes:
        long, short = (meta.file.read(f"rope_factors_{kind}.weight").tolist() for kind in ("long", "short"))
        return {
            "rope_type": "longrope",
            "long_factor": long,
            "short_factor": short,
            "original_max_position_embeddings": original,
            **_optional(meta, {"attention_factor": "rope.scaling.attn_factor"}),
        }
    kind = meta.get("rope.scaling.type", str, "none")
    if kind == "none":
        linear = meta.get("rope.scale_linear", float, 1.0)  # its key in the oldest files
        return {"rope_type": "linear", "factor": linear} if linear != 1 else {}
    factor = meta.require("rope.scaling.factor", float)
    if kind == "linear":
        return {"rope_type": "linear", "factor": factor}
    if kind == "yarn":
        betas = {"beta_fast": "rope.scaling.yarn_beta_fast", "beta_slow": "rope.scaling.yarn_beta_slow"}
        attention = {"attention_factor": "rope.scaling.yarn_attn_factor"}
        return {
            "rope_type": "yarn",
            "factor": factor,
            "original_max_position_embeddings": original,
            **_optional(meta, betas),
            **_optional(meta, attention),
        }
    raise Unimplemented(f"{meta.where}: rope scaling {kind!r} is not supported; supported are linear, yarn and factors")


def _factors(meta: Metadata, factors: torch.Tensor, rotary_dim: int) -> dict[str, Any]:
    """Of divisors of the frequencies: the scaling of Llama 3 if it is that, else the divisors themselves."""
    if 2 * len(factors) == rotary_dim:
        theta, largest = meta.get("rope.freq_base", float, 10000.0), round(float(factors.max()), 4)
        wavelength = 2 * math.pi * theta ** (torch.arange(0, rotary_dim, 2, dtype=torch.int64).float() / rotary_dim)
        smooth = (8192 / wavelength - 1) / 3
        expected = torch.where(smooth < 0, largest, torch.where(smooth > 1, 1, 1 / ((1 - smooth) / largest + smooth)))
        if torch.allclose(factors.float(), expected, rtol=1e-4):
            bounds = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
            return {"rope_type": "llama3", "factor": largest, **bounds}
    divisors = factors.tolist()
    return {
        "rope_type": "longrope",
        "long_factor": divisors,
        "short_factor": divisors,
        "attention_factor": 1.0,
        "original_max_position_embeddings": meta.size("context_length"),
    }


def _optional(meta: Metadata, keys: Mapping[str, str]) -> dict[str, Any]:
    return {name: meta.require(key, float) for name, key in keys.items() if key in meta.values}
