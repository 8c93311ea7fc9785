"""What a completion's text must be, by TensorRT-LLM's names."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from builder_svc.tensorrt_names import also_takes
from engine.errors import InvalidArgument
from enginehouse.connection import not_unicode
from protos.v1.common_pb2 import GuidedChoices, GuidedDecoding


@also_takes(off={"structural_tag": None})
@dataclass(kw_only=True, slots=True)
class GuidedDecodingParams:
    """What a completion's text must be: exactly one of these, for `SamplingParams.guided_decoding`.

    Attributes:
        json: a JSON schema: as text, as a dict, or a pydantic model.
        regex: a regular expression that matches the whole text.
        choices: texts, one of which it is.
        grammar: in Lark's syntax, or EBNF with ::=.
        json_object: True for any JSON object.

    Example:
        >>> from enginehouse import LLM, GuidedDecodingParams, SamplingParams
        >>> params = SamplingParams(guided_decoding=GuidedDecodingParams(regex="[0-9]{3}-[0-9]{4}"))
        >>> with LLM("examples/demo-model") as llm:
        ...     len(llm.generate("My number is", params).outputs[0].text)
        8
    """

    json: str | Mapping[str, Any] | Any = None
    regex: str | None = None
    choices: Sequence[str] | None = None
    grammar: str | None = None
    json_object: bool = False

    def to_message(self) -> GuidedDecoding:
        """For a request. Raises InvalidArgument (a ValueError) for none or several of them, and for what is no text."""
        given = [name for name in ("json", "regex", "choices", "grammar") if getattr(self, name) is not None]
        given += ["json_object"] if self.json_object else []
        if len(given) != 1:
            which = ", ".join(given) or "none"
            raise InvalidArgument(
                f"guided_decoding has {which}: give exactly one of json, regex, choices, grammar and json_object"
            )
        try:
            if self.json is not None:
                return GuidedDecoding(json_schema=_schema(self.json))
            if self.choices is not None:
                if isinstance(self.choices, str):
                    raise InvalidArgument(f"guided_decoding.choices is {self.choices!r}: give a list of texts")
                return GuidedDecoding(choices=GuidedChoices(choices=self.choices))
            if self.regex is not None:
                return GuidedDecoding(regex=self.regex)
            if self.grammar is not None:
                return GuidedDecoding(grammar=self.grammar)
            return GuidedDecoding(json_object=True)
        except UnicodeEncodeError as error:
            raise not_unicode(error) from None
        except (TypeError, UnicodeDecodeError) as error:
            raise InvalidArgument(f"guided_decoding.{given[0]} cannot be sent ({error}): give texts") from None


def _schema(given: Any) -> str:
    if isinstance(given, str):
        return given
    if hasattr(given, "model_json_schema"):  # pydantic's, which is not needed for that
        given = given.model_json_schema()
    try:
        return json.dumps(given)
    except ValueError as error:
        raise InvalidArgument(f"guided_decoding.json cannot be written as JSON ({error}): give a JSON schema") from None
