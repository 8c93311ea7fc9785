"""Qwen, the first, against a reference of our own: transformers does not have it."""

from pathlib import Path
from typing import Any

import pytest
from families_harness import check_family
from qwen_reference import QwenReference, save_qwen

from engine.errors import InvalidArgument
from tests.running import make_engine

CASES = {
    "as-published": {},
    "biases-partial": {
        "no_bias": False, "rotary_pct": 0.5, "rotary_emb_base": 300.0, "seq_length": 32, "use_dynamic_ntk": False,
        "use_logn_attn": False,
    },
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_equals_the_reference(case: str, tmp_path: Path) -> None:
    changes: dict[str, Any] = CASES[case]
    checkpoint = save_qwen(tmp_path / "checkpoint", **changes)
    check_family(checkpoint, QwenReference(checkpoint), tmp_path)


@pytest.mark.parametrize("field", ["use_dynamic_ntk", "use_logn_attn"])
def test_what_acts_on_longer_sequences_limits_them(field: str, tmp_path: Path) -> None:
    off = {"use_dynamic_ntk": False, "use_logn_attn": False}
    checkpoint = save_qwen(tmp_path / "checkpoint", **off | {field: True})
    with pytest.raises(InvalidArgument, match="max_seq_len is 161, more than the model's 160"):
        make_engine(checkpoint, tmp_path / "store", max_seq_len=161)
    unlimited = save_qwen(tmp_path / "unlimited", **off)
    assert make_engine(unlimited, tmp_path / "store").manifest.limits.max_seq_len == 256
