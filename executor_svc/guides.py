"""Guided output in a worker: grammars compiled beside the loop, and masks of allowed tokens for every step.

A sequence has a `Guide` (guide.py): a matcher that follows its tokens.
"""

import functools
import logging
import os
import queue
import threading
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor

import llguidance

from engine.errors import EnginehouseError, FailedPrecondition, Internal, ResourceExhausted
from engine.token_table import TokenTable
from executor_svc.core import Batch, Sequence
from executor_svc.grammar_trial import Trial
from executor_svc.grammars import Grammar, compile_grammar, vocabulary
from executor_svc.guide import Guide, fill
from protos.v1.common_pb2 import GuidedDecoding

COMPILE_SECONDS = 5.0  # that a grammar may take to be tried
_COMPILERS = 2  # grammars that are compiled at a time: one that takes long stops half of them
_MOST_PENDING = 256  # requests that wait for their grammar
_MOST_GRAMMARS = 32  # kept, of at most some 50 MB each

_Known = llguidance.LLMatcher | ResourceExhausted  # a grammar, or why it is refused

log = logging.getLogger(__name__)


class Guides:
    """The grammars of an engine, and the threads that work on them.

    The first grammar takes longer: its vocabulary is made, which stops the loop for some 5 us a token of the model's, once.
    Requests `begin`; what has become of them `take` tells, when `fileno` is readable. Used by the worker's thread alone.

    Args:
        table: of the engine; None if it has none.
        seconds: that a grammar may take to be compiled.
    """

    def __init__(self, table: TokenTable | None, seconds: float = COMPILE_SECONDS) -> None:
        self._table, self._seconds = table, seconds
        self._special = frozenset(table.special) if table else frozenset()
        self._known: OrderedDict[Grammar, _Known] = OrderedDict()
        self._lock = threading.Lock()  # of what is known
        self._tokens: llguidance.LLTokenizer | None = None
        self._making = threading.Lock()  # of the vocabulary
        self._asked: queue.SimpleQueue[tuple[Sequence, Grammar] | None] = queue.SimpleQueue()
        self._found: queue.SimpleQueue[tuple[Sequence, EnginehouseError | None]] = queue.SimpleQueue()
        self._pending: set[Sequence] = set()
        self._compilers: list[threading.Thread] = []
        self._told, self._tell = os.pipe()
        self._masks = ThreadPoolExecutor(1, "masks")
        self._threads = llguidance.LLExecutor(num_threads=min(4, max(1, (os.cpu_count() or 1) // 4))) if table else None

    @property
    def num_pending(self) -> int:
        """Requests whose grammar is being compiled."""
        return len(self._pending)

    def fileno(self) -> int:
        """For select: readable when `take` has something."""
        return self._told

    def begin(self, sequence: Sequence, guided: GuidedDecoding) -> bool:
        """Gives a sequence its guide, at once if the grammar is known: then True. Else it waits, and `take` tells.

        Raises:
            FailedPrecondition: the engine does not tell the bytes of its tokens.
            ResourceExhausted: too many wait, or this grammar was too complex before.
            InvalidArgument: the sequence's completion tokens do not follow the grammar.
        """
        if self._table is None:
            raise FailedPrecondition(
                "the engine does not tell the bytes of its tokens, by which output is guided: build it again with this "
                "release, of a checkpoint with a tokenizer whose tokens have bytes of their own",
                reason="TOKEN_TABLE_MISSING",
            )
        grammar = Grammar.of(guided)
        found = self._recall(grammar)
        if found is not None and len(sequence.token_ids) == sequence.prompt_len:
            self._guide(sequence, grammar, found)
            return True
        if len(self._pending) >= _MOST_PENDING:
            raise ResourceExhausted(
                f"{len(self._pending)} requests wait for their grammar, the most that may: try again later",
                reason="GUIDED_DECODING_BUSY",
                retry_after=self._seconds,
            )
        if len(self._compilers) < min(_COMPILERS, len(self._pending) + 1):
            thread = threading.Thread(target=self._compile_asked, name="grammars", daemon=True)
            self._compilers.append(thread)
            thread.start()
        self._pending.add(sequence)
        self._asked.put((sequence, grammar))
        return False

    def take(self) -> list[tuple[Sequence, EnginehouseError | None]]:
        """The sequences that have their guide now, or the error; not those that were forgotten."""
        taken = []
        while not self._found.empty():
            os.read(self._told, 1)
            sequence, error = self._found.get()
            if sequence in self._pending:
                self._pending.remove(sequence)
                taken.append((sequence, error))
        return taken

    def forget(self, sequence: Sequence) -> bool:
        """Waits no more for a sequence's grammar; False if it did not."""
        if sequence not in self._pending:
            return False
        self._pending.remove(sequence)
        return True

    def take_overdue(self, now: float) -> list[Sequence]:
        """The sequences whose deadline has passed while they waited, which they do no more."""
        overdue = [sequence for sequence in self._pending if sequence.deadline is not None and sequence.deadline <= now]
        self._pending.difference_update(overdue)
        return overdue

    def prepare(self, batch: Batch) -> None:
        """Begins to compute the masks of the tokens that a batch will sample, where they are not there."""
        if self._threads is None or not self._known:  # nobody has ever been guided: a step costs nothing
            return
        guides = [
            item.sequence.guide
            for item in batch.items
            if item.samples and item.sequence.guide is not None and not item.sequence.guide.ready
        ]
        if guides:
            begun = self._masks.submit(fill, guides, self._threads)
            for guide in guides:
                guide.begun = begun

    def close(self) -> None:
        """Ends the threads and their processes."""
        for _ in self._compilers:
            self._asked.put(None)
        for thread in self._compilers:
            thread.join()
        self._masks.shutdown()
        os.close(self._told)
        os.close(self._tell)

    def _recall(self, grammar: Grammar) -> _Known | None:
        with self._lock:
            if grammar in self._known:
                self._known.move_to_end(grammar)
            return self._known.get(grammar)

    def _guide(self, sequence: Sequence, grammar: Grammar, found: _Known) -> None:
        """Gives a sequence a guide by a known grammar. Raises what `begin` raises."""
        if isinstance(found, ResourceExhausted):
            raise found
        vocab_size = len(self._table.tokens) if self._table else 0
        give_up = functools.partial(self._remember, grammar)
        sequence.guide = Guide(found.deep_copy(), grammar.kind, sequence, vocab_size, self._special, give_up)

    def _compile_asked(self) -> None:
        """A compiler's thread."""
        if self._table is None:
            return
        trial = Trial(self._table, self._seconds)
        while (asked := self._asked.get()) is not None:
            sequence, grammar = asked
            if sequence not in self._pending:  # it was forgotten
                continue
            error: EnginehouseError | None = None
            try:
                found = self._recall(grammar) or self._learn(grammar, trial, self._table)
                self._guide(sequence, grammar, found)
            except EnginehouseError as caught:
                error = caught
            except Exception:
                log.exception("a grammar could not be compiled")
                error = Internal("the grammar could not be compiled: see the executor's log")
            self._found.put((sequence, error))
            os.write(self._tell, b"!")
        trial.close()

    def _learn(self, grammar: Grammar, trial: Trial, table: TokenTable) -> _Known:
        """Makes a grammar known. Raises InvalidArgument for one that is none."""
        found: _Known
        try:
            trial(grammar)
            found = compile_grammar(self._vocabulary(table), grammar)
        except ResourceExhausted as error:
            found = error
        self._remember(grammar, found)
        return found

    def _vocabulary(self, table: TokenTable) -> llguidance.LLTokenizer:
        """Made once, when a grammar has passed its trial: most engines guide nothing, and no load waits for it."""
        with self._making:
            if self._tokens is None:
                self._tokens = vocabulary(table)
            return self._tokens

    def _remember(self, grammar: Grammar, found: _Known) -> None:
        with self._lock:
            self._known[grammar] = found
            self._known.move_to_end(grammar)
            if len(self._known) > _MOST_GRAMMARS:
                self._known.popitem(last=False)
