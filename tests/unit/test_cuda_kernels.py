"""The Triton kernels against the references on random shapes: here by Triton's interpreter, in `tests/gpu` on the device."""

import os
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_ops import attend, attention_case, cases

from engine.ops import REFERENCE, Step

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif("TRITON_INTERPRET" not in os.environ, reason="tests/gpu runs them on the device")
kernels = pytest.importorskip("executor_svc.kernels.gpu")
tactics = pytest.importorskip("executor_svc.kernels.tactics")

FEW = settings(max_examples=12, deadline=None)


def check(op: str, inputs: list[Any], attrs: dict[str, Any]) -> None:
    found, wanted = getattr(kernels, op)(*inputs, **attrs), REFERENCE[op](*inputs, **attrs)
    for ours, theirs in zip(
        found if isinstance(found, tuple) else (found,), wanted if isinstance(wanted, tuple) else (wanted,), strict=True
    ):
        assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("op", sorted(set(kernels.__all__) & set(REFERENCE) - {"attention"}))
@FEW
@given(data=st.data())
def test_equals_its_reference(op: str, data: st.DataObject) -> None:
    kinds = cases(op).filter(lambda case: torch.bfloat16 not in [part.dtype for part in case[0] if part is not None])
    inputs, attrs = data.draw(kinds)
    check(op, inputs, attrs)


@settings(max_examples=3, deadline=None)
@given(data=st.data())
def test_attention_equals_its_reference(data: st.DataObject) -> None:
    tensors, attrs, steps = data.draw(st.composite(attention_case)(torch.float32))
    ours, theirs = (
        attend(kernels.attention, tensors, attrs, steps),
        attend(REFERENCE["attention"], tensors, attrs, steps),
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rows", [1, 6])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("pair", [True, False])
def test_every_tactic_of_a_product_of_few_rows(rows: int, bias: bool, pair: bool) -> None:
    """Alone, and of a pair with what `silu_mul` makes of it; chosen by a table that was written and read."""
    torch.manual_seed(rows)
    x, weight = torch.randn(rows, 700, dtype=torch.float16), torch.randn(74, 700, dtype=torch.float16) / 50
    added = torch.randn(74, dtype=torch.float16) if bias else None
    wanted = torch.nn.functional.linear(x.float(), weight.float(), added if added is None else added.float())
    wanted = REFERENCE["silu_mul"](wanted) if pair else wanted
    shape = tactics.shape_of(x, weight, "pair" if pair else "dense")
    for tactic in tactics.candidates(shape):
        table = tactics.from_json(tactics.to_json({shape: tactic}))
        assert tactics.choose(shape, table) == tactic
        found = (kernels.linear_silu_mul if pair else kernels.linear)(x, weight, added, table=table)
        torch.testing.assert_close(found.float(), wanted, rtol=4e-3, atol=4e-3)


@pytest.mark.parametrize("length", [1, 63, 64, 65, 700])
def test_decodes_split_over_the_context(length: int) -> None:
    """More splits than the context has keys, and fewer."""
    torch.manual_seed(length)
    blocks = -(-length // 16)
    caches = [torch.randn(blocks + 1, 16, 2, 32) for _ in range(2)]
    table = torch.randperm(blocks + 1)[:blocks].int()[None, :]
    step = {"query_lens": [1], "context_lens": [length], "block_tables": table}
    slots = table[0, (length - 1) // 16].long() * 16 + (length - 1) % 16
    made = [
        Step(**step, slots=slots[None], k_caches=[caches[0].clone()], v_caches=[caches[1].clone()]) for _ in range(2)
    ]
    q, k, v = torch.randn(1, 6 * 32), torch.randn(1, 64), torch.randn(1, 64)
    attrs = {"cache": 0, "head_dim": 32, "scale": 0.2, "window": 0}
    ours, theirs = (
        f(q, k, v, step=s, **attrs) for f, s in zip((kernels.attention, REFERENCE["attention"]), made, strict=True)
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert torch.equal(made[0].k_caches[0], made[1].k_caches[0])


def test_powers_of_two_of_sequences_have_kernels_for_all() -> None:
    """Of which each number of parts has one: others are not compiled before a start."""
    from executor_svc.kernels.decodes import parts

    for groups in (1, 3, 8, 40):
        wanted = {parts(rows * groups) for rows in range(1, 513)}
        assert {parts((1 << power) * groups) for power in range(10)} == wanted and max(wanted) <= 64
    assert [parts(programs) for programs in (1, 4, 8, 64, 500, 512, 1024, 4096)] == [64, 64, 32, 16, 2, 2, 1, 1]


@pytest.mark.parametrize("head_dim", [64, 128])
def test_prompts_that_begin_read_their_keys_where_they_are(head_dim: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A decode, a prompt with a cached prefix and two that begin, of which one ends inside a block of keys."""
    torch.manual_seed(head_dim)
    query_lens, context_lens = [1, 5, 130, 3], [9, 21, 130, 3]
    blocks = [-(-length // 16) for length in context_lens]
    table = torch.zeros(4, max(blocks), dtype=torch.int32)
    for row, count in enumerate(blocks):
        table[row, :count] = torch.arange(count) + sum(blocks[:row])
    ends = [range(context - count, context) for count, context in zip(query_lens, context_lens, strict=True)]
    slots = torch.tensor([table[row, at // 16] * 16 + at % 16 for row, part in enumerate(ends) for at in part])
    caches = [torch.randn(sum(blocks), 16, 2, head_dim, dtype=torch.float16) for _ in range(2)]
    q, k, v = (torch.randn(len(slots), heads * head_dim, dtype=torch.float16) for heads in (4, 2, 2))
    taken: list[int] = []
    ours = kernels.prompt.prompt
    monkeypatch.setattr(kernels.prompt, "prompt", lambda *a, **b: taken.append(len(a[4][0])) or ours(*a, **b))

    def run(operator: Any, dtype: torch.dtype) -> torch.Tensor:
        step = Step(
            query_lens, context_lens, table, slots, [caches[0].clone().to(dtype)], [caches[1].clone().to(dtype)]
        )
        attrs = {"cache": 0, "head_dim": head_dim, "scale": 0.1, "window": 0}
        found: torch.Tensor = operator(q.to(dtype), k.to(dtype), v.to(dtype), step=step, **attrs)
        return found.float()

    torch.testing.assert_close(
        run(kernels.attention, torch.float16), run(REFERENCE["attention"], torch.float32), rtol=4e-3, atol=4e-3
    )
    assert taken == [3]  # tiles of the two


def test_nothing_is_read_behind_the_last_key() -> None:
    """Of heads that are so long that several programs share a tile of queries, most of which are beyond this prompt's last."""
    torch.manual_seed(0)
    caches = [torch.full((3, 16, 1, 256), float("inf")) for _ in range(2)]
    for cache in caches:
        cache[1], cache[2, :5] = torch.randn(16, 1, 256), torch.randn(5, 1, 256)
    q, k, v = torch.randn(5, 512), torch.randn(5, 256), torch.randn(5, 256)
    found = []
    for operator in (kernels.attention, REFERENCE["attention"]):
        step = Step([5], [21], torch.tensor([[1, 2]]).int(), torch.arange(32, 37), *([part.clone()] for part in caches))
        found.append(operator(q, k, v, step=step, cache=0, head_dim=256, scale=0.1, window=0))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("small", [torch.float8_e4m3fn, torch.int8], ids=["fp8", "int8"])
@pytest.mark.parametrize(("head_dim", "splits_for"), [(64, 1024), (80, 1)])
def test_attention_over_a_cache_of_8_bits(
    head_dim: int, splits_for: int, small: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every number that 8 bits stand for, in decodes and in a prompt that goes on; read in pairs, which must not be mistaken.

    Of many sequences a decode is not split, and takes the keys that all see in a loop of their own.
    """
    monkeypatch.setattr("executor_svc.kernels.decodes.SPLITS_FOR", splits_for)
    torch.manual_seed(head_dim)
    query_lens, context_lens = [1, 1, 5], [150, 3, 75]
    table = torch.randperm(30).int().view(3, 10)
    ends = [range(context - count, context) for count, context in zip(query_lens, context_lens, strict=True)]
    slots = torch.tensor([table[row, at // 16] * 16 + at % 16 for row, part in enumerate(ends) for at in part])
    codes = torch.randint(-128, 128, (2, 30, 16, 2, head_dim), dtype=torch.int8)
    if small.is_floating_point:
        codes[(codes & 127) == 127] = 0  # which is no number
    # What is written is in whole units: Triton's interpreter rounds to float8 otherwise than devices do.
    unit = 2**-7
    q, k, v = (torch.randn(len(slots), heads * head_dim, dtype=torch.float16) for heads in (4, 2, 2))
    k, v = ((part / unit).to(small).half() * unit for part in (k / 4, v / 4))
    attrs = {"cache": 0, "head_dim": head_dim, "scale": 0.1, "window": 0, "k_scale": unit, "v_scale": unit}
    attrs["kv_int8"] = not small.is_floating_point

    def run(operator: Any, dtype: torch.dtype) -> torch.Tensor:
        step = Step(query_lens, context_lens, table, slots, *([part.clone().view(small)] for part in codes))
        found: torch.Tensor = operator(q.to(dtype), k.to(dtype), v.to(dtype), step=step, **attrs)
        return found.float()

    torch.testing.assert_close(
        run(kernels.attention, torch.float16), run(REFERENCE["attention"], torch.float32), rtol=4e-3, atol=4e-3
    )


@pytest.mark.parametrize(("rows", "vocab"), [(1, 50), (3, 20000)])
def test_chooses_the_first_of_the_most_probable(rows: int, vocab: int) -> None:
    from executor_svc.kernels.stage import choose

    torch.manual_seed(rows)
    logits = torch.randint(-9, 9, (rows + 2, vocab), dtype=torch.int8).half()[1 : rows + 1]
    logits[0] = float("-inf")
    last, places = torch.full((9,), -1, dtype=torch.int32), torch.tensor([4, 0, 7][:rows], dtype=torch.int32)
    chosen = choose(logits, places, last)
    assert chosen.tolist() == [logits[row].tolist().index(logits[row].max()) for row in range(rows)]
    assert last[places.long()].tolist() == chosen.tolist() and (last >= 0).sum() == rows


def test_a_row_of_no_numbers_gives_the_first_token() -> None:
    """Of its own row: three chunks, beside which a block has room for a fourth. Of some the highest of the others."""
    from executor_svc.kernels.stage import choose

    logits = torch.full((2, 3 * 8192), float("nan"))
    chosen = choose(logits, torch.tensor([0, 1], dtype=torch.int32), torch.zeros(2, dtype=torch.int32))
    assert chosen.tolist() == [0, 0]
    logits[1, 9000:9100] = torch.arange(100)
    assert choose(logits, torch.tensor([0, 1], dtype=torch.int32), torch.zeros(2, dtype=torch.int32)).tolist() == [
        0,
        9099,
    ]
