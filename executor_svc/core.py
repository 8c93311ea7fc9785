"""The nouns of the executor: Sequence, Batch, what is said about them, and what limits them. Pure Python."""

import enum
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen; temperature 0 is greedy, top_k 0 and top_p 1 keep every token."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0


class Reason(enum.Enum):
    """Why a sequence ended."""

    EOS = "eos"
    STOP = "stop"
    LENGTH = "length"
    CANCELLED = "cancelled"
    DEADLINE = "deadline"


@dataclass(frozen=True)
class Finish:
    """The end of a sequence, with the token that was matched for EOS and STOP."""

    reason: Reason
    token_id: int | None = None


@dataclass(frozen=True)
class SchedulerConfig:
    """Limits of the scheduler, and what the runner declares.

    Attributes:
        max_in_flight: batches between schedule and commit.
        future_tokens: whether a runner can take as input a token that a batch in flight is still sampling.
        mixed_batches: whether one batch may hold prompts and decodes.
        prefix_cache: whether blocks may be shared between sequences.
        max_waiting: sequences beside the max_batch_size that can run; one more is refused.
    """

    num_blocks: int
    block_size: int
    max_batch_size: int
    max_num_tokens: int
    max_seq_len: int
    max_in_flight: int = 1
    future_tokens: bool = False
    mixed_batches: bool = True
    prefix_cache: bool = True
    max_waiting: int = 1024


@dataclass(eq=False, slots=True)
class Track:
    """What is kept of a request for metrics and logs (see tally.py): times of one clock in seconds, 0 before they come.

    Attributes:
        request_id: what logs call it.
        arrived: at the front. begun: its first batch was. first_token, last_token: were emitted.
    """

    request_id: str
    arrived: float
    begun: float = 0.0
    first_token: float = 0.0
    last_token: float = 0.0


@dataclass(eq=False)
class Sequence:
    """One request on its way.

    Given:
        client, handle: whose it is, and what the client calls it.
        token_ids: the prompt, then whatever was generated.
        prompt_len: tokens of the prompt; the ones behind it count as completion.
        max_tokens: completion tokens at which it ends.
        eos_ids, stop_ids: tokens that end it; they are part of the completion.
        priority: higher runs first. arrival: the order among equals. salt: separates prefix caches.
        deadline: time.monotonic() seconds, or None.

    State, which only the scheduler changes:
        blocks: cache blocks that hold its keys, in order. hashes: the chain of its full blocks' hashes, as far as known.
        num_computed: tokens whose keys are in the cache, counting those of batches in flight.
        num_cached: prompt tokens that the prefix cache had at first admission; None before.
        pending: tokens being sampled by batches in flight. in_flight: batches in flight that hold it.
        emitted: whether a token of it has been emitted. finish: set once; from then on it is in no new batch.
        track: for metrics and logs, which the worker's tally keeps; nothing else looks at it.
    """

    client: int
    handle: int
    token_ids: list[int]
    prompt_len: int
    max_tokens: int
    sampling: Sampling = field(default_factory=Sampling)
    eos_ids: frozenset[int] = frozenset()
    stop_ids: frozenset[int] = frozenset()
    priority: int = 0
    salt: bytes = b""
    deadline: float | None = None
    arrival: int = 0

    blocks: list[int] = field(default_factory=list)
    hashes: list[bytes] = field(default_factory=list)
    num_computed: int = 0
    num_cached: int | None = None
    pending: int = 0
    in_flight: int = 0
    emitted: bool = False
    finish: Finish | None = None
    track: Track | None = None

    @property
    def rank(self) -> tuple[int, int]:
        """The smaller runs first."""
        return (-self.priority, self.arrival)

    @property
    def num_tokens(self) -> int:
        """Tokens that are known or being sampled."""
        return len(self.token_ids) + self.pending

    @property
    def num_completion(self) -> int:
        """Generated tokens that are known."""
        return len(self.token_ids) - self.prompt_len


@dataclass(frozen=True)
class Scheduled:
    """Tokens [start, start + count) of a sequence in a batch; `samples` if the token behind them is to be chosen."""

    sequence: Sequence
    start: int
    count: int
    samples: bool


@dataclass(frozen=True)
class Batch:
    """One step's work."""

    step: int
    items: tuple[Scheduled, ...]


@dataclass(frozen=True)
class Emitted:
    """A new token of a sequence, with its end if it was the last; `first` for the first that is emitted."""

    sequence: Sequence
    token_id: int
    finish: Finish | None
    first: bool
