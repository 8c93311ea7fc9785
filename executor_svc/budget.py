"""Whether an engine fits beside those that are there, and how much of the memory its KV cache takes. Pure Python."""

import contextlib
import os
from dataclasses import dataclass
from pathlib import Path

from engine.errors import ResourceExhausted
from engine.manifest import Limits, Manifest
from engine.program import Program

BLOCK_SIZE = 16  # tokens of a KV block
UNKNOWN = 1 << 62  # bytes, where only others know how much is free
_UNITS = ((10**12, "TB"), (10**9, "GB"), (10**6, "MB"), (10**3, "kB"))


@dataclass(frozen=True)
class Budget:
    """What an engine, or a rank of one, may take of its device's memory, before anything of it is there.

    Attributes:
        device: "cpu", whose ranks share one memory, or "cuda", where each rank has its own.
        free: bytes that nobody uses.
        limit: bytes of weights and KV cache that the executor has left for it; None where it has no limit.
    """

    device: str
    free: int
    limit: int | None = None

    def check(self, manifest: Manifest, rank: int, kv_memory: int | None) -> None:
        """Before a file of the engine is read. Weights that are made at random are not counted.

        Args:
            kv_memory: bytes of KV cache that a rank is to have; None for what is left, which must do for one sequence.

        Raises:
            ResourceExhausted: it does not fit; the message says what it needs and what there is.
        """
        ranks = len(manifest.ranks)
        weights = [sum(file.size for file in (*found.weights, *found.native)) for found in manifest.ranks]
        need = sum(weights) if self.device == "cpu" else weights[rank]
        least = -(-manifest.limits.max_seq_len // BLOCK_SIZE) * BLOCK_SIZE * manifest.model.kv_bytes_per_token
        together = ranks if self.device == "cpu" else 1
        cache = least * together // ranks if kv_memory is None else kv_memory * together
        what, left = f"the free {'main' if self.device == 'cpu' else 'GPU'} memory", self.free
        if self.limit is not None and self.limit < self.free:
            what, left = "what --memory leaves", self.limit
        if need + cache > left:
            kind = (
                f"for one sequence of {manifest.limits.max_seq_len} tokens" if kv_memory is None else "as was asked for"
            )
            raise ResourceExhausted(
                f"engine {manifest.engine_id[:12]} needs {size(need + cache)} ({size(need)} of weights, {size(cache)} of KV "
                f"cache {kind}), and {what} is {size(left)}",
                reason="MEMORY_TOO_SMALL",
                metadata={"needed_bytes": str(need + cache), "free_bytes": str(left)},
            )

    def kv_memory(self, program: Program, limits: Limits, weights: int, share: float) -> int:
        """Bytes of KV cache of a rank: what all sequences need, at most a share of what weights leave.

        Args:
            weights: bytes of all ranks that share the memory.
            share: in (0, 1], that this rank has of the rest.
        """
        block = BLOCK_SIZE * sum(cache.bytes_per_token for cache in program.caches)
        most = limits.max_batch_size * -(-limits.max_seq_len // BLOCK_SIZE) * block
        left = self.free if self.limit is None else min(self.limit, self.free)
        return min(most, int(share * max(0, left - weights)))


def size(count: int) -> str:
    """Bytes, for people."""
    for unit, name in _UNITS:
        if count >= unit:
            return f"{count / unit:.3g} {name}"
    return f"{count} B"


def available() -> int:
    """Bytes that this process can have without swapping, and without being ended by the limit of its control group."""
    try:
        with open("/proc/meminfo") as file:
            found = next(line for line in file if line.startswith("MemAvailable:"))
        machine = int(found.split()[1]) * 1024
    except (OSError, StopIteration):
        machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    return min(machine, *(_left(group) for group in _groups()), machine)


def _groups() -> list[Path]:
    """The control groups whose limits this process has, its own first: of version 2, or of version 1's memory controller."""
    found = []
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers in ("", "memory"):
                root = Path("/sys/fs/cgroup", controllers)
                own = root / path.lstrip("/")
                found += [group for group in (own, *own.parents) if group.is_relative_to(root)]
    return found


def _left(group: Path) -> float:
    """Bytes between a control group's limit and what it uses, files that can be read again excepted; infinite without a limit."""
    for limit, usage in (("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes")):
        try:
            most, used = (group / limit).read_text().strip(), int((group / usage).read_text())
            cached = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        except (OSError, ValueError):
            continue
        if most != "max":
            return max(0, int(most) - used + int(cached.get("total_inactive_file", cached.get("inactive_file", 0))))
    return float("inf")
