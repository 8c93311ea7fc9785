"""Beam search as a controller above the scheduler. Pure Python: no torch.

A step of the search is a sequence for each beam, of one token, which asks for the beam's best continuations instead; its prefix
is found in the prefix cache, so that beams share what they have in common and the scheduler knows no forks. The sequences of a
step end when they are committed, whatever is in flight, and those of the next step take their place in the queue.

Which beams go on and when the search ends is as in transformers 5 (`generate(num_beams=..., length_penalty=...,
early_stopping=...)`): a beam's score is the sum of its tokens' log-probabilities, edited as logits are where a request asks for
penalties or bans. Of all continuations the `width` best that do not end go on; one that ends counts when it is among the `width`
best of all, as a hypothesis whose score is the sum over length ** length_penalty, its end included. With a diversity rate,
continuations compete by their score less the rate times their rank among those of the same beam (Li and Jurafsky, "Mutual
information and diverse decoding improve neural machine translation", 2016); the scores themselves do not change.
"""

import enum
import math
from dataclasses import dataclass

from executor_svc.core import Emitted, Finish, Logprobs, Reason, Sequence


class EarlyStopping(enum.Enum):
    """When a search ends that has `width` hypotheses."""

    ENOUGH = "enough"  # at once
    HEURISTIC = "heuristic"  # when the best beam, were it to end now, would be no better than the worst hypothesis
    NEVER = "never"  # when no beam can become better


@dataclass(frozen=True)
class BeamSearch:
    """Settings; the defaults are transformers'."""

    width: int
    length_penalty: float = 1.0
    early_stopping: EarlyStopping = EarlyStopping.HEURISTIC
    diversity_rate: float = 0.0


@dataclass(frozen=True)
class Hypothesis:
    """A completion that has ended; `score` is cumulative_logprob over length ** length_penalty."""

    token_ids: list[int]
    cumulative_logprob: float
    score: float
    finish: Finish


@dataclass(frozen=True)
class _Continuation:
    rank: float  # by which continuations compete
    cumulative_logprob: float
    beam: Sequence
    token_id: int


class BeamGroup:
    """One search: the sequences of its current step, and the hypotheses so far, the best first.

    Args:
        request: what is searched for; it is never scheduled itself, but its finish says that the search has ended.
    """

    def __init__(self, request: Sequence, settings: BeamSearch) -> None:
        self.request, self.settings = request, settings
        self.hypotheses: list[Hypothesis] = []
        self.members: list[Sequence] = []  # of the current step
        self._scores: dict[Sequence, float] = {}
        self._found: dict[Sequence, Logprobs] = {}
        self._ends = request.eos_ids | request.stop_ids
        request.group = self

    def first(self) -> Sequence:
        """The first step: the prompt alone."""
        self.members = [self._member(self.request.token_ids, self.request, [])]
        self._scores = {self.members[0]: 0.0}
        return self.members[0]

    def take(self, emitted: Emitted) -> list[Sequence]:
        """What a member has found. The sequences of the next step, if it was the last of its own and the search goes on."""
        if emitted.logprobs is not None:
            self._found[emitted.sequence] = emitted.logprobs
        if len(self._found) < len(self.members):
            return []
        if self.request.num_cached is None:
            self.request.num_cached = emitted.sequence.num_cached
        length = self.members[0].num_completion
        continuations = self._continuations()
        for found in continuations[: self.settings.width]:
            if finish := self._finish(found.token_id, length):
                self._end(found, length, finish)
        going = [found for found in continuations if not self._finish(found.token_id, length)][: self.settings.width]
        if not going or self._decided(max(found.cumulative_logprob for found in going), length):
            self.request.finish = self.hypotheses[0].finish if self.hypotheses else Finish(Reason.LENGTH)
            self.members = []
            if self.hypotheses:  # for the log
                self.request.token_ids = self.request.token_ids + self.hypotheses[0].token_ids
            return []
        arrival = self.members[0]
        self.members, self._found, self._scores = [], {}, {}
        for found in going:
            tokens = [*found.beam.token_ids[:-1], found.token_id]  # commit has added the most probable token
            member = self._member(tokens, arrival, found.beam.hashes)
            self.members.append(member)
            self._scores[member] = found.cumulative_logprob
        return self.members

    def _member(self, token_ids: list[int], place: Sequence, hashes: list[bytes]) -> Sequence:
        request = self.request
        return Sequence(
            client=request.client,
            handle=request.handle,
            token_ids=list(token_ids),
            prompt_len=request.prompt_len,
            max_tokens=len(token_ids) - request.prompt_len + 1,
            sampling=request.sampling,
            eos_ids=request.eos_ids,
            stop_ids=request.stop_ids,
            priority=request.priority,
            salt=request.salt,
            deadline=request.deadline,
            arrival=place.arrival,
            min_tokens=request.min_tokens,
            track=request.track,
            candidates=self.settings.width + len(self._ends),  # so that `width` of them do not end
            group=self,
            hashes=list(hashes),
            rope_length=place.rope_length,
            num_cached=request.num_cached,
        )

    def _continuations(self) -> list[_Continuation]:
        """Of all beams, those that compete best first."""
        found = []
        for beam in self.members:
            best = self._found[beam]
            for rank, (token, logprob) in enumerate(zip(best.top_token_ids, best.top_logprobs, strict=True)):
                if logprob == float("-inf"):  # it may not come, and the rest neither
                    break
                score = self._scores[beam] + logprob
                found.append(_Continuation(score - rank * self.settings.diversity_rate, score, beam, token))
        return sorted(found, key=lambda continuation: -continuation.rank)

    def _finish(self, token: int, length: int) -> Finish | None:
        if token in self.request.eos_ids:
            return Finish(Reason.EOS, token)
        if token in self.request.stop_ids:
            return Finish(Reason.STOP, token)
        return Finish(Reason.LENGTH) if length >= self.request.max_tokens else None

    def _end(self, found: _Continuation, length: int, finish: Finish) -> None:
        """Takes a hypothesis, if it is among the `width` best."""
        tokens = [*found.beam.token_ids[found.beam.prompt_len : -1], found.token_id]
        score = self._score(found.cumulative_logprob, length)
        self.hypotheses.append(Hypothesis(tokens, found.cumulative_logprob, score, finish))
        self.hypotheses.sort(key=lambda hypothesis: -hypothesis.score)
        del self.hypotheses[self.settings.width :]

    def _score(self, cumulative_logprob: float, length: int) -> float:
        return cumulative_logprob / math.pow(length, self.settings.length_penalty)

    def _decided(self, best: float, length: int) -> bool:
        """Whether the search ends with the hypotheses that it has, though beams could go on, the best of them with that sum."""
        settings = self.settings
        if len(self.hypotheses) < settings.width:
            return False
        if settings.early_stopping is EarlyStopping.ENOUGH:
            return True
        hoped = settings.early_stopping is EarlyStopping.NEVER and settings.length_penalty > 0
        return self._score(best, self.request.max_tokens if hoped else length) <= self.hypotheses[-1].score
