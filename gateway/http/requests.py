"""What clients of OpenAI's API send, by its names: read strictly, and the source of the OpenAPI document.

Ranges are checked where every request's are (`gateway/submission.py`); here only what the wire's types could not hold. A field
that would change the result and is not supported is refused, one that would not is listed and ignored.
"""

from typing import Annotated, Any, Literal

from msgspec import UNSET, Meta, Struct

Count = Annotated[int, Meta(ge=0, le=2**32 - 1)]
Seed = Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)]
Priority = Annotated[int, Meta(ge=-(2**31), le=2**31 - 1)]
Ignored = Any


class StreamOptions(Struct, forbid_unknown_fields=True):
    """Of a streamed answer.

    Attributes:
        include_usage: the last chunk has no choices and tells the usage.
    """

    include_usage: bool = False
    include_obfuscation: Ignored = UNSET


class JsonSchema(Struct, forbid_unknown_fields=True):
    """A schema that the text will follow."""

    name: str
    schema: dict[str, Any] | bool | None = None
    description: str | None = None
    strict: bool | None = None


class ResponseFormat(Struct, forbid_unknown_fields=True):
    """What the text must be: JSON by a schema, any JSON object, or any text."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class Common(Struct, forbid_unknown_fields=True, kw_only=True):
    """What both kinds of request have; behind `seed` OpenAI's API ends and ours goes on."""

    model: str
    max_tokens: Count | None = None
    temperature: float | None = None
    top_p: float | None = None
    n: Count | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    stop: str | list[str] | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[Annotated[str, Meta(pattern="^[0-9]{1,9}$")], float] | None = None
    seed: Seed | None = None
    user: Ignored = UNSET
    top_k: Count | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    min_tokens: Count | None = None
    stop_token_ids: list[Count] | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    priority: Priority | None = None
    response_format: ResponseFormat | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None

    @property
    def stops(self) -> list[str]:
        """Stop strings."""
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    @property
    def includes_usage(self) -> bool:
        """Whether a streamed answer ends with its usage."""
        return self.stream_options is not None and self.stream_options.include_usage


class CompletionRequest(Common, kw_only=True):
    """POST /v1/completions: text, token ids, or several of one kind."""

    prompt: str | list[str | Count | list[Count]]
    best_of: Count | None = None
    echo: bool | None = None
    logprobs: Count | None = None
    add_special_tokens: bool | None = None


class FunctionCall(Struct):
    """A call, as the model made it."""

    name: str
    arguments: str = "{}"


class MessageToolCall(Struct):
    """One of an assistant's calls."""

    function: FunctionCall
    id: str = ""
    type: Literal["function"] = "function"


class ContentPart(Struct):
    """A part of a message; text is all that there is for now."""

    type: Literal["text"]
    text: str


class Message(Struct):
    """One of a conversation."""

    role: str
    content: str | list[ContentPart] | None = None
    name: str | None = None
    tool_calls: list[MessageToolCall] | None = None
    tool_call_id: str | None = None

    @property
    def text(self) -> str:
        """All of it."""
        if isinstance(self.content, list):
            return "".join(part.text for part in self.content)
        return self.content or ""


class Function(Struct, forbid_unknown_fields=True):
    """What the model may call."""

    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: Ignored = UNSET


class RequestTool(Struct, forbid_unknown_fields=True):
    """A function, as OpenAI's API wraps it."""

    type: Literal["function"]
    function: Function


class ChatRequest(Common, kw_only=True):
    """POST /v1/chat/completions: a conversation, which the model's own template writes as text."""

    messages: list[Message]
    max_completion_tokens: Count | None = None
    logprobs: bool | None = None
    top_logprobs: Count | None = None
    tools: list[RequestTool] | None = None
    tool_choice: Literal["none", "auto"] | None = None
    parallel_tool_calls: Ignored = UNSET
    metadata: Ignored = UNSET
    store: Ignored = UNSET
    service_tier: Ignored = UNSET
    safety_identifier: Ignored = UNSET
    prompt_cache_key: Ignored = UNSET
