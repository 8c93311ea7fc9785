"""Whether a grammar is harmless, found out where it can do no harm: in a process that can be killed.

Some small grammars take minutes or gigabytes to compile ({"type": "integer", "multipleOf": 9999991}), and a thread cannot be
stopped. So each new one is first compiled here, and followed for a few tokens.

    python -m executor_svc.grammar_trial

reads frames from stdin, each msgpack: first the vocabulary, as `small` makes it, then [kind, text] of a grammar; each is
answered by a frame on stdout, [status, what is wrong].
"""

import contextlib
import os
import queue
import random
import resource
import select
import subprocess
import sys
import threading
import time

import llguidance
import msgspec
import numpy as np

from engine.errors import EnginehouseError, InvalidArgument, ResourceExhausted
from engine.token_table import TokenTable
from executor_svc.frames import Frames, frame
from executor_svc.grammars import Grammar, compile_grammar, describe, vocabulary

_MEMORY = 2 << 30  # bytes of address space
_START = 60.0  # seconds until the process answers for the first time
_TOKENS = 128  # that a grammar is followed for
_READY, _FINE, _INVALID, _TOO_COMPLEX = "ready", "fine", "invalid", "too complex"


def small(table: TokenTable) -> TokenTable:
    """Single bytes and special tokens at their places, and all bytes behind them: no grammar depends on more to compile."""
    special = set(table.special)
    tokens = [token if i in special or len(token) == 1 else b"" for i, token in enumerate(table.tokens)]
    return TokenTable((*tokens, *(bytes([byte]) for byte in range(256))), table.special)


class Trial:
    """A process that tries one grammar at a time, started when it is first needed; for one thread.

    Args:
        table: of the engine.
        seconds: that a grammar may take.
    """

    def __init__(self, table: TokenTable, seconds: float) -> None:
        self._hello = frame(small(table).to_bytes())
        self._seconds = seconds
        self._process: subprocess.Popen[bytes] | None = None
        self._frames = Frames()

    def __call__(self, grammar: Grammar) -> None:
        """Returns for a grammar that may be compiled.

        Raises:
            InvalidArgument: why it is no grammar, or what in it is not supported.
            ResourceExhausted: it takes too long, or too much memory.
        """
        answer = self._ask(grammar)
        if answer is None:
            raise ResourceExhausted(
                f"guided_decoding.{grammar.kind} takes more than {self._seconds:g} s to compile, or too much memory: "
                "simplify it, above all large counts and numbers",
                reason="GUIDED_DECODING_TOO_COMPLEX",
            )
        status, message = answer
        if status == _INVALID:
            raise InvalidArgument(message, reason="GUIDED_DECODING_INVALID")
        if status == _TOO_COMPLEX:
            raise too_complex(grammar.kind, message)

    def close(self) -> None:
        """Ends the process; the next call starts another one."""
        if self._process:
            self._process.kill()
            self._process.communicate()
            self._process = None

    def _ask(self, grammar: Grammar) -> list[str] | None:
        """The answer; None if there was none, and then there is no process either."""
        if self._process is None:
            self._frames = Frames()
            self._process = subprocess.Popen(
                [sys.executable, "-m", "executor_svc.grammar_trial"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                bufsize=0,
            )
            if self._exchange(self._process, self._hello, _START) is None:
                self.close()
                raise ResourceExhausted(
                    "the process that tries grammars does not start: see the executor's log", reason="TRIAL_NOT_STARTED"
                )
        answer = self._exchange(self._process, frame(msgspec.msgpack.encode(grammar)), self._seconds)
        if answer is None:
            self.close()
        return answer

    def _exchange(self, process: subprocess.Popen[bytes], message: bytes, seconds: float) -> list[str] | None:
        """A frame there and one back; None if the process ends, or takes longer."""
        if process.stdin is None or process.stdout is None:
            return None
        end = time.monotonic() + seconds
        try:
            process.stdin.write(message)
        except OSError:
            return None
        while (left := end - time.monotonic()) > 0:
            if select.select([process.stdout], [], [], left)[0]:
                data = os.read(process.stdout.fileno(), 1 << 16)
                for answer in self._frames.feed(data):
                    return msgspec.msgpack.decode(answer, type=list[str])
                if not data:
                    return None
        return None


def too_complex(kind: str, error: str) -> ResourceExhausted:
    """For a grammar that llguidance gives up, by its limits."""
    return ResourceExhausted(
        f"guided_decoding.{kind} is too complex ({describe(error)}): simplify it, above all large counts and alternatives",
        reason="GUIDED_DECODING_TOO_COMPLEX",
    )


def main() -> int:
    """The process: ends with its stdin."""
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
    messages: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    threading.Thread(target=_read, args=(messages,), daemon=True).start()
    table = TokenTable.from_bytes(messages.get())
    tokens = vocabulary(table)
    _answer(_READY)
    while True:
        grammar = Grammar(*msgspec.msgpack.decode(messages.get(), type=tuple[str, str]))
        try:
            matcher = compile_grammar(tokens, grammar)
        except EnginehouseError as error:
            _answer(_INVALID, error.message)
            continue
        _answer(*_follow(matcher, len(table.tokens), grammar))


def _follow(matcher: llguidance.LLMatcher, end: int, grammar: Grammar) -> tuple[str, str]:
    """What comes of random tokens that a grammar allows, of those below `end`."""
    chance = random.Random(0)
    for step in range(_TOKENS):
        bits = np.frombuffer(matcher.compute_bitmask(), dtype=np.uint8)
        if matcher.is_error():
            error = describe(matcher.get_error())
            if "NoExtension" not in error:
                return _TOO_COMPLEX, error
            return (_FINE, "") if step else (_INVALID, f"guided_decoding.{grammar.kind} matches no text: change it")
        allowed = np.nonzero(np.unpackbits(bits, count=end, bitorder="little"))[0]
        if not len(allowed) or matcher.is_stopped():
            break
        matcher.consume_token(int(chance.choice(allowed)))
    return _FINE, ""


def _read(messages: queue.SimpleQueue[bytes]) -> None:
    """Ends the process when nobody is there any more, whatever it does."""
    frames = Frames()
    while data := os.read(0, 1 << 16):
        for message in frames.feed(data):
            messages.put(message)
    os._exit(0)


def _answer(status: str, message: str = "") -> None:
    with contextlib.suppress(OSError):
        os.write(1, frame(msgspec.msgpack.encode([status, message])))


if __name__ == "__main__":
    sys.exit(main())
