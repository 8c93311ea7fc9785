"""Requests of OpenAI's API as the Gateway service's own."""

import json
from collections.abc import Sequence

from engine.errors import InvalidArgument
from gateway.http.requests import ChatRequest, Common, CompletionRequest, Message, RequestTool
from protos.v1.common_pb2 import (
    GuidedChoices,
    GuidedDecoding,
    OutputOptions,
    SamplingParams,
    StoppingCriteria,
    TokenIds,
)
from protos.v1.gateway_pb2 import Chat, ChatMessage, GenerateRequest, Tool, ToolCall

MAX_PROMPTS = 128  # of one request
_SAMPLING = ("temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty")


def from_completion(asked: CompletionRequest) -> list[GenerateRequest]:
    """One request for each prompt."""
    made = []
    for prompt in _prompts(asked.prompt):
        request = _common(asked, asked.max_tokens)
        if isinstance(prompt, str):
            request.text = prompt
        else:
            request.token_ids.CopyFrom(TokenIds(ids=prompt))
        for name in ("best_of", "echo", "add_special_tokens"):
            if (value := getattr(asked, name)) is not None:
                setattr(request, name, value)
        if asked.logprobs is not None:
            request.output.CopyFrom(OutputOptions(logprobs=asked.logprobs))
            if asked.echo:
                if max(asked.n or 1, asked.best_of or 1) > 1:
                    raise _invalid(
                        "n and best_of must be 1 where echo tells the prompt's log-probabilities: leave echo out"
                    )
                request.output.prompt_logprobs = asked.logprobs
        if asked.stream and (asked.best_of or 0) > (asked.n or 1):
            raise _invalid(
                "best_of is ranked when all completions have ended and cannot be streamed: leave one of both out"
            )
        made.append(request)
    return made


def from_chat(asked: ChatRequest) -> GenerateRequest:
    """The one request."""
    if not asked.messages:
        raise _invalid("messages is empty: give at least one")
    most = asked.max_tokens if asked.max_completion_tokens is None else asked.max_completion_tokens
    request = _common(asked, most)
    offered = asked.tools or [] if asked.tool_choice != "none" else []
    request.chat.CopyFrom(Chat(messages=map(_message, asked.messages), tools=map(_tool, offered)))
    if asked.top_logprobs and not asked.logprobs:
        raise _invalid(f"top_logprobs is {asked.top_logprobs}, but logprobs is not true: set it, too")
    if asked.logprobs:
        request.output.CopyFrom(OutputOptions(logprobs=asked.top_logprobs or 0))
    return request


def _common(asked: Common, max_tokens: int | None) -> GenerateRequest:
    sampling = SamplingParams(**{name: value for name in _SAMPLING if (value := getattr(asked, name)) is not None})
    if asked.seed is not None:
        sampling.seed = asked.seed % 2**64
    for token, bias in (asked.logit_bias or {}).items():
        sampling.logit_bias[int(token)] = bias
    stopping = StoppingCriteria(
        max_tokens=max_tokens,
        min_tokens=asked.min_tokens or 0,
        stop_token_ids=asked.stop_token_ids or (),
        ignore_eos=bool(asked.ignore_eos),
    )
    request = GenerateRequest(
        model=asked.model,
        sampling=sampling,
        stopping=stopping,
        stop=asked.stops,
        n=asked.n,
        priority=asked.priority or 0,
        skip_special_tokens=asked.skip_special_tokens,
    )
    if asked.stream_options and not asked.stream:
        raise _invalid("stream_options is given, but stream is not true: set it, or leave stream_options out")
    guides = _guides(asked)
    if len(guides) > 1:
        raise _invalid(
            "the output is guided in several ways: give one of response_format, guided_regex, guided_choice and guided_grammar"
        )
    for guide in guides:
        request.guided_decoding.CopyFrom(guide)
    return request


def _guides(asked: Common) -> list[GuidedDecoding]:
    found = []
    form = asked.response_format
    if form and form.type == "json_object":
        found.append(GuidedDecoding(json_object=True))
    elif form and form.type == "json_schema":
        if form.json_schema is None or form.json_schema.schema is None:
            raise _invalid("response_format is of type json_schema and has no schema: give json_schema.schema")
        found.append(GuidedDecoding(json_schema=json.dumps(form.json_schema.schema)))
    if asked.guided_regex is not None:
        found.append(GuidedDecoding(regex=asked.guided_regex))
    if asked.guided_choice is not None:
        found.append(GuidedDecoding(choices=GuidedChoices(choices=asked.guided_choice)))
    if asked.guided_grammar is not None:
        found.append(GuidedDecoding(grammar=asked.guided_grammar))
    return found


def _prompts(prompt: str | list[str | int | list[int]]) -> Sequence[str | list[int]]:
    if isinstance(prompt, str):
        return [prompt]
    if not prompt:
        raise _invalid("prompt is an empty list: give a text, token ids, or several of one kind")
    kinds = {type(part) for part in prompt}
    if len(kinds) > 1:
        raise _invalid("prompt mixes texts, token ids and lists of token ids: give a list of one kind")
    if kinds == {int}:
        return [[part for part in prompt if isinstance(part, int)]]
    if len(prompt) > MAX_PROMPTS:
        raise _invalid(f"prompt has {len(prompt)} prompts: give at most {MAX_PROMPTS}")
    return [part for part in prompt if not isinstance(part, int)]


def _message(message: Message) -> ChatMessage:
    calls = [
        ToolCall(id=call.id, name=call.function.name, arguments=call.function.arguments)
        for call in message.tool_calls or ()
    ]
    return ChatMessage(
        role=message.role,
        content=message.text,
        tool_calls=calls,
        tool_call_id=message.tool_call_id or "",
        name=message.name or "",
    )


def _tool(tool: RequestTool) -> Tool:
    function = tool.function
    parameters = "" if function.parameters is None else json.dumps(function.parameters)
    return Tool(name=function.name, description=function.description or "", parameters=parameters)


def _invalid(message: str) -> InvalidArgument:
    """Names the parameter first, as `errors.body` tells it."""
    return InvalidArgument(message, reason="INVALID_REQUEST", metadata={"param": message.split()[0]})
