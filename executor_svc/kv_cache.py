"""Paged KV cache bookkeeping: which block is whose, and which hold a prefix that may come again. Pure Python.

Prefix caching as in vLLM's design: a full block is known by a hash over its tokens and the hash of the block before it, so that
equal hashes mean equal prefixes. A block that nobody uses keeps its content until it is needed; the longest unused goes first.
"""

import hashlib
from array import array
from collections import OrderedDict

from engine.errors import Internal

HASH_BYTES = 16  # blake2b-128


def block_hash(previous: bytes, token_ids: list[int]) -> bytes:
    """The hash of a full block, given the one before it (or `Sequence.root`, for the first)."""
    return hashlib.blake2b(previous + array("I", token_ids).tobytes(), digest_size=HASH_BYTES).digest()


class KVCache:
    """Blocks of `block_size` tokens, counted by reference.

    A block is used (references > 0) or free; a free one may still be cached, that is, found again by its hash.
    `can_allocate` says whether `allocate` will succeed; every block that was allocated or shared is given to `free` once.
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.num_blocks, self.block_size = num_blocks, block_size
        self._references = [0] * num_blocks
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))  # first is taken first
        self._hash_of: dict[int, bytes] = {}
        self._block_of: dict[bytes, int] = {}

    @property
    def num_free(self) -> int:
        """Blocks that can be allocated, cached ones among them."""
        return len(self._free)

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that hold so many tokens."""
        return -(-num_tokens // self.block_size)

    def match(self, hashes: list[bytes]) -> list[int]:
        """The cached blocks of the longest known prefix; they are not taken yet."""
        found = []
        for digest in hashes:
            block = self._block_of.get(digest)
            if block is None:
                break
            found.append(block)
        return found

    def can_allocate(self, count: int, shared: list[int] | None = None) -> bool:
        """Whether `count` fresh blocks can be had beside the shared ones, some of which may be free now."""
        revived = sum(1 for block in shared or () if self._references[block] == 0)
        return count + revived <= len(self._free)

    def share(self, blocks: list[int]) -> None:
        """Takes blocks that `match` found."""
        for block in blocks:
            if self._references[block] == 0:
                del self._free[block]
            self._references[block] += 1

    def allocate(self, count: int) -> list[int]:
        """Takes fresh blocks, forgetting what they cached. Raises Internal when there are too few."""
        if count > len(self._free):
            raise Internal(f"{count} KV blocks wanted, {len(self._free)} free")
        taken = []
        for _ in range(count):
            block, _ = self._free.popitem(last=False)
            if digest := self._hash_of.pop(block, None):
                del self._block_of[digest]
            self._references[block] = 1
            taken.append(block)
        return taken

    def free(self, blocks: list[int]) -> None:
        """Gives a sequence's blocks back, in its order: the end of a prefix is forgotten before its beginning."""
        for block in reversed(blocks):
            self._references[block] -= 1
            if self._references[block] == 0:
                self._free[block] = None
                if block not in self._hash_of:
                    self._free.move_to_end(block, last=False)

    def remember(self, block: int, digest: bytes) -> None:
        """Makes a full, computed block findable, unless one with the same content is already."""
        if block not in self._hash_of and digest not in self._block_of:
            self._hash_of[block] = digest
            self._block_of[digest] = block

    def check_integrity(self, tables: list[list[int]]) -> None:
        """Raises Internal unless the references are exactly those of the given block tables and nothing is lost."""
        counts = [0] * self.num_blocks
        for table in tables:
            for block in table:
                counts[block] += 1
        if counts != self._references:
            wrong = [block for block in range(self.num_blocks) if counts[block] != self._references[block]]
            raise Internal(f"KV blocks {wrong[:10]} have other reference counts than the sequences that use them")
        if {block for block, count in enumerate(counts) if count == 0} != set(self._free):
            raise Internal("the list of free KV blocks is not the set of unused ones")
        if {digest: block for block, digest in self._hash_of.items()} != self._block_of:
            raise Internal("the KV prefix index and the blocks' hashes disagree")
