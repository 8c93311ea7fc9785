"""A conversation as the model's own template writes it; templates come with engines and are not trusted."""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

from engine.errors import FailedPrecondition, InvalidArgument


class ChatTemplate:
    """One model's template, compiled.

    The environment is the one that templates are written for (transformers' `apply_chat_template`), in jinja2's sandbox.
    """

    def __init__(self, source: str, special_tokens: dict[str, str]) -> None:
        """Takes the template and the tokens it may name, such as bos_token. Raises FailedPrecondition if it is broken."""
        self._special_tokens = special_tokens
        try:
            self._template = _ENVIRONMENT.from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise _broken(error) from error

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> str:
        """The prompt, up to where the assistant speaks or to the end of the last message.

        Args:
            tools: functions that the model may call, each {"type": "function", "function": {...}}.

        Raises:
            InvalidArgument: the template refuses this conversation.
            FailedPrecondition: the template itself fails, or does what the sandbox forbids.
        """
        try:
            return self._template.render(
                messages=messages,
                tools=tools or None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **self._special_tokens,
            )
        except InvalidArgument:
            raise
        except Exception as error:  # whatever Python raises inside of foreign code
            raise _broken(error) from error


def _broken(error: Exception) -> FailedPrecondition:
    return FailedPrecondition(
        f"the model's chat template fails ({type(error).__name__}: {error}): send text or token ids instead, "
        "or build the engine with a template that works",
        reason="CHAT_TEMPLATE_FAILED",
    )


def _raise_exception(message: str) -> NoReturn:
    raise InvalidArgument(f"the model's chat template refuses this conversation: {message}", reason="CHAT_REFUSED")


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Plain JSON: jinja2's own filter escapes HTML. Templates may give the options by position, in this order."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


class _GenerationTag(jinja2.ext.Extension):
    """{% generation %} marks the assistant's part for training; here it is a scope and nothing more."""

    tags = {"generation"}

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node | list[jinja2.nodes.Node]:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body).set_lineno(line)


def _environment() -> jinja2.sandbox.ImmutableSandboxedEnvironment:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals |= {"raise_exception": _raise_exception, "strftime_now": _strftime_now}
    return environment


_ENVIRONMENT = _environment()
