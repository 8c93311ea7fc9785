"""What a caller wants of a completion, by TensorRT-LLM's names, and the gateway's request that it becomes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from google.protobuf.message import Message

from builder_svc.tensorrt_names import also_takes
from engine.errors import InvalidArgument
from enginehouse.connection import not_unicode
from enginehouse.llm.guided import GuidedDecodingParams
from gateway.submission import check
from protos.checks import MAX_BIAS
from protos.v1.common_pb2 import (
    EARLY_STOPPING_ENOUGH,
    EARLY_STOPPING_HEURISTIC,
    EARLY_STOPPING_NEVER,
    BeamSearch,
    EarlyStopping,
    StoppingCriteria,
)
from protos.v1.common_pb2 import (
    SamplingParams as Sampling,
)
from protos.v1.gateway_pb2 import ChatMessage, GenerateRequest

Prompt = str | Sequence[int] | Sequence[Mapping[str, str]]
"""Text, token ids, or a conversation: messages with "role" and "content"."""

_ABSENT = {
    "external_draft_tokens_config": None,
    "prompt_tuning_config": None,
    "lora_config": None,
    "logits_post_processor_name": None,
    "top_p_min": 1e-6,
    "top_p_reset_ids": -1,
    "top_p_decay": 1.0,
    "no_repeat_ngram_size": (0, 1 << 30),
    "truncate_prompt_tokens": None,
    "detokenize": True,
    "spaces_between_special_tokens": True,
    "return_context_logits": False,
    "return_generation_logits": False,
    "return_encoder_output": False,
}
_EARLY_STOPPING: dict[bool | int | str | None, EarlyStopping.ValueType] = {
    None: EARLY_STOPPING_HEURISTIC,
    False: EARLY_STOPPING_HEURISTIC,
    True: EARLY_STOPPING_ENOUGH,
    "never": EARLY_STOPPING_NEVER,
}


@also_takes(
    ignored=("pad_id",),
    off=_ABSENT,
    aliases={"max_new_tokens": "max_tokens", "min_length": "min_tokens", "random_seed": "seed"},
)
@dataclass(kw_only=True, slots=True)
class SamplingParams:
    """How tokens are chosen, when to end, and what is told.

    With none of temperature, top_k, top_p and min_p the most probable token is taken. Values are checked when they are used.
    `max_new_tokens`, `min_length` and `random_seed` are other names of max_tokens, min_tokens and seed.

    Attributes:
        max_tokens: of the completion; None is as many as the engine has room for.
        min_tokens: before which no end-of-sequence or stop id is chosen.
        end_id: the token that ends a sequence, instead of the engine's own; a negative one is none.
        ignore_eos: go on behind the engine's end-of-sequence tokens.
        stop: texts that end the completion.
        stop_token_ids: tokens that do, beside the end of sequence.
        include_stop_str_in_output: whether the stop string that was found belongs to the text.
        bad: texts that are never written.
        bad_token_ids: tokens, or sequences of tokens, that are never generated.
        temperature: divides the logits; 0 takes the most probable token.
        top_k: of how many most probable tokens one is chosen; 0 is all.
        top_p: of the fewest tokens with at least this probability together, in (0, 1]; 0 takes the most probable token.
        min_p: of tokens with at least this share of the most probable one's probability, in [0, 1].
        seed: the same one gives the same text, in any batch; by default it is drawn.
        repetition_penalty: divides positive logits of tokens that prompt or completion hold, multiplies negative ones; above 0.
        presence_penalty: subtracted from the logit of each token that the completion holds, in [-2, 2].
        frequency_penalty: the same, times how often it does.
        logit_bias: token id -> what is added to its logit, in [-100, 100].
        embedding_bias: the same as a sequence, or tensor, of the vocabulary's size; zeros are left out, others cut to that range.
        n: completions of a prompt.
        best_of: how many are made, of which the n with the highest log-probability a token are given.
        beam_width: above 1, a beam search of so many beams, all of which are given.
        use_beam_search: a beam search of best_of (or n) beams, of which n are given.
        length_penalty: a beam's score is its log-probability over length ** length_penalty.
        early_stopping: of a beam search: True when enough beams have ended, False when no better one is likely, "never" (or
            another number) when none is possible.
        beam_search_diversity_rate: subtracted k times from the k-th best child of a beam.
        return_log_probs: tell the tokens' log-probabilities.
        logprobs: and those of so many most probable tokens, 0 to 20.
        prompt_logprobs: the same of the prompt's tokens, the first excepted.
        exclude_input_from_output: False repeats the prompt before the completion.
        skip_special_tokens: whether special tokens make no text.
        add_special_tokens: whether a text prompt begins with such as a beginning-of-sequence token.
        priority: higher runs first.
        guided_decoding: what the text must be, such as JSON by a schema.

    Example:
        >>> from enginehouse import LLM, SamplingParams
        >>> params = SamplingParams(temperature=0.8, top_p=0.95, seed=7, max_tokens=8, stop=["."])
        >>> with LLM("examples/demo-model") as llm:
        ...     len(llm.generate("In the beginning", params).outputs[0].token_ids)
        8
    """

    max_tokens: int | None = 32
    min_tokens: int = 0
    end_id: int | None = None
    ignore_eos: bool = False
    stop: str | Sequence[str] | None = None
    stop_token_ids: Sequence[int] | None = None
    include_stop_str_in_output: bool = False
    bad: str | Sequence[str] | None = None
    bad_token_ids: Sequence[int] | Sequence[Sequence[int]] | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    seed: int | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    embedding_bias: Any = None
    n: int = 1
    best_of: int | None = None
    beam_width: int = 1
    use_beam_search: bool = False
    length_penalty: float | None = None
    early_stopping: bool | int | str | None = None
    beam_search_diversity_rate: float | None = None
    return_log_probs: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    exclude_input_from_output: bool = True
    skip_special_tokens: bool = True
    add_special_tokens: bool = True
    priority: int = 0
    guided_decoding: GuidedDecodingParams | None = None

    def to_request(self, prompt: Prompt, model: str = "") -> GenerateRequest:
        """A checked request.

        Raises:
            InvalidArgument: (a ValueError) names the value and what is allowed.
        """
        request = GenerateRequest(model=model)
        try:
            _set_prompt(request, prompt)
            request.stop.extend(_texts("stop", self.stop))
            request.bad_words.extend(_texts("bad", self.bad))
        except UnicodeEncodeError as error:
            raise not_unicode(error) from None
        self._choose(request.sampling)
        self._end(request.stopping)
        self._beams(request)
        if self.guided_decoding is not None:
            if not isinstance(self.guided_decoding, GuidedDecodingParams):
                raise InvalidArgument(f"guided_decoding is {self.guided_decoding!r}: give GuidedDecodingParams")
            request.guided_decoding.CopyFrom(self.guided_decoding.to_message())
        logprobs = 0 if self.return_log_probs and self.logprobs is None else self.logprobs
        _set(request.output, logprobs=logprobs, prompt_logprobs=self.prompt_logprobs)
        _set(
            request,
            priority=self.priority,
            echo=not self.exclude_input_from_output,
            skip_special_tokens=self.skip_special_tokens,
            add_special_tokens=self.add_special_tokens,
        )
        check(request)
        return request

    def _choose(self, sampling: Sampling) -> None:
        chosen = (self.temperature, self.top_k, self.top_p, self.min_p)
        greedy = all(value is None for value in chosen) or (self.top_p == 0 and not self.top_k)
        _set(
            sampling,
            temperature=0.0 if greedy else self.temperature,
            top_k=self.top_k,
            top_p=self.top_p or None,
            min_p=self.min_p,
            seed=self.seed,
            repetition_penalty=self.repetition_penalty,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
        )
        if not isinstance(self.logit_bias, Mapping):
            raise _wrong("logit_bias", self.logit_bias)
        biases = {**self.logit_bias}
        if self.embedding_bias is not None:
            values = getattr(self.embedding_bias, "tolist", lambda: self.embedding_bias)()
            cut = {token: min(max(value, -MAX_BIAS), MAX_BIAS) for token, value in enumerate(values) if value}
            biases = cut | biases
        for token, bias in biases.items():
            try:
                sampling.logit_bias[token] = bias
            except (TypeError, ValueError):
                raise _wrong("logit_bias", {token: bias}) from None
        for bad in self.bad_token_ids or ():
            _extend(sampling.bad_token_ids.add().ids, "bad_token_ids", [bad] if isinstance(bad, int) else bad)

    def _end(self, stopping: StoppingCriteria) -> None:
        _set(
            stopping,
            max_tokens=self.max_tokens,
            min_tokens=self.min_tokens,
            ignore_eos=self.ignore_eos or self.end_id is not None,
        )
        _extend(stopping.stop_token_ids, "stop_token_ids", self.stop_token_ids or ())
        if not (self.end_id is None or (isinstance(self.end_id, int) and self.end_id < 0)):
            _extend(stopping.stop_token_ids, "end_id", [self.end_id])

    def _beams(self, request: GenerateRequest) -> None:
        width, n, best_of = self.beam_width, self.n, self.best_of
        if type(width) is not int or width < 1:
            raise InvalidArgument(f"beam_width is {width!r}: give a number, at least 1 (1 is no beam search)")
        if width > 1:
            if n not in (1, width):
                raise InvalidArgument(f"beam_width is {width} and n is {n}: all beams are given, leave n out")
            n = width
        elif self.use_beam_search:
            width, best_of = best_of or n, None
        if width > 1 or self.use_beam_search:
            early = (
                "never"
                if type(self.early_stopping) is int and self.early_stopping not in (0, 1)
                else self.early_stopping
            )
            if not isinstance(early, bool | int | str | None) or early not in _EARLY_STOPPING:
                raise InvalidArgument(f"early_stopping is {self.early_stopping!r}: give True, False or 'never'")
            beams = BeamSearch(early_stopping=_EARLY_STOPPING[early])
            _set(beams, width=width, length_penalty=self.length_penalty, diversity_rate=self.beam_search_diversity_rate)
            request.beam_search.CopyFrom(beams)
        _set(request, n=n, best_of=best_of)


def _set_prompt(request: GenerateRequest, prompt: Prompt) -> None:
    if isinstance(prompt, str):
        request.text = prompt
    elif len(prompt) and isinstance(prompt[0], Mapping):
        for message in prompt:
            role, content = (message.get(name) for name in ("role", "content"))  # type: ignore[union-attr]
            if not isinstance(role, str) or not isinstance(content, str):
                raise InvalidArgument(f"the message {message!r}: give each one a role and a content, both texts")
            request.chat.messages.append(ChatMessage(role=role, content=content))
    else:
        request.token_ids.SetInParent()
        _extend(request.token_ids.ids, "token ids", prompt)


def _texts(name: str, texts: str | Sequence[str] | None) -> Sequence[str]:
    given = [texts] if isinstance(texts, str) else () if texts is None else texts
    if not isinstance(given, Sequence) or not all(isinstance(text, str) for text in given):
        raise _wrong(name, texts)
    return given


def _set(message: Message, **values: Any) -> None:
    """Writes what is not None. Raises InvalidArgument for a value that the field cannot hold."""
    for name, value in values.items():
        if value is not None:
            try:
                setattr(message, name, value)
            except (TypeError, ValueError):
                raise _wrong(name, value) from None


def _extend(ids: Any, name: str, values: Any) -> None:
    try:
        ids.extend(values.tolist() if hasattr(values, "tolist") else values)
    except (TypeError, ValueError):
        raise _wrong(name, values) from None


def _wrong(name: str, value: object) -> InvalidArgument:
    shown = repr(value)
    shown = shown if len(shown) <= 80 else f"{shown[:77]}..."
    return InvalidArgument(f"{name} is {shown}: token ids, limits and seeds are whole numbers from 0, texts are str")
