"""Which blocks hold the beginning of which text: prompts that begin alike share them. Pure Python."""

from executor_svc.core import Scheduled, Sequence
from executor_svc.kv_cache import KVCache, block_hash


class Prefixes:
    """Hashes the full blocks of sequences, each with all that is before it, and finds them in a cache.

    Args:
        enabled: otherwise nothing is remembered and nothing is found.
    """

    def __init__(self, cache: KVCache, *, enabled: bool) -> None:
        self._cache = cache
        self._enabled = enabled

    def match(self, sequence: Sequence) -> list[int]:
        """Cached blocks that a waiting sequence can begin with; at least its last token is left to compute."""
        if not self._enabled:
            return []
        full = (len(sequence.token_ids) - 1) // self._cache.block_size
        self._extend(sequence, full)
        return self._cache.match(sequence.hashes[:full])

    def remember(self, item: Scheduled) -> None:
        """Makes the blocks findable that the item has filled."""
        if not self._enabled:
            return
        sequence, size = item.sequence, self._cache.block_size
        full = (item.start + item.count) // size
        self._extend(sequence, full)
        for index in range(item.start // size, full):
            self._cache.remember(sequence.blocks[index], sequence.hashes[index])

    def _extend(self, sequence: Sequence, count: int) -> None:
        size = self._cache.block_size
        for index in range(len(sequence.hashes), count):
            previous = sequence.hashes[-1] if sequence.hashes else sequence.root
            sequence.hashes.append(block_hash(previous, sequence.token_ids[index * size : (index + 1) * size]))
