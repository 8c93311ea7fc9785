"""What a caller gets: the completions of a prompt as they are now."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from protos.v1.common_pb2 import FINISH_REASON_CANCELLED, FINISH_REASON_LENGTH, FINISH_REASON_STOP, FinishInfo, Logprobs
from protos.v1.gateway_pb2 import GenerateResponse

FINISH_REASONS = {FINISH_REASON_STOP: "stop", FINISH_REASON_LENGTH: "length", FINISH_REASON_CANCELLED: "cancelled"}


@dataclass(frozen=True)
class TokenLogprobs:
    """Natural logarithms of the model's own probabilities (temperature 1, before penalties) at one place.

    Attributes:
        logprob: of the token that stands there.
        top: token id -> that of each most probable token, the most probable first; as many as were asked for.

    Example:
        >>> from enginehouse import LLM, SamplingParams
        >>> with LLM("examples/demo-model") as llm:
        ...     output = llm.generate("In the beginning", SamplingParams(logprobs=2, max_tokens=1)).outputs[0]
        >>> output.logprobs[0].logprob == max(output.logprobs[0].top.values())
        True
    """

    logprob: float
    top: dict[int, float] = field(default_factory=dict)


@dataclass
class CompletionOutput:
    """One completion, as far as it has come.

    Attributes:
        index: its number among those of the prompt, from 0; of beams and best_of, 0 is the best.
        text: empty where there is no tokenizer.
        token_ids: with the end-of-sequence or stop token that has ended it.
        cumulative_logprob: the sum of the tokens' log-probabilities, where they were asked for or decide; None elsewhere.
        logprobs: one for each token, if they were asked for; else None.
        finish_reason: "stop", "length" or "cancelled"; None while it goes on.
        stop_reason: the stop token's id or the stop string that has ended it; None for the end of sequence, or end_id.

    Example:
        >>> from enginehouse import LLM, SamplingParams
        >>> with LLM("examples/demo-model") as llm:
        ...     result = llm.generate_async("In the beginning", SamplingParams(max_tokens=4), streaming=True)
        ...     "".join(output.outputs[0].text_diff for output in result) == result.outputs[0].text
        True
    """

    index: int = 0
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    cumulative_logprob: float | None = None
    logprobs: list[TokenLogprobs] | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    _told_text: int = field(default=0, repr=False, compare=False)
    _told_tokens: int = field(default=0, repr=False, compare=False)

    @property
    def length(self) -> int:
        """Tokens so far."""
        return len(self.token_ids)

    @property
    def text_diff(self) -> str:
        """What of the text the output before this one had not."""
        return self.text[self._told_text :]

    @property
    def token_ids_diff(self) -> list[int]:
        """What of the tokens the output before this one had not."""
        return self.token_ids[self._told_tokens :]

    @property
    def logprobs_diff(self) -> list[TokenLogprobs] | None:
        """Those of `token_ids_diff`."""
        return None if self.logprobs is None else self.logprobs[self._told_tokens :]

    def add(self, news: GenerateResponse, include_stop: bool, end_id: int | None = None) -> None:
        """Takes what has come for this completion.

        Args:
            include_stop: whether a stop string belongs to the text.
            end_id: the stop token that is an end of sequence.
        """
        self.text += news.text
        self.token_ids.extend(news.token_ids)
        if news.HasField("logprobs"):
            self.logprobs = (self.logprobs or []) + token_logprobs(news.logprobs)
            self.cumulative_logprob = (self.cumulative_logprob or 0.0) + sum(news.logprobs.logprobs)
        if news.HasField("cumulative_logprob"):
            self.cumulative_logprob = news.cumulative_logprob
        if news.HasField("finish"):
            self._finish(news.finish, include_stop, end_id)

    def _finish(self, finish: FinishInfo, include_stop: bool, end_id: int | None) -> None:
        self.finish_reason = FINISH_REASONS.get(finish.reason, "stop")
        kind = finish.WhichOneof("matched")
        if kind == "stop_string" or (kind == "stop_token_id" and finish.stop_token_id != end_id):
            self.stop_reason = getattr(finish, kind)
        if include_stop and kind == "stop_string":
            self.text += finish.stop_string

    def snapshot(self) -> "CompletionOutput":
        """As it is now; of what comes from here on, the next snapshot's differences consist."""
        now = CompletionOutput(
            self.index,
            self.text,
            list(self.token_ids),
            self.cumulative_logprob,
            None if self.logprobs is None else list(self.logprobs),
            self.finish_reason,
            self.stop_reason,
            self._told_text,
            self._told_tokens,
        )
        self._told_text, self._told_tokens = len(self.text), len(self.token_ids)
        return now


@dataclass
class RequestOutput:
    """A prompt and its completions.

    Attributes:
        request_id: unique in this process.
        prompt: the text; None for token ids.
        prompt_token_ids: the prompt as the model reads it; empty where a cluster alone knows them.
        outputs: the completions, by index.
        finished: whether all of them have ended.
        prompt_logprobs: one for each token of the prompt but the first, if they were asked for; else None.
        cached_tokens: of the prompt, found in the prefix cache.

    Example:
        >>> from enginehouse import LLM, SamplingParams
        >>> with LLM("examples/demo-model") as llm:
        ...     output = llm.generate("In the beginning", SamplingParams(max_tokens=4))
        >>> output.finished, output.outputs[0].finish_reason, len(output.outputs[0].token_ids)
        (True, 'length', 4)
    """

    request_id: int
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool = False
    prompt_logprobs: list[TokenLogprobs] | None = None
    cached_tokens: int = 0


def token_logprobs(columns: Logprobs) -> list[TokenLogprobs]:
    """The columns of several tokens in a row, one by one."""
    top = columns.top

    def at(values: Sequence[float], place: int) -> Sequence[float]:
        return values[place * top : (place + 1) * top]

    return [
        TokenLogprobs(
            logprob,
            dict(
                zip(
                    columns.top_token_ids[place * top : (place + 1) * top], at(columns.top_logprobs, place), strict=True
                )
            ),
        )
        for place, logprob in enumerate(columns.logprobs)
    ]
