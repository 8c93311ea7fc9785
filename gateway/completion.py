"""One completion: tokens, text, log-probabilities and end, as responses."""

from gateway.inbox import Delta
from gateway.transcript import Transcript
from protos.v1.common_pb2 import FINISH_REASON_STOP, FinishInfo, Logprobs, Usage
from protos.v1.gateway_pb2 import GenerateResponse


class Completion:
    """Makes a response of each delta.

    Attributes:
        num_tokens: that it has.
        cumulative_logprob: of them, where the executor tells it.
        finish: how it has ended.
    """

    def __init__(self, index: int, transcript: Transcript) -> None:
        self.index = index
        self.num_tokens = 0
        self.cumulative_logprob: float | None = None
        self.finish: FinishInfo | None = None
        self._transcript = transcript

    def respond(self, delta: Delta, usage: Usage) -> GenerateResponse:
        """News for the client, up to the first stop string; counts their tokens in the usage of the whole request."""
        token_ids, text = self._transcript.push(delta.token_ids)
        finish = delta.finish
        if finish and not self._transcript.matched:
            text += self._transcript.flush()
        if self._transcript.matched:
            finish = FinishInfo(reason=FINISH_REASON_STOP, stop_string=self._transcript.matched)
        count = len(token_ids)
        self.num_tokens += count
        usage.completion_tokens += count
        response = GenerateResponse(text=text, token_ids=token_ids, usage=usage, finish=finish, index=self.index)
        if delta.prompt_logprobs:
            response.prompt_logprobs.CopyFrom(delta.prompt_logprobs)
        if delta.logprobs:
            logprobs = first_rows(delta.logprobs, count)
            response.logprobs.CopyFrom(logprobs)
            self.cumulative_logprob = (self.cumulative_logprob or 0.0) + sum(logprobs.logprobs)
        if finish:
            self.finish = finish
            if self.cumulative_logprob is not None:
                response.cumulative_logprob = self.cumulative_logprob
        return response


def first_rows(logprobs: Logprobs, count: int) -> Logprobs:
    """Those of the first tokens."""
    if len(logprobs.logprobs) <= count:
        return logprobs
    end = count * logprobs.top
    return Logprobs(
        logprobs=logprobs.logprobs[:count],
        top=logprobs.top,
        top_token_ids=logprobs.top_token_ids[:end],
        top_logprobs=logprobs.top_logprobs[:end],
    )
