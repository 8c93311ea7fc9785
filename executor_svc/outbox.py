"""What happened to each client's requests since the last flush, in the wire's columns."""

from executor_svc.core import Emitted, Finish, Reason
from protos.rpc import to_failure
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
        if emitted.first:
            output.started.add(
                handle=sequence.handle, prompt_tokens=sequence.prompt_len, cached_tokens=sequence.num_cached or 0
            )
        output.handles.append(sequence.handle)
        output.token_ids.append(emitted.token_id)
        if emitted.finish:
            self.finish(sequence.client, sequence.handle, emitted.finish)

    def finish(self, client: int, handle: int, finish: Finish) -> None:
        """A request's end."""
        info = FinishInfo(reason=_REASONS[finish.reason])
        if finish.reason is Reason.EOS and finish.token_id is not None:
            info.eos_token_id = finish.token_id
        elif finish.reason is Reason.STOP and finish.token_id is not None:
            info.stop_token_id = finish.token_id
        self._output(client).finished.add(handle=handle, finish=info)

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

    def _output(self, client: int) -> StepOutput:
        output = self._outputs.get(client)
        if output is None:
            output = self._outputs[client] = StepOutput()
        return output
