"""From a module to a program: what is recorded, and what is refused."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from builder_svc.lower.program import lower
from builder_svc.models.operators import op, result_types
from engine.errors import Internal
from engine.ops import REFERENCE
from engine.opset import OPERATORS

X, WEIGHT = torch.randn(5, 12), torch.randn(7, 12)
POSITIONS = torch.arange(5, dtype=torch.int32)

APPLIED: dict[str, tuple[list[Tensor | None], dict[str, Any]]] = {
    "embedding": ([POSITIONS, WEIGHT], {}),
    "linear": ([X, WEIGHT, None], {}),
    "linear_int4": (
        [X, torch.zeros(7, 6, dtype=torch.uint8), torch.ones(7, 3), None, WEIGHT[:, 0]],
        {"group_size": 4},
    ),
    "linear_int8": ([X, torch.zeros(7, 12, dtype=torch.int8), torch.ones(7), None], {}),
    "linear_fp8": (
        [X, torch.zeros(7, 12, dtype=torch.float8_e4m3fn), torch.ones(7, 1), None],
        {"block_rows": 1, "block_columns": 12},
    ),
    "rms_norm": ([X, WEIGHT[0]], {"eps": 1e-5}),
    "add_rms_norm": ([X, X, WEIGHT[0]], {"eps": 1e-5}),
    "layer_norm": ([X, WEIGHT[0], None], {"eps": 1e-5}),
    "add_layer_norm": ([X, X, WEIGHT[0], WEIGHT[1]], {"eps": 1e-5}),
    "head_rms_norm": ([X, WEIGHT[0, :4]], {"eps": 1e-5}),
    "head_layer_norm": ([X, WEIGHT[:3, :4]], {"eps": 1e-5}),
    "rope_table": ([POSITIONS, torch.rand(3)], {"scale": 1.0}),
    "long_rope_table": ([POSITIONS, POSITIONS, torch.rand(3), torch.rand(3)], {"original": 3, "scale": 1.0}),
    "dynamic_rope_table": ([POSITIONS, POSITIONS], {"rotary_dim": 4, "theta": 10.0, "factor": 2.0, "original": 3}),
    "rope": ([X, torch.rand(5, 2), torch.rand(5, 2)], {"head_dim": 6, "interleaved": False}),
    "silu_mul": ([X], {}),
    "gelu": ([X], {"tanh": True}),
    "gelu_mul": ([X], {"tanh": False}),
    "sigmoid_mul": ([X, X[:, :1]], {}),
    "experts": (
        [X, torch.randn(5, 3), torch.randn(3, 8, 12), torch.randn(3, 12, 4)],
        {"top_k": 2, "normalize": True},
    ),
    "add": ([X, X], {}),
    "scale": ([X], {"factor": 2.0}),
    "soft_cap": ([X], {"cap": 30.0}),
    "split": ([X], {"sizes": [3, 9]}),
    "gather": ([X, POSITIONS[:2]], {}),
    "embedding_shard": ([POSITIONS, WEIGHT[:2], torch.tensor([1], dtype=torch.int32)], {}),
}


@pytest.mark.parametrize("name", [name for name, spec in OPERATORS.items() if not (spec.uses_step or spec.uses_group)])
def test_the_shapes_are_those_of_the_reference(name: str) -> None:
    tensors, attrs = APPLIED[name]
    made = REFERENCE[name](*tensors, **attrs)
    results = [made] if isinstance(made, Tensor) else made
    assert result_types(name, tensors, attrs) == [(result.dtype, tuple(result.shape)) for result in results]


class Tiny(nn.Module):
    """An embedding, and logits by the same weight."""

    def __init__(self, foreign: bool) -> None:
        super().__init__()
        self.foreign = foreign
        self.weight = nn.Parameter(torch.empty(11, 4, device="meta"))

    def forward(self, token_ids: Tensor, positions: Tensor, logit_indices: Tensor) -> Tensor:
        x = op.gather(op.embedding(token_ids, self.weight), logit_indices)
        return op.linear(x + x if self.foreign else op.add(x, x), self.weight, None)


def test_a_module_becomes_its_operators() -> None:
    program = lower(Tiny(foreign=False), max_num_tokens=9)
    assert [made.op for made in program.ops] == ["embedding", "gather", "add", "linear"]
    assert program.ops[2].outputs[0].type.shape == ("num_logits", 4)
    assert program.ops[3].inputs == ("v2", "weight", "") and program.opset_version == OPERATORS["add"].since
    assert set(program.inputs) == {"token_ids", "positions", "logit_indices"} and program.dims["num_tokens"] == 9


def test_what_is_no_operator_is_refused() -> None:
    with pytest.raises(Internal, match="linear takes what no operator of ours has made"):
        lower(Tiny(foreign=True), max_num_tokens=9)
    with pytest.raises(AttributeError, match="relu is no operator of the set: embedding, "):
        _ = op.relu
