"""What guided output costs: llguidance beside xgrammar, and guided rows beside free ones in a batch.

    python -m bench.guided libraries [--tokenizer FILE.json] [--tokens 256] [--out FILE.json]
    python -m bench.guided decode [CHECKPOINT] [--batch 32] [--tokens 128] [--rounds 9] [--out FILE.json]

`libraries`: over the vocabulary of a tokenizer.json (by default the demo model's), random texts that a grammar allows are
followed. Milliseconds: of compiling, and of a mask (median, 99 of 100); masks of 32 texts in one call, by 1 and by 2 threads; and
how long another Python thread was kept from running meanwhile. xgrammar is left out where it is not installed; it brings torch,
transformers, pydantic and triton, so keep it out of this environment: pip install --target DIR --no-deps xgrammar apache-tvm-ffi,
and DIR in PYTHONPATH.

`decode`: seconds of generating with and without a grammar that never ends, greedy and at temperature 1, by turns; exit status 1
where guided decoding is slower by more than 5%. Medians of the ratio of two neighbouring rounds. Threads wait as a worker's do.
"""

import argparse
import functools
import importlib
import json
import os
import random
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import llguidance
import numpy as np
import torch

from builder_svc.token_bytes import token_table
from engine import blobs
from engine.directory import DirectoryStore
from engine.token_table import TokenTable
from executor_svc.core import Sampling, Sequence
from executor_svc.grammars import Grammar, compile_grammar, vocabulary
from executor_svc.guides import Guides
from executor_svc.launch import THREADS
from tests.guided import guided
from tests.running import Engine, make_engine

BOUND = 1.05
DEMO = Path(__file__).parents[1] / "examples" / "demo-model"
STREET = {"street": {"type": "string"}, "zip": {"type": "string", "pattern": "^[0-9]{5}$"}}
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["a", "b", "long tag"]}},
        "address": {"type": "object", "properties": STREET},
    },
    "required": ["name", "age", "tags", "address"],
    "additionalProperties": False,
}
LARGE = {"type": "object", "properties": {f"field_{n}": PERSON for n in range(100)}, "additionalProperties": False}
GRAMMARS = {
    "any object": ("json_schema", '{"type": "object"}'),
    "person": ("json_schema", json.dumps(PERSON)),
    "100 persons": ("json_schema", json.dumps(LARGE)),
    "regex": ("regex", r"[A-Z][a-z]+ [a-z ]{10,200}\. [0-9]{4}-[0-9]{2}"),
}
ENDLESS = f"start: item+\nitem: %json {json.dumps(PERSON)}"


class Library(Protocol):
    """One of both, over a vocabulary whose last token ends a text."""

    def compile(self, kind: str, text: str) -> Any: ...
    def matcher(self, compiled: Any) -> Any: ...
    def mask(self, matcher: Any) -> np.ndarray: ...
    def masks(self, threads: int) -> Callable[[list[Any]], Any]: ...
    def accept(self, matcher: Any, token: int) -> bool: ...


class LLGuidance:
    def __init__(self, table: TokenTable) -> None:
        self._table = table
        self._tokens = vocabulary(table)
        self._words = -(-(len(table.tokens) + 1) // 32)

    def compile(self, kind: str, text: str) -> Any:
        return compile_grammar(self._tokens, Grammar(kind, text))

    def matcher(self, compiled: Any) -> Any:
        return compiled.deep_copy()

    def mask(self, matcher: Any) -> np.ndarray:
        row = np.empty(self._words, dtype=np.uint32)
        matcher.unsafe_compute_mask_ptr(row.ctypes.data, row.nbytes)
        return row.view(np.uint8)

    def masks(self, threads: int) -> Callable[[list[Any]], Any]:
        executor = llguidance.LLExecutor(num_threads=threads)

        def fill(matchers: list[Any]) -> None:
            rows = np.empty((len(matchers), self._words), dtype=np.uint32)
            places = [(matcher, place) for place, matcher in enumerate(matchers)]
            executor.unsafe_compute_mask_ptr(places, rows.ctypes.data, self._words * 4, len(matchers))

        return fill

    def accept(self, matcher: Any, token: int) -> bool:
        matcher.consume_token(token)
        return matcher.is_stopped()


class XGrammar:
    def __init__(self, table: TokenTable) -> None:
        import xgrammar

        self._library = xgrammar
        special = set(table.special)
        tokens = [b"" if token_id in special else token for token_id, token in enumerate(table.tokens)]
        self._size = len(tokens) + 1
        info = xgrammar.TokenizerInfo(
            [*tokens, b""], xgrammar.VocabType.RAW, vocab_size=self._size, stop_token_ids=[self._size - 1]
        )
        self._compiler = xgrammar.GrammarCompiler(info, max_threads=1, cache_enabled=False)

    def compile(self, kind: str, text: str) -> Any:
        if kind == "regex":
            return self._compiler.compile_regex(text)
        return self._compiler.compile_json_schema(text, any_whitespace=True)

    def matcher(self, compiled: Any) -> Any:
        return self._library.GrammarMatcher(compiled)

    def mask(self, matcher: Any) -> np.ndarray:
        row = self._library.allocate_token_bitmask(1, self._size)
        matcher.fill_next_token_bitmask(row, 0)
        return row.numpy().view(np.uint8)[0]

    def masks(self, threads: int) -> Callable[[list[Any]], Any]:
        batch = self._library.BatchGrammarMatcher(max_threads=threads)
        return lambda matchers: batch.batch_fill_next_token_bitmask(
            matchers, self._library.allocate_token_bitmask(len(matchers), self._size)
        )

    def accept(self, matcher: Any, token: int) -> bool:
        return not matcher.accept_token(token) or matcher.is_terminated()


class Ticks:
    """How long a thread that only wants to run for a moment, again and again, had to wait at most."""

    def __init__(self) -> None:
        self.longest, self._stop = 0.0, False
        self._thread = threading.Thread(target=self._tick)

    def __enter__(self) -> "Ticks":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop = True
        self._thread.join()

    def _tick(self) -> None:
        last = time.perf_counter()
        while not self._stop:
            time.sleep(0.0002)
            now = time.perf_counter()
            self.longest, last = max(self.longest, now - last), now


def timed(call: Callable[[], Any]) -> tuple[float, Any]:
    """Milliseconds, and the result."""
    began = time.perf_counter()
    result = call()
    return 1e3 * (time.perf_counter() - began), result


class Text:
    """A text of random tokens that a grammar allows; at its end another one begins."""

    def __init__(self, library: Library, compiled: Any, size: int, seed: int) -> None:
        self._library, self._compiled, self._size = library, compiled, size
        self._chance = random.Random(seed)
        self.matcher = library.matcher(compiled)

    def go_on(self) -> float:
        """Milliseconds of the next token's mask."""
        took, mask = timed(functools.partial(self._library.mask, self.matcher))
        allowed = np.nonzero(np.unpackbits(mask, count=self._size, bitorder="little"))[0]
        if not len(allowed) or self._library.accept(self.matcher, int(self._chance.choice(allowed))):
            self.matcher = self._library.matcher(self._compiled)
        return took


def in_batches(library: Library, texts: list[Text], threads: int) -> float:
    """Milliseconds of the next tokens' masks in one call, the median."""
    masks, times = library.masks(threads), []
    for _ in range(15):
        times.append(timed(functools.partial(masks, [text.matcher for text in texts]))[0])
        for text in texts:
            text.go_on()
    return statistics.median(times)


def libraries(tokenizer: Path, tokens: int) -> dict[str, Any]:
    """By library and grammar: milliseconds."""
    data = tokenizer.read_bytes()
    vocab = json.loads(data)
    size = 1 + max([*vocab["model"]["vocab"].values(), *(token["id"] for token in vocab["added_tokens"])])
    table = token_table(data, size, ())
    if table is None:
        raise SystemExit(f"{tokenizer}: its tokens have no bytes of their own")
    print(f"{size} tokens of {tokenizer}")
    makers: dict[str, Callable[[TokenTable], Library]] = {"llguidance": LLGuidance}
    try:
        importlib.import_module("xgrammar")  # here, so that its import is not measured
        makers["xgrammar"] = XGrammar
    except ImportError:
        print("xgrammar is not installed: left out")
    print(
        f"{'':12}{'':12}{'vocab':>9}{'compile':>9}{'mask':>9}{'p99':>9}{'32, 1 th':>9}{'32, 2 th':>9}{'blocked':>9}   ms"
    )
    found: dict[str, Any] = {"tokens": size}
    for name, make in makers.items():
        took, library = timed(functools.partial(make, table))
        for grammar, (kind, text) in GRAMMARS.items():
            with Ticks() as ticks:
                compiling, compiled = timed(functools.partial(library.compile, kind, text))
            text_of = functools.partial(Text, library, compiled, size)
            one = text_of(0)
            times = [one.go_on() for _ in range(tokens)]
            batches = [in_batches(library, [text_of(seed) for seed in range(32)], threads) for threads in (1, 2)]
            p99 = sorted(times)[int(0.99 * len(times))]
            row = [took, compiling, statistics.median(times), p99, *batches, 1e3 * ticks.longest]
            print(f"{name:12}{grammar:12}" + "".join(f"{value:9.3f}" for value in row), flush=True)
            names = ("vocabulary", "compile", "mask", "mask_p99", "masks_32_by_1", "masks_32_by_2", "blocked")
            found.setdefault(name, {})[grammar] = dict(zip(names, (round(value, 4) for value in row), strict=True))
    return found


def decode(checkpoint: Path, batch: int, tokens: int, rounds: int) -> dict[str, dict[str, float]]:
    """By temperature: milliseconds a step without and with a grammar, and the ratio."""
    found = {}
    with tempfile.TemporaryDirectory() as directory:
        loaded = make_engine(checkpoint, Path(directory), max_batch_size=batch, max_seq_len=tokens + 16)
        file = loaded.manifest.token_table
        if file is None:
            raise SystemExit(f"{checkpoint}: its tokens have no bytes of their own")
        guides = Guides(TokenTable.from_bytes(blobs.read(DirectoryStore(Path(directory)), file)))
        engine = Engine(loaded, guides=guides)

        def run(temperature: float, held: bool) -> float:
            work = [
                Sequence(0, row, [5, 6, 7 + row], 3, tokens, Sampling(temperature, seed=row)) for row in range(batch)
            ]
            if held:
                work = [guided(sequence, guides, grammar=ENDLESS) for sequence in work]
            took, _ = timed(lambda: engine.run(work))
            if any(sequence.num_completion != tokens for sequence in work):
                raise SystemExit("a completion has ended before its time")
            return took

        for temperature in (0.0, 1.0):
            free, held = [], []
            for number in range(rounds + 1):  # the first warms up
                for kind in (False, True) if number % 2 else (True, False):
                    took = run(temperature, kind)
                    if number:
                        (held if kind else free).append(took)
            ratio = statistics.median(one / other for one, other in zip(held, free, strict=True))
            step, guided_step = (statistics.median(times) / tokens for times in (free, held))
            print(
                f"temperature {temperature:g}, batch {batch}: {step:.3f} ms a step, guided {guided_step:.3f}, "
                f"{ratio:.3f} times (bound {BOUND})",
                flush=True,
            )
            columns = {"free_ms": step, "guided_ms": guided_step, "ratio": ratio}
            found[f"temperature {temperature:g}"] = {name: round(value, 4) for name, value in columns.items()}
        guides.close()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = parser.add_subparsers(dest="part", required=True)
    one = parts.add_parser("libraries")
    one.add_argument("--tokenizer", type=Path, default=DEMO / "tokenizer.json")
    one.add_argument("--tokens", type=int, default=256)
    other = parts.add_parser("decode")
    other.add_argument("checkpoint", type=Path, nargs="?", default=DEMO)
    other.add_argument("--batch", type=int, default=32)
    other.add_argument("--tokens", type=int, default=128)
    other.add_argument("--rounds", type=int, default=9)
    other.add_argument("--threads", type=int, help="of torch")
    for part in (one, other):
        part.add_argument("--out", type=Path, help="where the numbers are written, as JSON")
    arguments = parser.parse_args()
    found: dict[str, Any]
    if arguments.part == "libraries":
        found, good = libraries(arguments.tokenizer, arguments.tokens), True
    else:
        if not THREADS.items() <= os.environ.items():  # read when torch is loaded, which it is by now
            os.execve(sys.executable, [sys.executable, "-m", "bench.guided", *sys.argv[1:]], {**os.environ, **THREADS})
        if arguments.threads:
            torch.set_num_threads(arguments.threads)
        found = decode(arguments.checkpoint, arguments.batch, arguments.tokens, arguments.rounds)
        good = all(columns["ratio"] <= BOUND for columns in found.values())
    if arguments.out:
        arguments.out.write_text(json.dumps(found, indent=1) + "\n")
    if not good:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
