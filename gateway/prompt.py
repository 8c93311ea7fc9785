"""A request's prompt as token ids, whichever way it was given."""

import json
from typing import Any

from engine.errors import InvalidArgument
from gateway.tokenizer import Tokenizer
from protos.v1.gateway_pb2 import ChatMessage, DetokenizeRequest, GenerateRequest, TokenizeRequest, Tool


def prompt_ids(request: GenerateRequest | TokenizeRequest, tokenizer: Tokenizer) -> list[int]:
    """Of a request that has exactly one prompt. Raises what `Tokenizer.render` raises."""
    if isinstance(request, GenerateRequest) and request.HasField("token_ids"):
        return list(request.token_ids.ids)
    if request.HasField("chat"):
        chat = request.chat
        text = tokenizer.render([_message(message) for message in chat.messages], [_tool(tool) for tool in chat.tools])
        return tokenizer.encode(text, False)  # the template has written the special tokens
    return tokenizer.encode(request.text, request.add_special_tokens or not request.HasField("add_special_tokens"))


def skip_special(request: GenerateRequest | DetokenizeRequest) -> bool:
    """Whether special tokens make no text."""
    return request.skip_special_tokens or not request.HasField("skip_special_tokens")


def _message(message: ChatMessage) -> dict[str, Any]:
    """As templates take it."""
    made: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.tool_calls:
        made["tool_calls"] = [
            {
                "id": call.id,
                "type": "function",
                "function": {
                    "name": call.name,
                    "arguments": _object(call.arguments, f"the arguments of tool call {call.name!r}"),
                },
            }
            for call in message.tool_calls
        ]
    return made | {key: value for key in ("tool_call_id", "name") if (value := getattr(message, key))}


def _tool(tool: Tool) -> dict[str, Any]:
    parameters = _object(
        tool.parameters or '{"type": "object", "properties": {}}', f"the parameters of tool {tool.name!r}"
    )
    function = {"name": tool.name, "description": tool.description, "parameters": parameters}
    return {"type": "function", "function": function}


def _object(text: str, what: str) -> dict[str, Any]:
    """JSON of an object. Raises InvalidArgument for anything else."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise InvalidArgument(f"{what} are no JSON object: {text[:80]!r}", reason="TOOLS_INVALID")
    return found
