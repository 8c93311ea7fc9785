"""Every implementation of an operator against its reference, on random shapes; and the table against the references."""

import inspect
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from engine.ops import REFERENCE, Step, attention
from engine.opset import OPERATORS
from executor_svc import kernels

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


def attention_case(draw: st.DrawFn, dtype: torch.dtype) -> tuple[list[Tensor], dict[str, Any], Step]:
    head_dim, groups, per_group = draw(st.sampled_from([8, 20])), draw(st.integers(1, 3)), draw(st.integers(1, 3))
    block_size = draw(st.sampled_from([1, 4, 16]))
    lens = draw(st.lists(st.tuples(st.integers(1, 9), st.integers(0, 40)), min_size=1, max_size=4))
    query_lens, context_lens = [new for new, _ in lens], [new + old for new, old in lens]
    counts = [-(-length // block_size) for length in context_lens]
    num_blocks = sum(counts) + 2
    order = torch.randperm(num_blocks).tolist()
    tables, slots = torch.zeros(len(lens), max(counts), dtype=torch.int32), []
    for row, count in enumerate(counts):
        blocks, order = order[:count], order[count:]
        tables[row, :count] = torch.tensor(blocks, dtype=torch.int32)
        slots += [
            blocks[at // block_size] * block_size + at % block_size
            for at in range(context_lens[row] - query_lens[row], context_lens[row])
        ]
    shape = (num_blocks, block_size, groups, head_dim)
    step = Step(
        query_lens,
        context_lens,
        tables,
        torch.tensor(slots),
        [torch.randn(shape, dtype=dtype)],
        [torch.randn(shape, dtype=dtype)],
    )
    total = sum(query_lens)
    tensors = [torch.randn(total, heads * head_dim, dtype=dtype) for heads in (groups * per_group, groups, groups)]
    return (
        tensors,
        {"cache": 0, "head_dim": head_dim, "scale": 0.3, "window": draw(st.sampled_from([0, 1, 5, 64]))},
        step,
    )


def own_caches(step: Step) -> Step:
    return replace(
        step, k_caches=[cache.clone() for cache in step.k_caches], v_caches=[cache.clone() for cache in step.v_caches]
    )


@st.composite
def cases(draw: st.DrawFn, op: str) -> tuple[list[Tensor], dict[str, Any], Step | None]:
    dtype = draw(st.sampled_from(list(TOLERANCE)))
    torch.manual_seed(draw(st.integers(0, 10_000)))
    if op == "attention":
        return attention_case(draw, dtype)
    rows, size = draw(st.integers(1, 9)), draw(st.integers(1, 70))
    x, y, weight = (
        torch.randn(rows, size, dtype=dtype),
        torch.randn(rows, size, dtype=dtype),
        torch.randn(size, dtype=dtype),
    )
    made = {"rms_norm": ([x, weight], {"eps": 1e-5}), "add_rms_norm": ([x, y, weight], {"eps": 1e-5})}
    return *made[op], None


@pytest.mark.parametrize(("device", "op"), [("cpu", op) for op in kernels.own("cpu")])
def test_implementation_agrees_with_the_reference(device: str, op: str) -> None:
    @settings(max_examples=60, deadline=None)
    @given(case=cases(op))
    def agree(case: tuple[list[Tensor], dict[str, Any], Step | None]) -> None:
        tensors, attrs, step = case
        extra = [{}, {}] if step is None else [{"step": own_caches(step)} for _ in range(2)]
        wanted = REFERENCE[op](*tensors, **attrs, **extra[0])
        got = kernels.implementations(device)[op](*tensors, **attrs, **extra[1])
        for want, have in zip(
            *(value if isinstance(value, tuple) else (value,) for value in (wanted, got)), strict=True
        ):
            assert have.dtype == want.dtype
            assert (have.float() - want.float()).norm() <= TOLERANCE[want.dtype] * want.float().norm() + 1e-6
        if step is not None:
            assert torch.equal(extra[0]["step"].k_caches[0], extra[1]["step"].k_caches[0])
            assert torch.equal(extra[0]["step"].v_caches[0], extra[1]["step"].v_caches[0])

    agree()


def test_the_table_and_the_references_have_the_same_signatures() -> None:
    assert set(OPERATORS) == set(REFERENCE)
    for name, operator in OPERATORS.items():
        parameters = inspect.signature(REFERENCE[name]).parameters
        keywords = {key for key, value in parameters.items() if value.kind is value.KEYWORD_ONLY}
        assert tuple(key for key in parameters if key not in keywords) == tuple(
            slot.rstrip("?") for slot in operator.inputs
        )
        assert keywords - {"step"} == set(operator.attrs)


def test_attention_reference_by_hand() -> None:
    """One head, one dimension, keys 0: the mean of the values that a window of two lets a query see."""
    caches = [torch.zeros(2, 2, 1, 1)], [torch.zeros(2, 2, 1, 1)]
    step = Step([3], [3], torch.tensor([[1, 0]], dtype=torch.int32), torch.tensor([2, 3, 0]), *caches)
    zero, values = torch.zeros(3, 1), torch.tensor([[1.0], [3.0], [5.0]])
    out = attention(zero, zero, values, step=step, cache=0, head_dim=1, scale=1.0, window=2)
    assert out.flatten().tolist() == [1.0, 2.0, 4.0]
    assert step.v_caches[0].flatten().tolist() == [5.0, 0.0, 1.0, 3.0]


def test_rope_reference_interleaved_is_the_other_order_of_the_same_rotation() -> None:
    x = torch.randn(5, 2 * 12)
    positions, inv_freq = torch.arange(5, dtype=torch.int32), torch.tensor([1.0, 0.5, 0.1, 0.01])
    cos, sin = REFERENCE["rope_table"](positions, inv_freq, scale=1.0)
    order = torch.tensor(
        [0, 2, 4, 6, 1, 3, 5, 7, 8, 9, 10, 11]
    )  # pairs (2i, 2i+1) -> (i, i+4); 4 dimensions are not turned
    flat = REFERENCE["rope"](x, cos, sin, head_dim=12, interleaved=True).view(5, 2, 12)[..., order]
    halves = REFERENCE["rope"](x.view(5, 2, 12)[..., order].reshape(5, 24), cos, sin, head_dim=12, interleaved=False)
    assert torch.allclose(flat.reshape(5, 24), halves, atol=1e-6)
    assert torch.allclose(halves.norm(dim=-1), x.norm(dim=-1), atol=1e-5)
