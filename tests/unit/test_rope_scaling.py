"""Rotary frequencies of every scaling against transformers' functions for them, and the tables that operators make of them."""

from typing import Any

import pytest
import torch
import transformers
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from builder_svc.models.config import DynamicRope, LongRope
from builder_svc.models.families.phi3 import decoder_config as phi3
from builder_svc.models.fields import Fields
from builder_svc.models.rope import longest_sequence, rope_spec
from engine.ops import dynamic_rope_table, long_rope_table, rope_table

LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
FACTORS = {"short_factor": [1.0, 1.1, 1.4, 1.9, 2.0, 2.5], "long_factor": [1.0, 2.0, 4.0, 9.0, 15.0, 40.0]}

SCALINGS: dict[str, dict[str, Any]] = {
    "linear": {"rope_type": "linear", "factor": 3.0},
    "linear-partial": {"rope_type": "linear", "factor": 2.5, "partial_rotary_factor": 0.31},
    "dynamic": {"rope_type": "dynamic", "factor": 4.0},
    "dynamic-partial": {"rope_type": "dynamic", "factor": 1.5, "partial_rotary_factor": 0.84},
    "llama3": {"rope_type": "llama3", "factor": 8.0, **LLAMA3},
    "llama3-smaller-base": {"rope_type": "llama3", "factor": 32.0, **LLAMA3, "rope_theta": 70.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128},
    "yarn-of-its-whole-length": {"rope_type": "yarn", "factor": 4.0, "partial_rotary_factor": 0.52},
    "yarn-betas": {
        "rope_type": "yarn", "factor": 16.0, "beta_fast": 4.0, "beta_slow": 0.5, "original_max_position_embeddings": 77,
    },
    "yarn-untruncated": {"rope_type": "yarn", "factor": 4.0, "truncate": False, "original_max_position_embeddings": 100},
    "yarn-mscale": {"rope_type": "yarn", "factor": 40.0, "mscale": 0.707, "mscale_all_dim": 1.2},
    "yarn-mscale-alone": {"rope_type": "yarn", "factor": 40.0, "mscale": 0.707},
    "yarn-attention-factor": {"rope_type": "yarn", "factor": 4.0, "attention_factor": 1.37, "mscale": 0.7, "mscale_all_dim": 2.0},
    "yarn-below-one": {"rope_type": "yarn", "factor": 0.5},
    "longrope": {"rope_type": "longrope", **FACTORS, "original_max_position_embeddings": 64},
    "longrope-factor": {"rope_type": "longrope", "factor": 32.0, **FACTORS, "original_max_position_embeddings": 64},
    "longrope-attention-factor": {"rope_type": "longrope", **FACTORS, "attention_factor": 1.19},
    "longrope-partial": {
        "rope_type": "longrope", "partial_rotary_factor": 0.75, "original_max_position_embeddings": 64,
        "short_factor": FACTORS["short_factor"], "long_factor": FACTORS["long_factor"], "head_dim": 16,
    },
}  # fmt: skip


@pytest.mark.parametrize("case", SCALINGS)
def test_frequencies_are_those_of_transformers(case: str) -> None:
    scaling = {"rope_theta": 10000.0, **SCALINGS[case]}
    head_dim = scaling.pop("head_dim", 12 if scaling["rope_type"] == "longrope" else 20)
    theirs = transformers.LlamaConfig(
        hidden_size=60, num_attention_heads=3, head_dim=head_dim, max_position_embeddings=256, rope_parameters=scaling
    )
    scaling = {name: value for name, value in scaling.items() if name not in ("rope_theta", "partial_rotary_factor")}
    partial = {"partial_rotary_factor": SCALINGS[case].get("partial_rotary_factor", 1.0)}
    old = {
        "max_position_embeddings": 256, "rope_theta": SCALINGS[case].get("rope_theta", 10000.0), **partial,
        "rope_scaling": {"type" if name == "rope_type" else name: value for name, value in scaling.items()},
    }  # fmt: skip
    spec = rope_spec(Fields(theirs.to_dict(), "config.json"), head_dim)
    assert rope_spec(Fields(old, "config.json"), head_dim) == spec
    init = ROPE_INIT_FUNCTIONS[scaling["rope_type"]]
    inv_freq, scale = init(theirs)
    positions = torch.arange(256, dtype=torch.int32)
    torch.testing.assert_close(torch.tensor(spec.inv_freq), inv_freq, rtol=2e-6, atol=0)
    assert spec.scale == pytest.approx(scale, rel=1e-12)
    found = rope_table(positions, torch.tensor(spec.inv_freq), scale=spec.scale)
    for length in (1, 64, 65, 256, 300, 900):
        inv_freq, _ = init(theirs, seq_len=length)
        lengths = torch.full_like(positions, length)
        if isinstance(spec.by_length, LongRope):
            inv_freqs = torch.tensor(spec.inv_freq), torch.tensor(spec.by_length.inv_freq)
            found = long_rope_table(positions, lengths, *inv_freqs, original=spec.by_length.original, scale=spec.scale)
        if isinstance(by := spec.by_length, DynamicRope):
            found = dynamic_rope_table(
                positions, lengths, rotary_dim=2 * len(spec.inv_freq), theta=by.theta, factor=by.factor, original=by.original
            )  # fmt: skip
        angles = positions[:, None] * inv_freq
        for ours, wanted in zip(found, (angles.cos() * scale, angles.sin() * scale), strict=True):
            torch.testing.assert_close(ours, wanted, rtol=0, atol=1e-4)


def test_tables_mix_sequences_of_different_lengths() -> None:
    """A step holds tokens of many sequences, each of its own length."""
    positions, lengths = torch.tensor([3, 3, 9, 9], dtype=torch.int32), torch.tensor([8, 9, 10, 20], dtype=torch.int32)
    short, long = torch.tensor([1.0, 0.1]), torch.tensor([0.5, 0.01])
    for part, alone in zip(
        long_rope_table(positions, lengths, short, long, original=9, scale=2.0),
        zip(*(rope_table(positions, inv_freq, scale=2.0) for inv_freq in (short, long)), strict=True),
        strict=True,
    ):
        assert torch.equal(part, torch.cat((alone[0][:2], alone[1][2:])))
    attrs: dict[str, Any] = {"rotary_dim": 6, "theta": 100.0, "factor": 2.0, "original": 9}
    whole = dynamic_rope_table(positions, lengths, **attrs)
    for row in range(4):
        alone = dynamic_rope_table(positions[row : row + 1], lengths[row : row + 1], **attrs)
        assert all(torch.equal(part[row], one[0]) for part, one in zip(whole, alone, strict=True))
    assert not torch.equal(whole[0][2], whole[0][3])


@pytest.mark.parametrize(
    ("scaling", "longest"),
    [
        ({"rope_type": "linear", "factor": 2.5}, 250),
        ({"rope_type": "dynamic", "factor": 4.0}, 400),
        ({"rope_type": "yarn", "factor": 4.0}, 400),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 25}, 100),
        ({"rope_type": "llama3", "factor": 8.0, **LLAMA3}, 100),
        ({"rope_type": "longrope", "factor": 8.0}, 100),
    ],
)
def test_longest_sequence(scaling: dict[str, Any], longest: int) -> None:
    """Configs of some scalings count what they add, those of others do not."""
    assert longest_sequence(Fields({"max_position_embeddings": 100, "rope_scaling": scaling}, "config.json")) == longest


@pytest.mark.parametrize("name", ["su", "yarn", "longrope"])
def test_phi3_has_had_three_names_for_longrope(name: str) -> None:
    values = {
        "vocab_size": 320, "hidden_size": 48, "intermediate_size": 72, "num_hidden_layers": 1, "num_attention_heads": 4,
        "rms_norm_eps": 1e-5, "max_position_embeddings": 65536, "rope_scaling": {"type": name, **FACTORS},
    }  # fmt: skip
    decoder = phi3(Fields(values, "config.json"), "Phi3ForCausalLM")
    rope = decoder.ropes[0]
    assert isinstance(rope.by_length, LongRope)
    assert (rope.by_length.original, decoder.max_position_embeddings) == (4096, 65536)
    assert rope.scale == pytest.approx((1 + 4 / 12) ** 0.5)
