"""Chat templates: what they may use, and what the sandbox keeps from them."""

from datetime import datetime
from typing import Any

import pytest

from engine.errors import EnginehouseError, FailedPrecondition, InvalidArgument
from gateway.chat import ChatTemplate

HELLO = [{"role": "user", "content": "héllo <b>"}]


def render(source: str, messages: list[dict[str, str]] = HELLO, **special: Any) -> str:
    return ChatTemplate(source, special).render(messages)


def test_what_templates_are_written_for() -> None:
    source = """
{%- for message in messages %}
    {% if loop.first %}
{{ bos_token }}
    {% endif %}
    {%- if message.role == "skip" %}{% continue %}{% endif %}
{{ message['role'] }}: {{ message | tojson }}
{% endfor %}
{%- if add_generation_prompt and tools is none %}{% generation %}assistant:{% endgeneration %}{% endif %}{{ missing }}"""
    messages = [*HELLO, {"role": "skip", "content": ""}]
    assert render(source, messages, bos_token="<s>") == (
        '<s>\nuser: {"role": "user", "content": "héllo <b>"}\nassistant:'
    )


def test_strftime_now() -> None:
    assert render("{{ strftime_now('%Y') }}") == str(datetime.now().year)


@pytest.mark.parametrize(
    ("source", "kind", "reason", "says"),
    [
        ("{{ raise_exception('roles must alternate') }}", InvalidArgument, "CHAT_REFUSED", "roles must alternate"),
        ("{% for %}", FailedPrecondition, "CHAT_TEMPLATE_FAILED", "TemplateSyntaxError"),
        ("{{ messages[0].content + 1 }}", FailedPrecondition, "CHAT_TEMPLATE_FAILED", "TypeError"),
        ("{{ missing.field }}", FailedPrecondition, "CHAT_TEMPLATE_FAILED", "missing"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", FailedPrecondition, "CHAT_TEMPLATE_FAILED", "unsafe"),
        ("{{ cycler.__init__.__globals__.os }}", FailedPrecondition, "CHAT_TEMPLATE_FAILED", "unsafe"),
        ("{{ raise_exception.__globals__.sys }}", FailedPrecondition, "CHAT_TEMPLATE_FAILED", "unsafe"),
        ("{{ messages.append(1) }}", FailedPrecondition, "CHAT_TEMPLATE_FAILED", "unsafe"),
        ("{% include '/etc/passwd' %}", FailedPrecondition, "CHAT_TEMPLATE_FAILED", "TypeError"),
        ("{% for i in range(1000000000) %}{% endfor %}", FailedPrecondition, "CHAT_TEMPLATE_FAILED", "OverflowError"),
    ],
)
def test_refusals(source: str, kind: type[EnginehouseError], reason: str, says: str) -> None:
    with pytest.raises(kind) as error:
        render(source)
    assert error.value.reason == reason
    assert says in error.value.message
