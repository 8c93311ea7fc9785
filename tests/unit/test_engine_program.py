"""What a program must be to hold together: each thing that can be wrong, with the words that say so."""

import json
from collections.abc import Callable
from typing import Any

import pytest

from engine.errors import InvalidArgument
from engine.opset import OPERATORS, OPSET_VERSION
from engine.program import SCHEMA_VERSION, KVCache, Op, Program, TensorType, Value


def tensor(*shape: int | str, dtype: str = "float32") -> TensorType:
    return TensorType(dtype, shape)  # type: ignore[arg-type]


def program() -> Program:
    """A token's embedding, split, attended to and projected: one operator of each kind of signature."""
    return Program(
        dims={"num_tokens": 16, "num_logits": 4},
        inputs={
            "token_ids": tensor("num_tokens", dtype="int32"),
            "logit_indices": tensor("num_logits", dtype="int32"),
        },
        weights={"embed": tensor(10, 24), "norm": tensor(8), "head": tensor(10, 8)},
        caches=(KVCache(1, 8, "float32"),),
        ops=(
            Op("embedding", ("token_ids", "embed"), (Value("qkv", tensor("num_tokens", 24)),)),
            Op(
                "split",
                ("qkv",),
                tuple(Value(name, tensor("num_tokens", 8)) for name in "qkv"),
                {"sizes": [8, 8, 8]},
            ),
            Op(
                "attention",
                ("q", "k", "v"),
                (Value("o", tensor("num_tokens", 8)),),
                {"cache": 0, "head_dim": 8, "scale": 0.5, "window": 0},
            ),
            Op(
                "add_rms_norm",
                ("o", "q", "norm"),
                (Value("x", tensor("num_tokens", 8)), Value("sum", tensor("num_tokens", 8))),
                {"eps": 1e-6},
            ),
            Op("gather", ("x", "logit_indices"), (Value("last", tensor("num_logits", 8)),)),
            Op("linear", ("last", "head", ""), (Value("logits", tensor("num_logits", 10)),)),
        ),
        outputs=("logits",),
    )


def test_a_program_comes_back_from_json():
    assert Program.from_json(program().to_json()) == program()


def test_the_same_program_gives_the_same_json():
    assert program().to_json() == program().to_json()


def test_kv_bytes():
    assert KVCache(4, 64, "bfloat16").bytes_per_token == 2 * 4 * 64 * 2


def test_tensor_sizes():
    assert tensor(3, 5).size == 15
    assert tensor(3, 5, dtype="float16").nbytes == 30
    assert tensor().size == 1


Edit = Callable[[dict[str, Any]], object]

WRONG: dict[str, tuple[Edit, str]] = {
    "another schema": (lambda p: p.update(schema_version=SCHEMA_VERSION + 1), "versions: schema 2"),
    "another operator set": (
        lambda p: p.update(opset_version=OPSET_VERSION + 1),
        f"reads schema 1 and operator sets up to {OPSET_VERSION}",
    ),
    "an unknown field": (lambda p: p.update(code="x"), "unknown field `code`"),
    "a missing field": (lambda p: p.pop("caches"), "missing required field `caches`"),
    "a value of the wrong type": (lambda p: p.update(outputs="logits"), r"\$\.outputs"),
    "an unknown dtype": (lambda p: p["weights"]["head"].update(dtype="complex64"), r"\$\.weights"),
    "a weight that is an input": (
        lambda p: p["weights"].update(token_ids=p["weights"]["norm"]),
        r"weights: \['token_ids'\] are inputs too",
    ),
    "an input without a name": (lambda p: p["inputs"].update({"": p["weights"]["norm"]}), "the empty name"),
    "a weight without a name": (lambda p: p["weights"].update({"": p["weights"]["norm"]}), "the empty name"),
    "an input of an unknown dimension": (
        lambda p: p["inputs"]["token_ids"].update(shape=["n"]),
        r"token_ids: dimension 'n' is neither a size nor one of \['num_logits', 'num_tokens'\]",
    ),
    "a weight of a negative size": (lambda p: p["weights"]["norm"].update(shape=[-1]), "norm: dimension -1"),
    "an output of an unknown dimension": (
        lambda p: p["ops"][0]["outputs"][0]["type"].update(shape=["n", 24]),
        "qkv: dimension 'n'",
    ),
    "an unknown operator": (
        lambda p: p["ops"][0].update(op="exec"),
        r"ops\[0\] \(exec\): unknown operator; .* has add",
    ),
    "an input too few": (lambda p: p["ops"][0].update(inputs=["token_ids"]), "1 inputs, expected 2: token_ids, weight"),
    "an input too many": (lambda p: p["ops"][4]["inputs"].append("x"), r"ops\[4\] \(gather\): 3 inputs"),
    "an input that nobody makes": (
        lambda p: p["ops"][1].update(inputs=["nothing"]),
        r"ops\[1\] \(split\): input 'x' is 'nothing', which is not defined before",
    ),
    "an input that is made later": (lambda p: p["ops"].reverse(), "which is not defined before"),
    "an operator that reads what it makes": (lambda p: p["ops"][1].update(inputs=["q"]), "not defined before"),
    "a needed input left out": (lambda p: p["ops"][5].update(inputs=["last", "", ""]), "input 'weight' is ''"),
    "an optional input that nobody makes": (
        lambda p: p["ops"][5].update(inputs=["last", "head", "nothing"]),
        "input 'bias' is 'nothing'",
    ),
    "a missing attribute": (lambda p: p["ops"][3].update(attrs={}), r"attributes \[\], expected \['eps'\]"),
    "an attribute too many": (lambda p: p["ops"][4].update(attrs={"axis": 0}), r"\['axis'\], expected \[\]"),
    "an int for a float": (lambda p: p["ops"][3]["attrs"].update(eps=1), "'eps' of add_rms_norm must be float, not 1"),
    "a bool for an int": (lambda p: p["ops"][2]["attrs"].update(window=True), "must be int, not True"),
    "a float for an int": (lambda p: p["ops"][2]["attrs"].update(head_dim=8.0), "must be int, not 8.0"),
    "a number for a list": (lambda p: p["ops"][1]["attrs"].update(sizes=8), "must be list, not 8"),
    "a text for a number": (lambda p: p["ops"][3]["attrs"].update(eps="1"), r"\$\.ops"),
    "an output too few": (lambda p: p["ops"][3]["outputs"].pop(), "1 outputs, expected 2: y, sum"),
    "an output too many": (
        lambda p: p["ops"][4]["outputs"].append({"name": "z", "type": p["weights"]["norm"]}),
        "2 outputs, expected 1: y",
    ),
    "a split into more than its sizes": (
        lambda p: p["ops"][1]["attrs"].update(sizes=[8, 16]),
        r"3 outputs, but sizes \[8, 16\]",
    ),
    "an attention without a cache": (lambda p: p["ops"][2]["attrs"].update(cache=1), "cache 1, but there are 1"),
    "an attention with a negative cache": (lambda p: p["ops"][2]["attrs"].update(cache=-1), "cache -1"),
    "an output without a name": (lambda p: p["ops"][0]["outputs"][0].update(name=""), "'' is empty or defined twice"),
    "a name made twice": (lambda p: p["ops"][4]["outputs"][0].update(name="x"), "'x' is empty or defined twice"),
    "a name twice in one operator": (lambda p: p["ops"][1]["outputs"][1].update(name="q"), "'q' is empty or defined"),
    "an output that is a weight's name": (lambda p: p["ops"][4]["outputs"][0].update(name="norm"), "defined twice"),
    "a result that nobody makes": (lambda p: p.update(outputs=["probs"]), "outputs: 'probs' is not defined"),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_program_that_does_not_hold_together(what: str):
    edit, message = WRONG[what]
    data = json.loads(program().to_json())
    edit(data)
    with pytest.raises(InvalidArgument, match=message) as caught:
        Program.from_json(json.dumps(data).encode())
    assert caught.value.reason == "PROGRAM_INVALID"


@pytest.mark.parametrize("data", [b"", b"{", b"null", b"\xff", b"[]", b'{"ops": []}'])
def test_what_is_no_program(data: bytes):
    with pytest.raises(InvalidArgument, match=r"program\.json: "):
        Program.from_json(data)


def test_every_operator_names_its_signature():
    for name, operator in OPERATORS.items():
        assert operator.inputs or name == "recv", name
        assert operator.outputs or name == "send", name
        required = [slot for slot in operator.inputs if not slot.endswith("?")]
        assert operator.inputs[: len(required)] == tuple(required), f"{name}: optional inputs come last"
        assert all(kind in (int, float, bool, list) for kind in operator.attrs.values()), name
