"""Tool calls in a model's text, as Hermes and Qwen write them: <tool_call>{"name": ..., "arguments": {...}}</tool_call>."""

import json
import secrets
from dataclasses import dataclass


@dataclass(frozen=True)
class FoundCall:
    """A call; `arguments` is JSON."""

    id: str
    name: str
    arguments: str

    def show(self) -> dict[str, object]:
        """As OpenAI's API tells it."""
        return {"id": self.id, "type": "function", "function": {"name": self.name, "arguments": self.arguments}}


class ToolCalls:
    """Sorts a text that comes in pieces into text and calls. What is no call, though it began like one, is text.

    Args:
        tag: between < and >.
    """

    def __init__(self, tag: str) -> None:
        self._open, self._close = f"<{tag}>", f"</{tag}>"
        self._held = ""
        self._inside = False
        self._found = 0

    def push(self, text: str) -> list[str | FoundCall]:
        """What the text completes; the beginning of a tag waits for its end, and a call for its own."""
        self._held += text
        made: list[str | FoundCall] = []
        while True:
            tag = self._close if self._inside else self._open
            before, found, rest = self._held.partition(tag)
            if not found:
                break
            made.append(self._call(before) if self._inside else self._text(before))
            self._held, self._inside = rest, not self._inside
        if not self._inside:
            keep = _overlap(self._held, self._open)
            made.append(self._text(self._held[: len(self._held) - keep]))
            self._held = self._held[len(self._held) - keep :]
        return [part for part in made if part]

    def flush(self) -> list[str | FoundCall]:
        """What was held back, when no text comes any more: a model may stop without closing the tag."""
        held, self._held = self._held, ""
        made: list[str | FoundCall] = [self._call(held) if self._inside else held]
        return [part for part in made if part]

    def _text(self, text: str) -> str:
        """White space between and behind calls belongs to them."""
        return "" if self._found and not text.strip() else text

    def _call(self, text: str) -> FoundCall | str:
        try:
            call = json.loads(text)
            name, arguments = call["name"], call.get("arguments", {})
        except (ValueError, RecursionError, TypeError, KeyError, AttributeError):
            name = arguments = None
        if not isinstance(name, str) or not isinstance(arguments, dict):
            return f"{self._open}{text}{self._close}"
        self._found += 1
        return FoundCall(f"call_{secrets.token_hex(12)}", name, json.dumps(arguments, ensure_ascii=False))


def _overlap(text: str, tag: str) -> int:
    """The length of the longest beginning of `tag` that the text ends with."""
    longest = min(len(text), len(tag) - 1)
    return next((size for size in range(longest, 0, -1) if tag.startswith(text[-size:])), 0)
