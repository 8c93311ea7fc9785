"""How long an engine of several ranks takes to start, beside one of one rank that is as large as the largest of them.

    python -m bench.start_ranks [--gigabytes 16] [--tp 2] [--pp 1] [--device cuda] [--dir DIR] [--out FILE.json]

From `python -m executor_svc` to the first token; none of the files is in the page cache. Held to: at most LATER seconds more.
"""

import argparse
import statistics
import tempfile
from pathlib import Path

from bench.checkpoint import make
from bench.serving import save
from bench.start import forget, start
from builder_svc.build_config import BuildConfig
from builder_svc.pipeline import build
from engine.directory import DirectoryStore
from engine.manifest import Manifest
from executor_svc.node import this_node

LATER = 3.0


def engine(root: Path, gigabytes: float, device: str, tp: int, pp: int) -> tuple[DirectoryStore, Manifest]:
    make(root / "checkpoint", gigabytes)
    options = BuildConfig(
        device=device,
        dtype="bfloat16",
        compute_capability=this_node(device).compute_capability,
        max_batch_size=64,
        max_seq_len=2048,
        tp_size=tp,
        pp_size=pp,
    )
    store = DirectoryStore(root / "store")
    return store, build(root / "checkpoint", options, store=store).manifest


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gigabytes", type=float, default=16, help="of the model's weights, about")
    parser.add_argument("--tp", type=int, default=2)
    parser.add_argument("--pp", type=int, default=1)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dir", type=Path, help="on the disk that is to be measured; by default the system's")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    ranks = arguments.tp * arguments.pp
    kinds = {"several": (arguments.gigabytes, arguments.tp, arguments.pp), "alone": (arguments.gigabytes / ranks, 1, 1)}
    found: dict[str, float] = {}
    bytes_of_rank: dict[str, int] = {}
    with tempfile.TemporaryDirectory(prefix="enginehouse-start-", dir=arguments.dir) as directory:
        root = Path(directory)
        for kind, (gigabytes, tp, pp) in kinds.items():
            (root / kind).mkdir()
            store, manifest = engine(root / kind, gigabytes, arguments.device, tp, pp)
            bytes_of_rank[kind] = max(sum(file.size for file in rank.weights) for rank in manifest.ranks)
            took = []
            for number in range(arguments.rounds):
                cache = root / f"{kind}-{number}"
                cache.mkdir()
                forget(root)
                took.append(start(store, manifest, arguments.device, True, cache)["start_s"])
            found[kind] = statistics.median(took)
    later = found["several"] - found["alone"]
    print(f"{ranks} ranks of up to {bytes_of_rank['several'] / 1e9:.2f} GB: first token after {found['several']:.2f} s")
    print(
        f"one rank of {bytes_of_rank['alone'] / 1e9:.2f} GB alone: {found['alone']:.2f} s; {later:+.2f} s, held to {LATER}"
    )
    facts = {"tp": arguments.tp, "pp": arguments.pp, "bytes_of_the_largest_rank": bytes_of_rank, "start_s": found}
    save(arguments.out, facts)
    if later > LATER:
        raise SystemExit(f"an engine of {ranks} ranks starts {later:.1f} s later than one rank alone")


if __name__ == "__main__":
    main()
