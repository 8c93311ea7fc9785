"""The options of guided output as a request has them."""

from pathlib import Path

from engine.errors import InvalidArgument
from protos.v1.common_pb2 import GuidedChoices, GuidedDecoding


def guided_decoding(
    json_schema: str | None, regex: str | None, choice: tuple[str, ...], grammar: str | None, json_object: bool
) -> GuidedDecoding | None:
    """What was asked for, of at most one; None for nothing. Raises InvalidArgument for a file that cannot be read.

    Args:
        json_schema, grammar: names of files.
    """
    if json_schema is not None:
        return GuidedDecoding(json_schema=_read(json_schema))
    if grammar is not None:
        return GuidedDecoding(grammar=_read(grammar))
    if regex is not None:
        return GuidedDecoding(regex=regex)
    if choice:
        return GuidedDecoding(choices=GuidedChoices(choices=choice))
    return GuidedDecoding(json_object=True) if json_object else None


def _read(file: str) -> str:
    try:
        return Path(file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidArgument(f"{file} cannot be read: {error}") from None
