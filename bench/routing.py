"""Routing on simulated time: what choosing an executor by prefix and load gives, against chance and against the least loaded.

python -m bench.routing [--out FILE.json]; status 1 if a bound does not hold. It takes a minute, and the same numbers come out on
every machine (`bench/simulated.py` says what is real and what is not).
"""

import argparse
import json
import random
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from bench.simulated import KV_BLOCKS, Result, World
from gateway.routing import NearBest, Policy, View

LEAST_THROUGHPUT, MOST_FIRST_TOKEN, MOST_WORSE = 1.5, 0.5, 1.05


def ours(chance: random.Random) -> Policy:
    return Policy(pick=NearBest(chance))


def by_chance(chance: random.Random) -> Policy:
    return Policy(scores=(), pick=lambda totals, _views: chance.randrange(len(totals)))


def least_loaded(_chance: random.Random) -> Policy:
    """The fewest requests, then the fewest queued tokens, then the first."""

    def pick(_totals: Sequence[float], views: Sequence[View]) -> int:
        return min(range(len(views)), key=lambda place: (views[place].requests, views[place].queued_tokens))

    return Policy(scores=(), pick=pick)


def conversations(
    policy: Callable[[random.Random], Policy],
    seed: int = 0,
    gateways: int = 1,
    kv_blocks: int = KV_BLOCKS,
    roam: bool = False,
    count: int = 64,
    turns: int = 8,
) -> Result:
    """Each begins with a text of its own, and adds to it; nobody thinks."""
    world = World(policy, gateways=gateways, seed=seed, kv_blocks=kv_blocks)
    for _ in range(count):
        lengths = [(world.draw.randrange(400, 800), world.draw.randrange(50, 150)) for _ in range(turns)]
        first = world.draw.randrange(1000, 3000)
        world.add(world.draw.random(), [(first, lengths[0][1]), *lengths[1:]], conversation=True, roams=roam)
    return world.run()


def strangers(
    policy: Callable[[random.Random], Policy],
    seed: int = 0,
    gateways: int = 1,
    count: int = 600,
    rate: float | None = None,
) -> Result:
    """Prompts that have nothing in common, of all lengths: `rate` a second, or always 64 at a time."""
    world, at = World(policy, gateways=gateways, seed=seed), 0.0
    lengths = [
        (int(world.draw.lognormvariate(6.0, 1.0)) + 16, int(world.draw.lognormvariate(4.5, 0.8)) + 1)
        for _ in range(count)
    ]
    if rate:
        for turn in lengths:
            at += world.draw.expovariate(rate)
            world.add(at, [turn], conversation=False)
    else:
        for _ in range(64):
            world.add(world.draw.random(), lengths, conversation=False)
    return world.run()


TALKS: dict[str, dict[str, Any]] = {
    "one gateway": {},
    "8 gateways": {"gateways": 8},
    "8 gateways, any for each turn": {"gateways": 8, "roam": True},
    "caches of a quarter of it all": {"kv_blocks": 5_000},
}
LOADS: dict[str, dict[str, Any]] = {
    "64 at a time": {},
    "20 a second": {"rate": 20.0},
    "60 a second": {"rate": 60.0},
    "100 a second": {"rate": 100.0},
    "8 gateways, 64 at a time": {"gateways": 8},
    "8 gateways, 60 a second": {"gateways": 8, "rate": 60.0},
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    seeds, found, failed = range(arguments.seeds), dict[str, float](), False
    for name, more in TALKS.items():
        pairs = [(conversations(ours, seed, **more), conversations(by_chance, seed, **more)) for seed in seeds]
        throughput = [a.throughput / b.throughput for a, b in pairs]
        first_token = [a.first_token / b.first_token for a, b in pairs]
        print(
            f"64 conversations x 8 turns, {name}: throughput x {min(throughput):.2f} of chance "
            f"({statistics.fmean(a.throughput for a, _ in pairs):.0f} tokens/s), first token x {max(first_token):.2f} "
            f"({1000 * statistics.fmean(a.first_token for a, _ in pairs):.0f} ms), "
            f"computed x {pairs[0][0].computed / pairs[0][1].computed:.2f}"
        )
        if not more:
            failed |= min(throughput) < LEAST_THROUGHPUT or max(first_token) > MOST_FIRST_TOKEN
        found |= {f"{name}: throughput": min(throughput), f"{name}: first token": max(first_token)}
    for name, more in LOADS.items():
        pairs = [(strangers(ours, seed, **more), strangers(least_loaded, seed, **more)) for seed in seeds]
        slower = max(b.throughput / a.throughput for a, b in pairs)
        first_token = sum(a.first_token for a, _ in pairs) / sum(b.first_token for _, b in pairs)
        print(
            f"without shared prefixes, {name}: least-loaded's throughput at most x {slower:.3f} of ours, "
            f"first token x {first_token:.3f} of its ({1000 * statistics.fmean(a.first_token for a, _ in pairs):.1f} ms)"
        )
        failed |= slower > MOST_WORSE or first_token > MOST_WORSE
        found |= {f"{name}: slower": slower, f"{name}: first token": first_token}
    if arguments.out:
        arguments.out.write_text(json.dumps({key: round(value, 4) for key, value in found.items()}, indent=1) + "\n")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
