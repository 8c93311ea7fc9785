"""The OpenAPI document: paths by hand, schemas from the types that requests are read with."""

from typing import Any

import msgspec

from gateway.http.requests import ChatRequest, CompletionRequest

_REF = "#/components/schemas/{name}"
_ERRORS = {
    "400": "The request is wrong, or asks for what the model or this gateway cannot do; the message says what to change",
    "401": "No API key, or one that is not known",
    "403": "The key's tenant may not do this",
    "404": "No model of this name",
    "429": "A limit is reached, or all queues are full; Retry-After says when to try again",
    "503": "No executor has the model's engine ready",
}
_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": "string", "description": "The reason, as gRPC clients get it"},
            },
        }
    },
}
_USAGE = {
    "type": "object",
    "required": ["prompt_tokens", "completion_tokens", "total_tokens"],
    "properties": {
        name: {"type": "integer", "minimum": 0} for name in ("prompt_tokens", "completion_tokens", "total_tokens")
    }
    | {"prompt_tokens_details": {"type": "object", "properties": {"cached_tokens": {"type": "integer"}}}},
}
_MODEL = {
    "type": "object",
    "required": ["id", "object", "created", "owned_by"],
    "properties": {
        "id": {"type": "string"},
        "object": {"const": "model"},
        "created": {"type": "integer", "description": "Always 0: a name may stand for another engine tomorrow"},
        "owned_by": {"type": "string"},
        "engine_id": {"type": "string"},
        "ready_executors": {"type": "integer"},
        "max_model_len": {"type": "integer", "description": "Tokens of prompt and completion together"},
        "has_chat_template": {"type": "boolean"},
    },
}


def document(version: str) -> dict[str, Any]:
    """The whole of it."""
    (text, chat), schemas = msgspec.json.schema_components((CompletionRequest, ChatRequest), ref_template=_REF)
    schemas |= {"Error": _ERROR, "Usage": _USAGE, "Model": _MODEL}
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Enginehouse",
            "version": version,
            "description": "OpenAI's API on an Enginehouse gateway. An answer's x-request-id stands in the logs, too.",
        },
        "paths": {
            "/v1/completions": {"post": _generation("Text or token ids go on", text, "text_completion", "text")},
            "/v1/chat/completions": {"post": _generation("A conversation goes on", chat, "chat.completion", "message")},
            "/v1/models": {"get": _operation("The models", {"type": "object", "required": ["object", "data"], "properties": {
                "object": {"const": "list"}, "data": {"type": "array", "items": _ref("Model")}}})},
            "/v1/models/{model}": {"get": _operation("One model", _ref("Model"), found=True) | {"parameters": [
                {"name": "model", "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}]}},
            "/status": {"get": _operation("What executors, engines and builds do now; the page shows it", {"type": "object"})},
            "/health": {"get": _operation("Whether the gateway is alive", {"type": "object"}, open_to_all=True)},
        },
        "components": {
            "schemas": schemas,
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer", "description": "Where the gateway has API keys"}},
        },
        "security": [{"key": []}, {}],
    }  # fmt: skip


def _generation(summary: str, schema: dict[str, Any], kind: str, content: str) -> dict[str, Any]:
    choice = {
        "type": "object",
        "required": ["index", content, "logprobs", "finish_reason"],
        "properties": {"index": {"type": "integer"}, "finish_reason": {"enum": ["stop", "length", "tool_calls"]}},
    }
    answer = {
        "type": "object",
        "required": ["id", "object", "created", "model", "choices", "usage"],
        "properties": {
            "id": {"type": "string"},
            "object": {"const": kind},
            "created": {"type": "integer"},
            "model": {"type": "string"},
            "choices": {"type": "array", "items": choice},
            "usage": _ref("Usage"),
        },
    }
    operation = _operation(summary, answer, found=True)
    operation["requestBody"] = {"required": True, "content": {"application/json": {"schema": schema}}}
    operation["responses"]["200"]["content"]["text/event-stream"] = {"schema": {"type": "string"}}
    for code in ("429", "503"):
        operation["responses"][code] = _error(code)
    operation["responses"]["413"] = {
        "description": "The request is larger than --max-message-bytes",
        **_error_content(),
    }
    operation["responses"]["415"] = {"description": "The content type is not application/json", **_error_content()}
    return operation


def _operation(summary: str, schema: dict[str, Any], found: bool = False, open_to_all: bool = False) -> dict[str, Any]:
    responses = {"200": {"description": summary, "content": {"application/json": {"schema": schema}}}}
    codes = [] if open_to_all else ["401", "403"]
    responses |= {code: _error(code) for code in (*codes, *(["400", "404"] if found else []))}
    return {"summary": summary, "responses": responses}


def _error(code: str) -> dict[str, Any]:
    return {"description": _ERRORS[code], **_error_content()}


def _error_content() -> dict[str, Any]:
    return {"content": {"application/json": {"schema": _ref("Error")}}}


def _ref(name: str) -> dict[str, str]:
    return {"$ref": _REF.format(name=name)}
