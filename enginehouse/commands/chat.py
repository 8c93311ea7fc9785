"""`enginehouse chat`: a conversation, rendered with the model's own chat template."""

import asyncio
import sys

from engine.errors import EnginehouseError, FailedPrecondition, InvalidArgument, NotFound
from enginehouse.answer import Answer
from enginehouse.client import GatewayClient
from enginehouse.commands.generate import Choices, only_model, stream
from enginehouse.connection import not_unicode
from enginehouse.progress import stderr
from protos.v1.gateway_pb2 import ChatMessage, Model

_LEAVE = ("/exit", "/quit")


def run(choices: Choices, *, model: str | None, gateway: str, system: str | None) -> None:
    """Asks and answers until /exit, Ctrl-D, or Ctrl-C at the prompt; Ctrl-C ends an answer that is being written."""
    console = stderr()
    history = [_message("system", system)] if system else []
    # One loop for all answers: its Runner turns Ctrl-C into the cancellation of the answer, and lets `input` have its own.
    with asyncio.Runner() as runner:
        name = runner.run(_choose(gateway, model)).name
        console.print(f"Chat with {name}. Ctrl-C ends an answer, /exit or Ctrl-D the chat.")
        while (said := _ask()) is not None:
            history.append(_message("user", said))
            answer = Answer()
            try:
                runner.run(_answer(gateway, name, history, choices, answer))
            except KeyboardInterrupt:
                pass  # what was said so far stays part of the conversation
            except EnginehouseError as error:
                if not sys.stdin.isatty():
                    raise
                console.print(f"error: {error.message}")
                history.pop()
                continue
            history.append(ChatMessage(role="assistant", content=answer.text))


async def _choose(address: str, wanted: str | None) -> Model:
    """The model to talk to. Raises when there is none such, or when it has no chat template."""
    async with GatewayClient(address) as gateway:
        models = await gateway.models()
    if wanted is None:
        model = only_model(models)
    else:
        found = [model for model in models if model.name == wanted]
        if not found:
            names = ", ".join(model.name for model in models) or "none"
            raise NotFound(f"no model {wanted!r}; there are: {names}", reason="MODEL_NOT_FOUND")
        model = found[0]
    if not model.has_chat_template:
        raise FailedPrecondition(
            f"model {model.name!r} has no chat template: it continues text (`enginehouse generate`)",
            reason="NO_CHAT_TEMPLATE",
        )
    return model


async def _answer(address: str, model: str, history: list[ChatMessage], choices: Choices, answer: Answer) -> None:
    async with GatewayClient(address) as gateway:
        await stream(gateway, model, history, choices, answer)


def _message(role: str, content: str) -> ChatMessage:
    """Raises InvalidArgument for text that is not valid Unicode."""
    try:
        return ChatMessage(role=role, content=content)
    except UnicodeEncodeError as error:
        raise not_unicode(error) from None


def _ask() -> str | None:
    """The next thing to say, or None at the end."""
    terminal = sys.stdin.isatty()
    if terminal:
        import readline  # noqa: F401  (editing and recall for input())
    while True:
        try:
            said = input("> " if terminal else "").strip()
        except UnicodeDecodeError as error:
            raise InvalidArgument(f"what was typed is not UTF-8 text: {error}", reason="TEXT_INVALID") from None
        except (EOFError, KeyboardInterrupt):
            if terminal:
                print()
            return None
        if said in _LEAVE:
            return None
        if said:
            return said
