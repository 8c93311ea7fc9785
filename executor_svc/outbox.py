"""What happened to each client's requests since the last flush, in the wire's columns."""

from executor_svc.beams import BeamGroup
from executor_svc.core import Emitted, Finish, Logprobs, PromptTold, Reason, Sequence
from protos.rpc import to_failure
from protos.v1 import common_pb2 as wire
from protos.v1.common_pb2 import FinishInfo, FinishReason
from protos.v1.executor_pb2 import EngineLoad, StepOutput

_REASONS = {
    Reason.EOS: FinishReason.FINISH_REASON_STOP,
    Reason.STOP: FinishReason.FINISH_REASON_STOP,
    Reason.LENGTH: FinishReason.FINISH_REASON_LENGTH,
    Reason.CANCELLED: FinishReason.FINISH_REASON_CANCELLED,
}


class Outbox:
    """A StepOutput per client that has something to hear."""

    def __init__(self) -> None:
        self._outputs: dict[int, StepOutput] = {}

    def token(self, emitted: Emitted) -> None:
        """A new token, the request's start before it and its end behind it."""
        sequence = emitted.sequence
        output = self._output(sequence.client)
        if emitted.first and (sequence.prompt_logprobs is None or sequence.prompt_len == 1):
            self._start(sequence)
        if emitted.logprobs is not None:
            output.logprobs.add(handle=sequence.handle, logprobs=_columns(emitted.logprobs))
        output.handles.append(sequence.handle)
        output.token_ids.append(emitted.token_id)
        if emitted.finish:
            self.finish(sequence.client, sequence.handle, emitted.finish)

    def prompt(self, told: PromptTold) -> None:
        """Log-probabilities of some of a prompt's tokens, behind the request's start."""
        sequence = told.sequence
        if told.start == 1:
            self._start(sequence)
        self._output(sequence.client).prompt_logprobs.add(handle=sequence.handle, logprobs=_columns(told.logprobs))

    def beams(self, group: BeamGroup) -> None:
        """All of a beam search that has run to its end: its start, its hypotheses, and its end as that of the best one."""
        request = group.request
        self._start(request)
        result = self._output(request.client).beams.add(handle=request.handle)
        for hypothesis in group.hypotheses:
            result.hypotheses.add(
                token_ids=hypothesis.token_ids,
                cumulative_logprob=hypothesis.cumulative_logprob,
                score=hypothesis.score,
                finish=_finish_info(hypothesis.finish),
            )
        if request.finish is not None:
            self.finish(request.client, request.handle, request.finish)

    def finish(self, client: int, handle: int, finish: Finish) -> None:
        """A request's end."""
        self._output(client).finished.add(handle=handle, finish=_finish_info(finish))

    def fail(self, client: int, handle: int, error: Exception) -> None:
        """A request's end by an error."""
        self._output(client).failed.add(handle=handle, failure=to_failure(error))

    def flush(self, step: int, load: EngineLoad) -> list[tuple[int, bytes]]:
        """(client, serialized StepOutput) for each that has news."""
        messages = []
        for client, output in self._outputs.items():
            output.step = step
            output.load.CopyFrom(load)
            messages.append((client, output.SerializeToString()))
        self._outputs.clear()
        return messages

    def _start(self, sequence: Sequence) -> None:
        self._output(sequence.client).started.add(
            handle=sequence.handle, prompt_tokens=sequence.prompt_len, cached_tokens=sequence.num_cached or 0
        )

    def _output(self, client: int) -> StepOutput:
        output = self._outputs.get(client)
        if output is None:
            output = self._outputs[client] = StepOutput()
        return output


def _finish_info(finish: Finish) -> FinishInfo:
    info = FinishInfo(reason=_REASONS[finish.reason])
    if finish.reason is Reason.EOS and finish.token_id is not None:
        info.eos_token_id = finish.token_id
    elif finish.reason is Reason.STOP and finish.token_id is not None:
        info.stop_token_id = finish.token_id
    return info


def _columns(logprobs: Logprobs) -> wire.Logprobs:
    return wire.Logprobs(
        logprobs=logprobs.logprobs,
        top=logprobs.top,
        top_token_ids=logprobs.top_token_ids,
        top_logprobs=logprobs.top_logprobs,
    )
