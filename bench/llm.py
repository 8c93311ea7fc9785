"""What `LLM` costs beside its worker: 64 prompts through LLM.generate, and the same requests sent to a bare worker process.

The bare side sends serialized requests and reads frames until all have finished; it makes no text. Rounds of both take turns.

    python -m bench.llm [MODEL] [--prompts 64] [--tokens 128] [--rounds 9]
"""

import argparse
import json
import statistics
import time

from enginehouse import LLM, SamplingParams
from enginehouse.process import service_environment
from executor_svc.frames import FrameSocket
from executor_svc.launch import Spares
from protos.v1.executor_pb2 import LoadEngineRequest, StepOutput, Submit
from protos.v1.worker_pb2 import FromWorker, ToWorker

BOUND = 1.05
TEXTS = (
    "In the beginning God created",
    "And it came to pass",
    "A hacker is",
    "The LORD said unto Moses",
    "He that hath",
)


class BareWorker:
    """A worker process and nothing else."""

    def __init__(self, llm: LLM) -> None:
        manifest, store = llm.engine.manifest, llm.engine.store
        arguments = ["--store", store.url, "--device", manifest.fingerprint.device, "--log-level", "warning"]
        self._spares = Spares(arguments, environment=service_environment())
        self._process, connection = self._spares.take()
        self._socket = FrameSocket(connection)
        self._engine = manifest.engine_id
        self._send(ToWorker(load_engine=LoadEngineRequest(engine_id=self._engine)))
        while not any(message.progress.HasField("engine") for message in self._receive()):
            pass

    def run(self, requests: list[Submit]) -> int:
        """Tokens of all of them."""
        for handle, request in enumerate(requests, 1):
            request.handle = handle
            self._send(ToWorker(client=1, submit=request, arrived=time.monotonic()))
        tokens, left = 0, len(requests)
        while left:
            for message in self._receive():
                if message.WhichOneof("message") == "step_output":
                    step = StepOutput.FromString(message.step_output)
                    tokens, left = tokens + len(step.token_ids), left - len(step.finished)
        return tokens

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        self._spares.close()

    def _send(self, message: ToWorker) -> None:
        self._socket.send(message.SerializeToString())

    def _receive(self) -> list[FromWorker]:
        return [FromWorker.FromString(data) for data in self._socket.receive(None)]


def measure(llm: LLM, prompts: int, tokens: int, rounds: int) -> dict[str, float]:
    """Medians of seconds, and of the ratio of two neighbouring rounds."""
    texts = [f"{TEXTS[number % len(TEXTS)]} {number}" for number in range(prompts)]
    params = SamplingParams(max_tokens=tokens, ignore_eos=True)
    stopping = params.to_request(texts[0]).stopping
    sampling = params.to_request(texts[0]).sampling
    requests = [
        Submit(
            engine_id=llm.engine.engine_id, token_ids=llm.tokenizer.encode(text), sampling=sampling, stopping=stopping
        )
        for text in texts
    ]
    bare = BareWorker(llm)
    ours, theirs = [], []
    try:
        for number in range(rounds + 1):  # the first warms up
            for first in (True, False) if number % 2 else (False, True):
                began = time.perf_counter()
                if first:
                    outputs = llm.generate(texts, params, use_tqdm=False)
                    count = sum(len(output.outputs[0].token_ids) for output in outputs)
                else:
                    count = bare.run(requests)
                seconds = time.perf_counter() - began
                if count != prompts * tokens:
                    raise SystemExit(f"{count} tokens instead of {prompts * tokens}")
                if number:
                    (ours if first else theirs).append(seconds)
    finally:
        bare.close()
    return {
        "llm_s": statistics.median(ours),
        "bare_s": statistics.median(theirs),
        "ratio": statistics.median(one / other for one, other in zip(ours, theirs, strict=True)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", default="examples/demo-model")
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=9)
    arguments = parser.parse_args()
    with LLM(arguments.model) as llm:
        found = measure(llm, arguments.prompts, arguments.tokens, arguments.rounds)
    print(json.dumps({**vars(arguments), **{name: round(value, 4) for name, value in found.items()}, "bound": BOUND}))
    if found["ratio"] > BOUND:
        raise SystemExit(f"LLM.generate takes {found['ratio']:.3f} times the bare worker's time, more than {BOUND}")


if __name__ == "__main__":
    main()
