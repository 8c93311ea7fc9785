"""A client that has nothing of ours but stubs made from protos/*.proto: builds, loads, generates. Prints what it got as JSON.

Usage: stub_client.py BUILDER EXECUTOR,... GATEWAY CHECKPOINT
"""

import json
import sys
import threading

import grpc

from protos.v1 import (
    builder_pb2,
    builder_pb2_grpc,
    common_pb2,
    executor_pb2,
    executor_pb2_grpc,
    gateway_pb2,
    gateway_pb2_grpc,
)

GREEDY = common_pb2.SamplingParams(temperature=0)


def collect(stream):
    """(text, token ids, finishes, usage) of a Generate stream."""
    text, ids, finishes, usage = "", [], [], None
    for message in stream:
        text += message.text
        ids += message.token_ids
        usage = [message.usage.prompt_tokens, message.usage.cached_tokens, message.usage.completion_tokens]
        if message.HasField("finish"):
            finishes.append(common_pb2.FinishReason.Name(message.finish.reason))
    return {"text": text, "ids": ids, "finishes": finishes, "usage": usage}


def status(call):
    try:
        list(call)
    except grpc.RpcError as error:
        return [error.code().name, error.details()]
    return None


def main(builder_address, executor_addresses, gateway_address, checkpoint):
    builder = builder_pb2_grpc.BuilderStub(grpc.insecure_channel(builder_address))
    executors = [
        executor_pb2_grpc.ExecutorStub(grpc.insecure_channel(address)) for address in executor_addresses.split(",")
    ]
    gateway = gateway_pb2_grpc.GatewayStub(grpc.insecure_channel(gateway_address))
    found = {}

    request = builder_pb2.SubmitBuildRequest(spec=builder_pb2.BuildSpec(checkpoint=checkpoint), model="tiny")
    build = builder.SubmitBuild(request)
    events = list(builder.WatchBuild(builder_pb2.WatchBuildRequest(build_id=build.build_id), timeout=120))
    found["sequences"] = [event.sequence for event in events]
    found["phases"] = list(dict.fromkeys(event.progress.phase for event in events if event.HasField("progress")))
    final = events[-1].state
    found["build"] = builder_pb2.BuildState.Name(final.state)
    engine = final.engine_id

    for executor in executors:
        progress = list(executor.LoadEngine(executor_pb2.LoadEngineRequest(model="tiny"), timeout=120))
        found["loaded"] = [progress[-1].bytes_done == progress[-1].bytes_total, progress[-1].engine.engine_id == engine]

    model = None
    for _ in range(600):
        model = gateway.ListModels(gateway_pb2.ListModelsRequest()).models[0]
        if model.ready_executors == len(executors):
            break
        threading.Event().wait(0.1)
    found["model"] = [model.name, model.engine_id == engine, model.ready_executors]

    stopping = common_pb2.StoppingCriteria(max_tokens=24, ignore_eos=True)
    ids = list(gateway.Tokenize(gateway_pb2.TokenizeRequest(model="tiny", text="In the beginning")).token_ids)
    found["prompt_ids"] = ids
    text_request = gateway_pb2.GenerateRequest(
        model="tiny", text="In the beginning", sampling=GREEDY, stopping=stopping
    )
    ids_request = gateway_pb2.GenerateRequest(
        model="tiny", token_ids=common_pb2.TokenIds(ids=ids), sampling=GREEDY, stopping=stopping
    )
    found["from_text"] = collect(gateway.Generate(text_request))
    found["from_ids"] = collect(gateway.Generate(ids_request))
    found["detokenized"] = gateway.Detokenize(
        gateway_pb2.DetokenizeRequest(model="tiny", token_ids=found["from_ids"]["ids"])
    ).text

    submit = executor_pb2.Submit(engine_id=engine, token_ids=ids, sampling=GREEDY, stopping=stopping)
    found["executor_ids"] = [token for output in executors[0].Generate(submit) for token in output.token_ids]
    commands = []
    for handle in range(3):
        submit = executor_pb2.Submit(handle=handle, engine_id=engine, token_ids=ids, sampling=GREEDY, stopping=stopping)
        commands.append(executor_pb2.Command(submit=submit))
    columns = {handle: [] for handle in range(3)}
    ends = []
    for output in executors[0].Run(iter(commands)):
        taken = 0
        for handle, count in zip(output.handles, output.counts or [1] * len(output.handles), strict=True):
            columns[handle] += output.token_ids[taken : taken + count]
            taken += count
        ends += [finished.handle for finished in output.finished]
    found["run"] = [columns[handle] for handle in range(3)]
    found["run_ends"] = sorted(ends)

    found["errors"] = {
        "unknown model": status(gateway.Generate(gateway_pb2.GenerateRequest(model="nope", text="x"))),
        "no prompt": status(gateway.Generate(gateway_pb2.GenerateRequest(model="tiny"))),
        "unknown build": status(builder.WatchBuild(builder_pb2.WatchBuildRequest(build_id="00"))),
        "unknown engine": status(executors[0].LoadEngine(executor_pb2.LoadEngineRequest(engine_id="0" * 64))),
        "not loaded": status(executors[0].Generate(executor_pb2.Submit(engine_id="0" * 64, token_ids=[1]))),
    }
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main(*sys.argv[1:])
