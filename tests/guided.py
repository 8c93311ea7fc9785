"""Guided sequences in this process: grammars compiled as a worker does it, and waited for."""

import random
import select
from typing import Any

from executor_svc.core import Sequence
from executor_svc.guides import Guides
from protos.v1.common_pb2 import GuidedChoices, GuidedDecoding


def guided(sequence: Sequence, guides: Guides, choices: list[str] | None = None, **guide: Any) -> Sequence:
    """The sequence with its guide. Raises why it cannot have it."""
    message = GuidedDecoding(choices=GuidedChoices(choices=choices) if choices else None, **guide)
    if not guides.begin(sequence, message):
        found: list[Any] = []
        while not found:  # what others have forgotten is not told
            assert select.select([guides], [], [], 60)[0]
            found = guides.take()
        ((given, error),) = found
        assert given is sequence
        if error:
            raise error
    return sequence


def random_schema(numbers: random.Random) -> dict[str, Any]:
    """A satisfiable schema of keywords that people use, most of whose texts are short."""
    return {"$defs": {"one": _schema(numbers, 0)}, **_schema(numbers, 3)}


def _schema(numbers: random.Random, depth: int) -> dict[str, Any]:
    plain = ["string", "pattern", "enum", "const", "integer", "number", "boolean", "null", "format"]
    kind = numbers.choice([*plain, "object", "object", "array", "anyOf", "ref"] if depth else plain)
    low = numbers.randrange(3)
    if kind == "string":
        return {"type": "string", "minLength": low, "maxLength": low + numbers.randrange(6)}
    if kind == "pattern":
        return {
            "type": "string",
            "pattern": numbers.choice(["^[a-c]{1,4}$", "^\\d{3}-\\d{2}$", "^(foo|bär|\\u00df)+$"]),
            "maxLength": 9,
        }
    if kind == "format":
        return {"type": "string", "format": numbers.choice(["date", "uuid", "ipv4"])}
    if kind == "enum":
        return {"enum": numbers.sample(["red", "grün", 7, -1.5, True, None, ["x"], {"k": 1}], numbers.randint(1, 5))}
    if kind == "const":
        return {"const": numbers.choice(['a "quoted" \\ text', 3, {"a": [1, "☃"]}])}
    if kind == "integer":
        return {"type": "integer", "minimum": numbers.randint(-50, 0), "maximum": numbers.randint(0, 5000)}
    if kind == "number":
        return {"type": "number", "minimum": -2.5, "exclusiveMaximum": numbers.choice([1, 1000.5])}
    if kind in ("boolean", "null"):
        return {"type": kind}
    if kind == "array":
        items = {"items": _schema(numbers, depth - 1)}
        if numbers.random() < 0.3:
            items = {"prefixItems": [_schema(numbers, depth - 1), {"type": "boolean"}], "items": False}
            low = min(low, 2)
            return {"type": "array", "minItems": low, "maxItems": 2, **items}
        return {"type": "array", "minItems": low, "maxItems": low + numbers.randrange(3), **items}
    if kind == "anyOf":
        return {"anyOf": [_schema(numbers, depth - 1) for _ in range(numbers.randint(1, 3))]}
    if kind == "ref":
        return {"type": "array", "items": {"$ref": "#/$defs/one"}, "maxItems": 2}
    names = numbers.sample(["name", "größe", "a b", "id", 'q"uote'], numbers.randint(1, 4))
    required = [name for name in names if numbers.random() < 0.7]
    return {
        "type": "object",
        "properties": {name: _schema(numbers, depth - 1) for name in names},
        "required": required,
        "additionalProperties": numbers.random() < 0.2,
    }
