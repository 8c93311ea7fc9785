"""One request on a stream of its own: its steps as messages."""

from collections.abc import AsyncGenerator, Iterable

from executor_svc.clients import Client
from protos.rpc import from_failure
from protos.v1 import executor_pb2 as pb
from protos.v1.common_pb2 import Logprobs, Usage


async def single_outputs(request: pb.Submit, client: Client) -> AsyncGenerator[pb.GenerateOutput, None]:
    """What the client of this request alone is told, to its finish. Raises what the request fails with."""
    usage = Usage(prompt_tokens=len(request.token_ids), completion_tokens=len(request.resume_token_ids))
    async for data in client.outputs():
        step = pb.StepOutput.FromString(data)
        if step.HasField("engine_lost") and step.engine_lost.engine_id == request.engine_id:
            raise from_failure(step.engine_lost.failure)
        for failed in step.failed:
            raise from_failure(failed.failure)
        for started in step.started:
            usage.prompt_tokens, usage.cached_tokens = started.prompt_tokens, started.cached_tokens
        hypotheses = [found for result in step.beams for found in result.hypotheses]
        usage.completion_tokens += len(step.token_ids) + sum(len(found.token_ids) for found in hypotheses)
        finish = step.finished[0].finish if step.finished else None
        if step.token_ids or step.prompt_logprobs or finish:
            yield pb.GenerateOutput(
                token_ids=step.token_ids,
                usage=usage,
                finish=finish,
                logprobs=_joined(step.logprobs),
                prompt_logprobs=_joined(step.prompt_logprobs),
                hypotheses=hypotheses,
            )
        if finish:
            return


def _joined(rows: Iterable[pb.RowLogprobs]) -> Logprobs | None:
    """The columns of one request, those of a later row behind those of an earlier one."""
    joined = None
    for row in rows:
        joined = joined or Logprobs()
        joined.MergeFrom(row.logprobs)
    return joined
