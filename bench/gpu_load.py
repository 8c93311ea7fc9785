"""Random load on a GPU for minutes, through the worker's own loop: then all is given back, and outputs are what they are alone.

    python -m bench.gpu_load [--minutes 10] [--model bench/models/llama-3.1-8b --layers 8] [--kv-blocks 1000] [--out FILE.json]

A thread sends requests at random times: lengths, shared prefixes, sampling settings, priorities, log-probabilities, beams,
timeouts and cancellations are random; the cache is small, so that sequences are preempted. Afterwards the scheduler's bookkeeping
must hold together with every block free, and a sample of requests is run again, one at a time in an empty cache: on the text that
was generated under load, the logit of each greedy token must be within 0.02 of the largest from the best. Weights are random. The
exit status is 1 if anything did not hold.
"""

import argparse
import contextlib
import random
import socket
import tempfile
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from bench.serving import Loaded, build_dummy, load, run, save
from executor_svc.core import Sequence
from executor_svc.frames import FrameSocket
from executor_svc.intake import to_sequence
from executor_svc.loop import Worker
from protos.v1.common_pb2 import BeamSearch, FinishReason, OutputOptions, SamplingParams, StoppingCriteria, TokenIds
from protos.v1.executor_pb2 import Cancel, StepOutput, Submit
from protos.v1.worker_pb2 import FromWorker, ToWorker
from tests.running import watch_logits

CLIENT, DRAIN = 1, 120.0  # seconds in which what is live at the end must end


@dataclass
class Load:
    """The other end of the worker's socket: sends requests, and counts what comes back.

    Attributes:
        tokens: by handle. ended: handles that finished by length or stop. counts: of whatever happened.
    """

    connection: socket.socket
    manifest: Any
    seconds: float
    draw: random.Random
    submits: dict[int, Submit] = field(default_factory=dict)
    tokens: dict[int, list[int]] = field(default_factory=dict)
    live: set[int] = field(default_factory=set)
    ended: list[int] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    problem: str = ""

    def work(self) -> None:
        """The thread; closes the connection at its end."""
        with self.connection:
            try:
                self._work(FrameSocket(self.connection))
            except Exception as error:
                self.problem = f"{type(error).__name__}: {error}"

    def _work(self, front: FrameSocket) -> None:
        self._front = front
        began = told = time.monotonic()
        prefixes = [self._ids(self.draw.randrange(16, 1 + self.manifest.limits.max_seq_len // 3)) for _ in range(8)]
        target, change, told_tokens = 1, began, 0
        cancels: list[tuple[float, int]] = []
        quiet = 0.0
        while (now := time.monotonic()) < began + self.seconds + DRAIN:
            if now >= change:  # some seconds of little or much to do
                most = 2 * self.manifest.limits.max_batch_size
                target, change = (
                    self.draw.choice([1, 4, most // 4, most // 2, most, most]),
                    now + self.draw.uniform(1, 8),
                )
            while now < began + self.seconds and len(self.live) < target and self.draw.random() < 0.8:
                handle = self._submit(prefixes, now)
                if self.draw.random() < 0.1:
                    cancels.append((now + self.draw.expovariate(1.0), handle))
            due = [handle for at, handle in cancels if at <= now]
            if due:
                cancels = [pair for pair in cancels if pair[0] > now]
                self._send(ToWorker(client=CLIENT, cancel=Cancel(handles=due)))
            for data in front.receive(0.005):
                self._take(FromWorker.FromString(data))
            if now >= told + 10:
                rate = (self.counts["tokens"] - told_tokens) / (now - told)
                print(
                    f"  {now - began:5.0f} s: {len(self.live)} live, {rate:.0f} tokens/s, {dict(self.counts)}",
                    flush=True,
                )
                told, told_tokens = now, self.counts["tokens"]
            if now >= began + self.seconds and not self.live:
                if quiet and now >= quiet + 2:  # batches in flight have ended, and the worker has looked at itself
                    return
                quiet = quiet or now
        self.problem = f"{len(self.live)} requests have not ended {DRAIN:.0f} s after the last was sent"

    def _ids(self, count: int) -> list[int]:
        return [self.draw.randrange(self.manifest.model.vocab_size) for _ in range(count)]

    def _submit(self, prefixes: list[list[int]], now: float) -> int:
        draw, longest = self.draw, self.manifest.limits.max_seq_len
        handle = self.counts["submitted"] = self.counts["submitted"] + 1
        prompt = list(draw.choice(prefixes)) if draw.random() < 0.4 else []
        prompt += self._ids(1 + int((longest // 2) ** draw.random()))
        submit = Submit(
            handle=handle,
            engine_id=self.manifest.engine_id,
            token_ids=prompt,
            sampling=self._sampling(),
            stopping=StoppingCriteria(max_tokens=draw.randint(1, max(1, longest // 8)), ignore_eos=draw.random() < 0.8),
            priority=draw.choice([0, 0, 0, 1, -1]),
            tenant=draw.choice(["", "", "other"]),
        )
        kind = draw.random()
        if kind < 0.03:
            submit.beam_search.CopyFrom(BeamSearch(width=draw.randint(2, 4)))
            submit.stopping.max_tokens = min(16, submit.stopping.max_tokens)
        elif kind < 0.1:
            submit.output.CopyFrom(OutputOptions(logprobs=2, prompt_logprobs=1 if kind < 0.05 else None))
        elif kind < 0.13:
            submit.timeout.FromNanoseconds(int(draw.expovariate(0.5) * 1e9) + 1_000_000)
        self.submits[handle], self.tokens[handle] = submit, []
        self.live.add(handle)
        self._send(ToWorker(client=CLIENT, submit=submit, arrived=now))
        return handle

    def _sampling(self) -> SamplingParams:
        draw, kind = self.draw, self.draw.random()
        if kind < 0.6:
            return SamplingParams(temperature=0)
        if kind < 0.8:
            return SamplingParams(
                temperature=draw.uniform(0.2, 1.2), top_p=draw.uniform(0.5, 1), seed=draw.getrandbits(60)
            )
        if kind < 0.9:
            return SamplingParams(temperature=0, repetition_penalty=1.2, frequency_penalty=0.5)
        word = TokenIds(ids=self._ids(draw.randint(1, 2)))
        return SamplingParams(temperature=0.9, top_k=40, seed=draw.getrandbits(60), bad_token_ids=[word])

    def _send(self, message: ToWorker) -> None:
        self._front.send(message.SerializeToString())

    def _take(self, message: FromWorker) -> None:
        kind = message.WhichOneof("message")
        if kind == "metrics":
            self.counts["preemptions"] += message.metrics.preemptions
            self.counts["cached tokens"] += message.metrics.cached_tokens
        elif kind in ("failure", "client_failure"):
            raise RuntimeError(f"the worker says: {getattr(message, kind).message}")
        elif kind == "step_output":
            output, at = StepOutput.FromString(message.step_output), 0
            self.counts["steps"] = output.step
            for row, handle in enumerate(output.handles):
                count = output.counts[row] if output.counts else 1
                self.tokens[handle] += output.token_ids[at : at + count]
                at += count
            self.counts["tokens"] += len(output.token_ids)
            for finished in output.finished:
                self.live.discard(finished.handle)
                cancelled = finished.finish.reason == FinishReason.FINISH_REASON_CANCELLED
                self.counts["cancelled" if cancelled else "finished"] += 1
                if not cancelled and not self.submits[finished.handle].beam_search.width:
                    self.ended.append(finished.handle)
            for failed in output.failed:
                self.live.discard(failed.handle)
                self.counts[failed.failure.reason.lower()] += 1


def alone(loaded: Loaded, submit: Submit, found: list[int]) -> tuple[bool, float]:
    """Whether a request gives the same tokens alone; how far those of a greedy one were from the best, of the largest logit."""
    manifest = loaded.manifest
    again = to_sequence(0, submit, manifest)
    again.salt, again.deadline = b"alone", None
    run(loaded, [again])
    same = again.token_ids[again.prompt_len :] == found
    if not again.plain or not found:
        return same, 0.0
    prompt = list(submit.token_ids)
    told = Sequence(0, 1, prompt + found[:-1], len(prompt) + len(found) - 1, 1, prompt_logprobs=0, salt=b"told")
    told.sampling = again.sampling
    rows = watch_logits(loaded.runner)
    run(loaded, [told])
    for name in ("_run", "_replay", "start"):
        delattr(loaded.runner, name)
    logits = torch.stack([rows[1, len(prompt) - 1 + at] for at in range(len(found))])
    chosen = logits.gather(1, torch.tensor(found, device=logits.device)[:, None])[:, 0]
    return same, float(((logits.max(-1).values - chosen) / logits.abs().max(-1).values).max())


def measure(loaded: Loaded, seconds: float, sample: int = 24, seed: int = 0) -> dict[str, Any]:
    """Runs the load and what follows. `problems` is empty where everything held."""
    ours, theirs = socket.socketpair()
    with theirs:
        worker = Worker(FrameSocket(theirs), loaded.manifest, loaded.runner, max_waiting=1 << 20)
        load = Load(ours, loaded.manifest, seconds, random.Random(seed))
        thread = threading.Thread(target=load.work, daemon=True)
        began = time.monotonic()
        thread.start()
        with contextlib.suppress(ConnectionError):  # the load has closed its end
            worker.run()
        thread.join()
    elapsed, scheduler = time.monotonic() - began, worker._scheduler
    problems = [load.problem] if load.problem else []
    if not load.problem:
        scheduler.check_integrity()
        if not scheduler.idle or scheduler.cache.num_free != scheduler.config.num_blocks:
            free, whole = scheduler.cache.num_free, scheduler.config.num_blocks
            problems.append(f"{free} of {whole} blocks are free at the end, idle {scheduler.idle}")
    chosen = load.draw.sample(load.ended, min(sample, len(load.ended))) if not load.problem else []
    same, worst, greedy = 0, 0.0, 0
    for handle in chosen:
        equal, distance = alone(loaded, load.submits[handle], load.tokens[handle])
        same, worst = same + equal, max(worst, distance)
        greedy += load.submits[handle].sampling.temperature == 0
    if worst > 0.02:
        problems.append(f"a greedy token is {worst:.3f} of the largest logit from the best")
    return {
        "seconds": round(elapsed, 1), "tokens_per_s": round(load.counts["tokens"] / elapsed, 1),
        **{name.replace(" ", "_"): count for name, count in sorted(load.counts.items())},
        "preemptions": scheduler.num_preemptions, "kv_blocks": scheduler.config.num_blocks, "sample": len(chosen),
        "sample_greedy": greedy, "sample_equal": same, "worst_distance": round(worst, 5), "problems": problems,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--model", type=Path, default=Path("bench/models/llama-3.1-8b"))
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument(
        "--kv-blocks", type=int, default=1000, help="of 16 tokens; few enough that sequences are preempted"
    )
    parser.add_argument("--sample", type=int, default=24)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as store:
        limits = {"max_batch_size": arguments.batch, "max_seq_len": 2048, "max_num_tokens": 2048}
        engine = build_dummy(arguments.model, Path(store), layers=arguments.layers, device="cuda", **limits)
        began = time.monotonic()
        loaded = load(Path(store), engine, kv_blocks=arguments.kv_blocks)
        print(f"loaded in {time.monotonic() - began:.1f} s", flush=True)
        found = measure(loaded, 60 * arguments.minutes, arguments.sample, arguments.seed)
    missing = [kind for kind in ("preemptions", "cancelled", "deadline_exceeded") if not found.get(kind)]
    found["problems"] += [f"no {kind}: the load was too light" for kind in missing]
    for name, value in found.items():
        print(f"{name:24}{value}")
    save(arguments.out, found)
    if found["problems"]:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
