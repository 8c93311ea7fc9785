"""Chat templates: what they may use, and what the sandbox keeps from them."""

from datetime import datetime
from typing import Any

import jinja2
import pytest
from chat_templates import TEMPLATES
from tokenizer_files import byte_level
from transformers import TokenizersBackend

from engine.errors import EnginehouseError, FailedPrecondition, InvalidArgument
from gateway.chat import ChatTemplate

HELLO = [{"role": "user", "content": "héllo <b>"}]
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
LATER = [
    *HELLO,
    {"role": "assistant", "content": "<think>\nhm\n</think>\n\n 你好 "},
    {"role": "user", "content": "<result> 'quoted' & \"so\"\n"},
    {"role": "assistant", "content": "<think>more</think>\nyes"},
    {"role": "user", "content": " 🙂 "},
]
CHATS = {
    "one question": HELLO,
    "several turns": LATER,
    "ends with the assistant": LATER[:4],
    "system first": [{"role": "system", "content": " Be brief. "}, *LATER],
    "two users": HELLO * 2,
    "an unknown role": [{"role": "critic", "content": "no"}],
}


def render(source: str, messages: list[dict[str, str]] = HELLO, **special: Any) -> str:
    return ChatTemplate(source, special).render(messages)


@pytest.mark.parametrize("chat", CHATS)
@pytest.mark.parametrize("style", TEMPLATES)
def test_equals_transformers(style: str, chat: str) -> None:
    """The same text, or the same refusal."""
    template = ChatTemplate(TEMPLATES[style], SPECIAL)
    theirs = TokenizersBackend(tokenizer_object=byte_level(), chat_template=TEMPLATES[style], **SPECIAL)
    for prompt in (True, False):
        try:
            expected = theirs.apply_chat_template(CHATS[chat], tokenize=False, add_generation_prompt=prompt)
        except jinja2.TemplateError as refusal:
            with pytest.raises(InvalidArgument, match="refuses this conversation") as error:
                template.render(CHATS[chat], prompt)
            assert error.value.message.endswith(str(refusal))
        else:
            assert template.render(CHATS[chat], prompt) == expected


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
