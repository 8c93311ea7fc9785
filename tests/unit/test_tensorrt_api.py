"""Every name of TensorRT's that our code uses exists in both packages: of one of them, none can be installed where tests run.

`tensorrt_api.json` has members of the classes that we use, as tensorrt 11.4.0.106 and tensorrt_rtx 1.7.1.116 have them.
"""

import ast
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from engine import tensorrt

ROOT = Path(__file__).parents[2]
API: dict[str, dict[str, list[str]]] = json.loads((ROOT / "tests/unit/tensorrt_api.json").read_text())
LOWERING = [*(ROOT / "builder_svc/lower/tensorrt").glob("*.py")]
FILES = [
    *LOWERING,
    *(
        ROOT / name
        for name in ("executor_svc/tensorrt_runner.py", "executor_svc/runners.py", "builder_svc/tensorrt_plans.py")
    ),
    ROOT / "engine/tensorrt.py",
]
RTX_ONLY = {
    ("IBuilderConfig", "num_compute_capabilities"),
    ("IBuilderConfig", "set_compute_capability"),
    ("tensorrt", "ComputeCapability"),
}
"""Used for that flavour only."""

LAYERS = [name for name in API["tensorrt"] if name.endswith("Layer") or name == "IAttention"]
VARIABLES = {
    ("*", "network"): ["INetworkDefinition"],
    ("net.py", "tensor"): ["ITensor"],
    ("net.py", "layer"): LAYERS,
    ("rope.py", "layer"): LAYERS,
    ("operators.py", "layer"): LAYERS,
    ("attention.py", "layer"): LAYERS,
    ("attention.py", "softmax"): LAYERS,
    ("attention.py", "attention"): LAYERS,
    ("build.py", "config"): ["IBuilderConfig"],
    ("build.py", "profile"): ["IOptimizationProfile"],
    ("build.py", "builder"): ["Builder"],
    ("build.py", "cache"): ["ITimingCache"],
    ("lower.py", "builder"): ["Builder"],
    ("tensorrt_runner.py", "engine"): ["ICudaEngine"],
    ("tensorrt_runner.py", "context"): ["IExecutionContext"],
    ("tensorrt_runner.py", "_context"): ["IExecutionContext"],
}
"""(file, variable) -> what it is one of."""
NAMED = {
    "elementwise": ["ElementWiseOperation"],
    "unary": ["UnaryOperation"],
    "activation": ["ActivationType"],
    "reduce": ["ReduceOperation"],
    "_collective": ["CollectiveOperation", "ReduceOperation"],
}
"""Functions of ours that take members of enumerations by name."""


def name_of(node: ast.expr) -> str:
    """The last part of a variable or attribute."""
    return node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else ""


def used(path: Path) -> Iterator[tuple[tuple[str, ...], str]]:
    """(classes of which one must have it, name) for each use in a file."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Attribute):
            owner = node.value
            if name_of(owner) == "trt":
                yield ("tensorrt",), node.attr
            elif isinstance(owner, ast.Attribute) and name_of(owner.value) == "trt":
                yield (owner.attr,), node.attr
            else:
                known = VARIABLES.get((path.name, name_of(owner)), VARIABLES.get(("*", name_of(owner)), []))
                if known:
                    yield tuple(known), node.attr
        if isinstance(node, ast.Call) and name_of(node.func) in NAMED:
            texts = [each.value for each in node.args if isinstance(each, ast.Constant) and isinstance(each.value, str)]
            for text in texts:
                yield tuple(NAMED[name_of(node.func)]), text


USED = {(classes, name) for path in FILES for classes, name in used(path)}


@pytest.mark.parametrize("package", ["tensorrt", "tensorrt_rtx"])
def test_every_name_that_we_use_exists(package: str) -> None:
    assert len(USED) > 100
    missing = {
        (classes[0], name)
        for classes, name in USED
        if not any(name in API[package].get(kind, []) for kind in classes)
        and not (name.startswith("__") and name.endswith("__"))
    }
    assert missing == (RTX_ONLY if package == "tensorrt" else set())


def test_the_listing_is_that_of_the_package_that_is_here() -> None:
    trt = tensorrt.load("tensorrt_rtx")
    for kind, members in API["tensorrt_rtx"].items():
        owner = trt if kind == "tensorrt" else getattr(trt, kind)
        assert [name for name in members if not hasattr(owner, name)] == []
