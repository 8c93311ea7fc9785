"""A request's prompt as token ids, whichever way it was given."""

from gateway.tokenizer import Tokenizer
from protos.v1.gateway_pb2 import DetokenizeRequest, GenerateRequest, TokenizeRequest


def prompt_ids(request: GenerateRequest | TokenizeRequest, tokenizer: Tokenizer) -> list[int]:
    """Of a request that has exactly one prompt. Raises what `Tokenizer.render` raises."""
    if isinstance(request, GenerateRequest) and request.HasField("token_ids"):
        return list(request.token_ids.ids)
    if request.HasField("chat"):
        text = tokenizer.render(
            [{"role": message.role, "content": message.content} for message in request.chat.messages]
        )
        return tokenizer.encode(text, False)  # the template has written the special tokens
    return tokenizer.encode(request.text, request.add_special_tokens or not request.HasField("add_special_tokens"))


def skip_special(request: GenerateRequest | DetokenizeRequest) -> bool:
    """Whether special tokens make no text."""
    return request.skip_special_tokens or not request.HasField("skip_special_tokens")
