"""What gateway and executor both check of guided output, in the same words. What a grammar means the executor finds out."""

import json
from typing import Any, NoReturn

from engine.errors import InvalidArgument
from protos.v1.common_pb2 import BeamSearch, GuidedDecoding

MAX_BYTES = 1 << 16  # of a schema, an expression, a grammar, or all choices
MAX_CHOICES = 1024
MAX_DEPTH = 64  # of a schema's brackets


def check_guided(guided: GuidedDecoding, beam: BeamSearch) -> None:
    """Raises InvalidArgument for a set `guided_decoding` that says nothing, too much, or stands beside a beam search."""
    kind = guided.WhichOneof("guide")
    if kind is None:
        _refuse("guided_decoding is empty: set json_schema, regex, choices, grammar or json_object, or leave it out")
    if beam.width:
        raise InvalidArgument(
            "guided_decoding and beam_search exclude each other: leave one of both out, or ask for best_of",
            reason="BEAM_SEARCH_GUIDED",
        )
    if kind == "json_object":
        if not guided.json_object:
            _refuse("guided_decoding.json_object is false: set it to true, or leave guided_decoding out")
        return
    texts = guided.choices.choices if kind == "choices" else [getattr(guided, kind)]
    size = sum(len(text.encode()) for text in texts)
    if size > MAX_BYTES:
        _refuse(f"guided_decoding.{kind} has {size} bytes: give at most {MAX_BYTES}")
    if kind == "choices" and not 1 <= len(texts) <= MAX_CHOICES:
        _refuse(f"guided_decoding.choices has {len(texts)} choices: give 1 to {MAX_CHOICES}")
    if not all(texts):
        _refuse(f"guided_decoding.{kind} holds an empty text: say what the text should be, or leave it out")
    if kind == "json_schema":
        parse_schema(guided.json_schema)


def parse_schema(text: str) -> dict[str, Any]:
    """A schema as an object; `true` is {}. Raises InvalidArgument for what is no schema, or is nested too deeply."""
    try:
        schema = json.loads(text, parse_constant=_no_constant)
        depth = _depth(schema)
    except RecursionError:
        depth, schema = MAX_DEPTH + 1, {}
    except ValueError as error:
        _refuse(f"guided_decoding.json_schema is no JSON ({error}): give a JSON schema as text")
    if depth > MAX_DEPTH:
        _refuse(
            f"guided_decoding.json_schema is nested more than {MAX_DEPTH} deep: make it flatter, or use $defs and $ref"
        )
    if schema is True:
        return {}
    if not isinstance(schema, dict):
        _refuse(
            f'guided_decoding.json_schema is {json.dumps(schema)[:80]}: give an object, such as {{"type": "object"}}'
        )
    return schema


def _depth(value: Any) -> int:
    """How deep lists and objects stand in each other."""
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else None
    return 0 if inner is None else 1 + max(map(_depth, inner), default=0)


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON value")


def _refuse(message: str) -> NoReturn:
    raise InvalidArgument(message, reason="GUIDED_DECODING_INVALID")
