"""What the executors' prefix caches are believed to hold, as far as this gateway's own requests tell.

Prompts are cut into blocks of BLOCK_TOKENS, and each block is known by a hash over itself and all before it, as in an
executor's own cache: equal hashes mean equal prefixes. So a table of hashes is a radix tree whose every path is a key.

Why the gateway keeps this itself, instead of being told: an executor has tens of thousands of blocks, whose hashes would be
hundreds of kilobytes a report to each gateway, and no report is as new as what the gateway has just sent. It is an
approximation, and is put right where it shows: an executor says with each request's start how much of the prompt it found.
"""

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Sequence

BLOCK_TOKENS = 64
_HASH_BYTES = 16  # blake2b-128
_MOST_BLOCKS = 512  # of a prompt that are looked at: so a long one costs no more than one of 32,768 tokens
_MOST_HOLDERS = 8  # of a prefix that are remembered: those that were used last


class Chain:
    """The hashes of a growing text's full blocks.

    Args:
        engine_id, tenant: whose caches can share with it; others' hashes differ.
    """

    def __init__(self, engine_id: str, tenant: str, token_ids: Sequence[int] = ()) -> None:
        salt = f"{engine_id}\0{tenant}".encode()
        self.hashes: list[bytes] = []
        self.num_tokens = 0
        self._root = hashlib.blake2b(salt, digest_size=_HASH_BYTES).digest()
        self._rest = array("I")
        self.extend(token_ids)

    def extend(self, token_ids: Sequence[int]) -> None:
        """More tokens, behind the others."""
        self.num_tokens += len(token_ids)
        rest, hashes, begin = self._rest, self.hashes, 0
        rest.extend(token_ids)
        while len(rest) - begin >= BLOCK_TOKENS and len(hashes) < _MOST_BLOCKS:
            block = rest[begin : begin + BLOCK_TOKENS].tobytes()
            previous = hashes[-1] if hashes else self._root
            hashes.append(hashlib.blake2b(previous + block, digest_size=_HASH_BYTES).digest())
            begin += BLOCK_TOKENS
        del rest[: begin if len(hashes) < _MOST_BLOCKS else len(rest)]

    def copy(self) -> "Chain":
        """One that grows by itself."""
        made = Chain.__new__(Chain)
        made.hashes, made.num_tokens = self.hashes[:], self.num_tokens
        made._root, made._rest = self._root, self._rest[:]
        return made


class Holder:
    """One KV cache. Another one takes its place when what was cached is lost, and this one is found no more.

    Attributes:
        address: of the executor.
        horizon: when the oldest prefix was used that it still has, by the index's clock.
    """

    __slots__ = ("address", "horizon")

    def __init__(self, address: str) -> None:
        self.address = address
        self.horizon = 0


class PrefixIndex:
    """Which holders have which prefixes; of all, those that were used longest ago are forgotten.

    Executors evict what was used longest ago, too, but do not tell. One that has not found what it was believed to have has
    evicted all that was used before that: so one miss moves its horizon, and no other request need be sent in vain.

    Args:
        most_blocks: that are remembered, some 500 bytes each.
    """

    def __init__(self, most_blocks: int = 131_072) -> None:
        self._most_blocks = most_blocks
        self._uses: OrderedDict[bytes, dict[Holder, int]] = OrderedDict()  # by hash: who used it when
        self._clock = 0

    def __len__(self) -> int:
        return len(self._uses)

    def add(self, chain: Chain, holder: Holder) -> list[int]:
        """The holder has, or will have, this text.

        Returns:
            When it used each block of it before, as far as it was believed to have them: for `found`.
        """
        self._clock += 1
        known, before = self._uses, list[int]()
        for place, digest in enumerate(chain.hashes):
            uses = known.get(digest)
            if uses is None:
                uses = known[digest] = {}
            used = uses.pop(holder, 0)
            if used > holder.horizon and len(before) == place:
                before.append(used)
            uses[holder] = self._clock
            if len(uses) > _MOST_HOLDERS:
                del uses[next(iter(uses))]
        for digest in reversed(chain.hashes):  # a prefix's end is forgotten before its beginning
            known.move_to_end(digest)
        while len(known) > self._most_blocks:
            known.popitem(last=False)
        return before

    def found(self, holder: Holder, before: Sequence[int], tokens: int) -> None:
        """The holder has found so many tokens of a text of which it was believed to have the blocks that `add` gave.

        An executor computes at least one token of a prompt, and its blocks are smaller than ours: a block may be found in part.
        """
        missed = tokens // BLOCK_TOKENS + 1
        if missed < len(before):
            holder.horizon = max(holder.horizon, before[missed])

    def match(self, chain: Chain) -> dict[Holder, int]:
        """How many of the text's first tokens each holder is believed to have; those that have none are left out."""
        cached: dict[Holder, int] = {}
        for place, digest in enumerate(chain.hashes):
            reached, longer = place * BLOCK_TOKENS, False
            for holder, used in self._uses.get(digest, {}).items():
                if used > holder.horizon and cached.get(holder, 0) == reached:
                    cached[holder] = reached + BLOCK_TOKENS
                    longer = True
            if not longer:
                break
        return cached
