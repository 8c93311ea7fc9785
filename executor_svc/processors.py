"""Changes to the logits of single tokens: bias, bad words, min_tokens, guides, penalties; of a whole batch at once.

A row changes few tokens beside the vocabulary, so all of a batch's are collected as (row, token) pairs and changed by one
gather and one scatter for each kind. What a sequence needs for it is kept from step to step and costs a step what is new.
"""

import numpy as np
import torch
from torch import Tensor

from executor_svc.core import Sequence
from executor_svc.kernels import choose

_Pairs = list[tuple[int, np.ndarray]]  # rows, and tokens of each

_BITS = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little")
_OF_BYTE = np.where(_BITS, np.float32(0), np.float32(-np.inf))  # [256, 8]


class History:
    """The tokens that a sequence holds, each once, with how often its completion does."""

    def __init__(self, prompt: list[int]) -> None:
        ids = np.unique(np.array(prompt, dtype=np.int64))
        self._place = {token: place for place, token in enumerate(ids.tolist())}
        self._ids, self._counts = ids, np.zeros(len(ids), dtype=np.float32)
        self._seen = len(prompt)

    @property
    def ids(self) -> np.ndarray:
        """int64 [tokens], in no order."""
        return self._ids[: len(self._place)]

    @property
    def counts(self) -> np.ndarray:
        """float32 [tokens]; 0 for those that only the prompt holds."""
        return self._counts[: len(self._place)]

    def catch_up(self, token_ids: list[int]) -> None:
        """Takes what has been added to the sequence's tokens since the last call."""
        for token in token_ids[self._seen :]:
            place = self._place.setdefault(token, len(self._place))
            if place == len(self._ids):
                self._ids, self._counts = (
                    np.concatenate([column, np.zeros(len(column) + 64, dtype=column.dtype)])
                    for column in (self._ids, self._counts)
                )
            self._ids[place] = token
            self._counts[place] += 1
        self._seen = len(token_ids)


class Edits:
    """What one sequence wants changed, prepared; `Sequence.edits` keeps it."""

    def __init__(self, sequence: Sequence) -> None:
        sampling = sequence.sampling
        self.biased = np.array([token for token, _ in sampling.logit_bias], dtype=np.int64)
        self.biases = np.array([bias for _, bias in sampling.logit_bias], dtype=np.float32)
        self.history = History(sequence.token_ids[: sequence.prompt_len]) if sampling.penalized else None
        self._ends = sorted(sequence.eos_ids | sequence.stop_ids)
        self._never = [word[0] for word in sampling.bad_words if len(word) == 1]
        self._after: dict[int, list[tuple[int, ...]]] = {}  # the longer bad words, by their last but one token
        for word in sampling.bad_words:
            if len(word) > 1:
                self._after.setdefault(word[-2], []).append(word)

    def banned(self, sequence: Sequence, position: int) -> list[int]:
        """Tokens that must not come next."""
        found = list(self._never)
        if position - sequence.prompt_len < sequence.min_tokens:
            found += self._ends
        if self._after:
            tokens = sequence.token_ids
            for word in self._after.get(tokens[-1], ()):
                if tuple(tokens[1 - len(word) :]) == word[:-1]:
                    found.append(word[-1])
        return found


def edit(logits: Tensor, sequences: list[Sequence], positions: list[int]) -> None:
    """Changes logits in place: adds bias, masks bad words, early ends and what guides forbid with -inf, then applies penalties.

    Repetition (Keskar et al., "CTRL", 2019, as in transformers): a positive logit of a token that prompt or completion holds is
    divided by the penalty, a negative one multiplied. Presence and frequency (the OpenAI API's): presence +
    frequency * count is subtracted from the logit of a token that the completion holds `count` times.

    Args:
        logits: float32 [N, vocab].
        sequences, positions: of the rows. Those that change nothing cost nothing.
    """
    biased: _Pairs = []
    banned: _Pairs = []
    masks, bits = [0] * len(sequences), 0  # where they lie; how many bits each has
    allowed: dict[int, np.ndarray] = {}  # what lies there, if that is looked at or is not the guide's own
    native = choose.serves(logits)
    held: _Pairs = []
    biases: list[np.ndarray] = []
    counts: list[np.ndarray] = []
    penalties: list[tuple[float, float, float]] = []
    for row, (sequence, position) in enumerate(zip(sequences, positions, strict=True)):
        sampling = sequence.sampling
        guide = sequence.guide
        if not sampling.edits and not sequence.min_tokens:
            if guide is not None:
                masks[row], bits = guide.bits(), guide.num_bits
                if not native:
                    allowed[row] = guide.mask
            continue
        if sequence.edits is None:
            sequence.edits = Edits(sequence)
        edits: Edits = sequence.edits
        if len(edits.biased):
            biased.append((row, edits.biased))
            biases.append(edits.biases)
        bans = edits.banned(sequence, position)
        if guide is not None:
            masks[row], bits, allowed[row] = guide.bits(), guide.num_bits, guide.mask
            if bans:
                allowed[row] = _without(guide.mask, bans)
                masks[row] = allowed[row].ctypes.data
        elif bans:
            tokens = np.unique(bans)
            if len(tokens) < logits.shape[-1]:  # bans that leave nothing are not kept: a token must be given
                banned.append((row, tokens))
        if edits.history:
            edits.history.catch_up(sequence.token_ids)
            held.append((row, edits.history.ids))
            counts.append(edits.history.counts)
            penalties.append((sampling.repetition_penalty, sampling.presence_penalty, sampling.frequency_penalty))
    device = logits.device
    if biased:
        at = _pairs(biased, device)
        logits[at] += torch.from_numpy(np.concatenate(biases)).to(device)
    if banned:
        logits[_pairs(banned, device)] = float("-inf")
    if native and bits:
        choose.forbid(logits, masks, bits)
    elif allowed:
        logits[list(allowed)] += _masks(np.array(list(allowed.values())), logits.shape[-1], device)
    if held:
        at = _pairs(held, device)
        lengths = [len(tokens) for _, tokens in held]
        spread = np.repeat(np.array(penalties, dtype=np.float32), lengths, axis=0)
        repetition, presence, frequency = torch.from_numpy(spread).to(device).unbind(-1)
        count = torch.from_numpy(np.concatenate(counts)).to(device)
        values = logits[at]
        values = torch.where(values > 0, values / repetition, values * repetition)
        values = values.clamp(max=torch.finfo(values.dtype).max)  # a tiny penalty must not lead to inf
        logits[at] = values - (presence * (count > 0) + frequency * count)


def _without(allowed: np.ndarray, bans: list[int]) -> np.ndarray:
    """Bits of allowed tokens less those that are banned, unless nothing is left."""
    left, tokens = allowed.copy(), np.unique(bans)
    np.bitwise_and.at(left, tokens >> 3, ~(1 << (tokens & 7)).astype(np.uint8))
    return left if left.any() else allowed


def _masks(bits: np.ndarray, vocab_size: int, device: torch.device) -> Tensor:
    """uint8 [N, bytes], a bit a token from the lowest on -> 0 where it is set, -inf where it is not: float32 [N, vocab_size].

    To look up eight at a time and to add them is many times quicker than to mask. Bits are soon on the device.
    """
    index = torch.from_numpy(bits).to(device).flatten().int()
    return torch.from_numpy(_OF_BYTE).to(device).index_select(0, index).view(len(bits), -1)[:, :vocab_size]


def _pairs(parts: _Pairs, device: torch.device) -> tuple[Tensor, Tensor]:
    """Rows and token ids, one after another, as an index into logits."""
    rows = np.repeat([row for row, _ in parts], [len(tokens) for _, tokens in parts])
    tokens = np.concatenate([tokens for _, tokens in parts])
    return torch.from_numpy(rows).to(device), torch.from_numpy(tokens).to(device)
