"""The nouns of the executor: Sequence, Batch, what is said about them, and what limits them. Pure Python."""

import enum
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

from executor_svc.rope_lengths import RopeLengths

_NO_ROWS = range(0)
_PACKED = struct.Struct("<Qdfif")


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen; `executor_svc/sampler.py` says in which order.

    Attributes:
        temperature: 0 is greedy. top_k, top_p, min_p: 0, 1 and 0 keep every token.
        repetition_penalty: 1 is none. presence_penalty, frequency_penalty: 0 is none.
        logit_bias: (token, what is added to its logit), each token once.
        bad_words: sequences of tokens that are never generated, none of them empty.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    bad_words: tuple[tuple[int, ...], ...] = ()

    @cached_property
    def limited(self) -> bool:
        """Whether some tokens are left out for their small probability."""
        return self.top_k > 0 or self.top_p < 1 or self.min_p > 0

    @cached_property
    def packed(self) -> bytes:
        """seed, top_p, temperature, top_k and min_p, as a device is told them (see kernels/sample.py)."""
        return _PACKED.pack(self.seed, self.top_p, self.temperature, min(self.top_k, 2**31 - 1), self.min_p)

    @cached_property
    def penalized(self) -> bool:
        """Whether tokens that have been there are less probable."""
        return self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0

    @cached_property
    def edits(self) -> bool:
        """Whether logits of single tokens are changed."""
        return self.penalized or bool(self.logit_bias) or bool(self.bad_words)

    @cached_property
    def needs_tokens(self) -> bool:
        """Whether the sampler must know the tokens before the one that it chooses."""
        return self.penalized or any(len(word) > 1 for word in self.bad_words)


class Reason(enum.Enum):
    """Why a sequence ended."""

    EOS = "eos"
    STOP = "stop"
    LENGTH = "length"
    CANCELLED = "cancelled"
    DEADLINE = "deadline"
    ERROR = "error"


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
        places: of a pipeline, each of which works on a batch of its own.
        future_tokens: whether a runner can take as input a token that a batch in flight is still sampling; in a pipeline only of
            one that is `drawn`.
        mixed_batches: whether one batch may hold prompts and decodes.
        prefix_cache: whether blocks may be shared between sequences.
        max_waiting: sequences beside the max_batch_size that can run; one more is refused.
        rope: where a sequence's length decides on its keys.
    """

    num_blocks: int
    block_size: int
    max_batch_size: int
    max_num_tokens: int
    max_seq_len: int
    max_in_flight: int = 1
    places: int = 1
    future_tokens: bool = False
    mixed_batches: bool = True
    prefix_cache: bool = True
    max_waiting: int = 1024
    rope: RopeLengths | None = None


@dataclass(eq=False, slots=True)
class Track:
    """What is kept of a request for metrics and logs (see tally.py): times of one clock in seconds, 0 before they come.

    Attributes:
        request_id: what logs call it.
        arrived: at the front. begun: its first batch was. first_token, last_token: were emitted.
        span: its `tracing.Span`, if there is one.
    """

    request_id: str
    arrived: float
    begun: float = 0.0
    first_token: float = 0.0
    last_token: float = 0.0
    span: Any = None


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
        min_tokens: completion tokens before which no eos or stop id is chosen.
        logprobs: log-probabilities of the completion's tokens are told, with so many most probable ones; None for none.
        prompt_logprobs: the same of the prompt's tokens, the first excepted.
        group, candidates: the beam search (`beams.BeamGroup`) that it is a step of, which wants the so many best next tokens
            instead of one.
        guide: of guided output (`guide.Guide`): what its completion must be, and where it stands in that.

    Kept for the sampler: edits, what it has made of the sequence (see processors.py).

    State, which only the scheduler changes:
        serial: of its addition, unique.
        prompt_told: prompt tokens, behind the first, whose log-probabilities have been asked of a runner.
        blocks: cache blocks that hold its keys, in order. hashes: the chain of its full blocks' hashes, as far as known.
        rope_length: tokens that its keys' rotary frequencies go by at least, if those are more than the program's `original`,
            else 0 (see rope_lengths.py). It only changes while no batch in flight holds the sequence.
        num_computed: tokens whose keys are in the cache, counting those of batches in flight.
        num_cached: prompt tokens that the prefix cache had at first admission; None before.
        pending: tokens being sampled by batches in flight. in_flight: batches in flight that hold it.
        sampled_by: the step of a pipeline that samples the last of the pending tokens; infinite if the host is to choose it.
        emitted: whether a token of it has been emitted. finish: set once; from then on it is in no new batch.
        most_tokens, most_blocks: that it can come to, and their blocks; set when it is added.
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
    min_tokens: int = 0
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    candidates: int = 0
    group: Any = None
    guide: Any = None

    edits: Any = None

    serial: int = 0
    prompt_told: int = 0
    blocks: list[int] = field(default_factory=list)
    hashes: list[bytes] = field(default_factory=list)
    rope_length: int = 0
    num_computed: int = 0
    num_cached: int | None = None
    pending: int = 0
    in_flight: int = 0
    sampled_by: float = 0
    emitted: bool = False
    finish: Finish | None = None
    most_tokens: int = 0
    most_blocks: int = 0
    track: Track | None = None

    @property
    def rank(self) -> tuple[int, int, int]:
        """The smaller runs first."""
        return (-self.priority, self.arrival, self.serial)

    @property
    def root(self) -> bytes:
        """What the first of its blocks' hashes begins with: equal tokens have equal keys where it is equal."""
        return self.salt + self.rope_length.to_bytes(8, "little") if self.rope_length else self.salt

    @cached_property
    def unedited(self) -> bool:
        """Whether its tokens are chosen by the logits as they are, once it has min_tokens, and nothing is told beside them."""
        return not self.sampling.edits and self.logprobs is None and not self.candidates and self.guide is None

    @cached_property
    def needs_tokens(self) -> bool:
        """Whether the sampler must know the tokens before the one that it chooses."""
        return self.sampling.needs_tokens or self.guide is not None

    @cached_property
    def plain(self) -> bool:
        """Whether nothing but the most probable token is wanted, by the logits as they are."""
        return self.sampling.temperature == 0 and self.unedited and not self.min_tokens

    @cached_property
    def direct(self) -> bool:
        """Whether its tokens are chosen or drawn by the logits as they are, of all tokens or of those that its guide allows."""
        edited = self.sampling.edits or bool(self.min_tokens) or bool(self.candidates)
        return not edited and not (self.sampling.temperature > 0 and self.sampling.limited)

    @property
    def tells_prompt(self) -> bool:
        """Whether log-probabilities of its prompt are wanted that no runner has been asked for."""
        return self.prompt_logprobs is not None and self.prompt_told < self.prompt_len - 1

    @property
    def num_tokens(self) -> int:
        """Tokens that are known or being sampled."""
        return len(self.token_ids) + self.pending

    @property
    def num_completion(self) -> int:
        """Generated tokens that are known."""
        return len(self.token_ids) - self.prompt_len


class Scheduled(NamedTuple):
    """Tokens [start, start + count) of a sequence in a batch; `samples` if the token behind them is to be chosen.

    Attributes:
        prompt_rows: positions among them, behind each of which stands a prompt token whose log-probability is wanted.
    """

    sequence: Sequence
    start: int
    count: int
    samples: bool
    prompt_rows: range = _NO_ROWS

    @property
    def unedited(self) -> bool:
        """Whether the token behind them is chosen by the logits as they are, and nothing is told beside it."""
        sequence = self.sequence
        return sequence.unedited and self.start + self.count - sequence.prompt_len >= sequence.min_tokens


@dataclass(frozen=True)
class Batch:
    """One step's work.

    Attributes:
        apart: so many steps before it sample nothing that it takes.
    """

    step: int
    items: tuple[Scheduled, ...]
    apart: int = 0

    @cached_property
    def drawn(self) -> bool:
        """Whether a device can choose all its tokens: no logits are edited, or told of."""
        return all((item.unedited or not item.samples) and not item.prompt_rows for item in self.items)


@dataclass(frozen=True)
class Logprobs:
    """Natural logarithms of the probabilities of several tokens in a row, in columns.

    Attributes:
        logprobs: one a token.
        top: alternatives that each token has.
        top_token_ids, top_logprobs: `top` for the first token, the most probable first, then `top` for the second, and so on.
    """

    logprobs: list[float]
    top: int
    top_token_ids: list[int]
    top_logprobs: list[float]


@dataclass(frozen=True)
class Sampled:
    """What a runner has made of a batch.

    Attributes:
        token_ids: one for each item that samples, in order.
        logprobs: by index into token_ids, where they are wanted: of the token, or of a beam's candidates (then `logprobs` is
            empty, and they are edited as logits are).
        prompt_logprobs: by index into the batch's items: of the tokens behind its prompt_rows.
    """

    token_ids: list[int]
    logprobs: Mapping[int, Logprobs] = field(default_factory=dict)
    prompt_logprobs: Mapping[int, Logprobs] = field(default_factory=dict)


class Emitted(NamedTuple):
    """A new token of a sequence, with its end if it was the last; `first` for the first that is emitted."""

    sequence: Sequence
    token_id: int
    finish: Finish | None
    first: bool
    logprobs: Logprobs | None = None


@dataclass(frozen=True)
class PromptTold:
    """Log-probabilities of a sequence's prompt tokens from position `start` on."""

    sequence: Sequence
    start: int
    logprobs: Logprobs
