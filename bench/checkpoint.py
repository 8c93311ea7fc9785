"""How fast a checkpoint becomes an engine, beside a plain copy of its files with SHA-256 on the way: python bench/checkpoint.py

Both read files that are in the page cache. The copy reads, hashes and writes 8 MiB at a time; the build hashes what it reads,
maps it, writes it with two digests (of the file and of its chunks) and puts it into a directory store.
"""

import argparse
import hashlib
import json
import os
import platform
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import torch
from safetensors.torch import save_file

from builder_svc.build_config import BuildConfig
from builder_svc.pipeline import build
from engine.directory import DirectoryStore
from tests.conftest import save_tokenizer

ROOT = Path(__file__).parents[1]

LEAST = 0.6  # of the copy's speed


def make(directory: Path, gigabytes: float) -> None:
    """A LLaMA of random bfloat16 weights of about that size, in files of at most 1 GB."""
    hidden, inner, vocab = 2048, 8192, 32000
    layer = {
        "self_attn.q_proj": (hidden, hidden), "self_attn.k_proj": (512, hidden), "self_attn.v_proj": (512, hidden),
        "self_attn.o_proj": (hidden, hidden), "mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner), "input_layernorm": (hidden,), "post_attention_layernorm": (hidden,),
    }  # fmt: skip
    per_layer = 2 * sum(torch.Size(shape).numel() for shape in layer.values())
    layers = max(1, round((gigabytes * 1e9 - 4 * hidden * vocab) / per_layer))
    shapes = {"model.embed_tokens": (vocab, hidden), "model.norm": (hidden,), "lm_head": (vocab, hidden)}
    shapes |= {f"model.layers.{n}.{name}": shape for n in range(layers) for name, shape in layer.items()}
    noise = torch.randn(max(torch.Size(shape).numel() for shape in shapes.values()) + len(shapes), dtype=torch.bfloat16)
    groups: list[dict[str, torch.Tensor]] = [{}]
    where = {}
    for number, (name, shape) in enumerate(shapes.items()):  # each begins elsewhere: no two tensors are the same
        if sum(tensor.nbytes for tensor in groups[-1].values()) > 9e8:
            groups.append({})
        groups[-1][f"{name}.weight"] = noise[number : number + torch.Size(shape).numel()].view(shape).clone()
        where[f"{name}.weight"] = f"model-{len(groups):05d}.safetensors"
    directory.mkdir()
    for number, group in enumerate(groups, 1):
        save_file(group, directory / f"model-{number:05d}.safetensors")
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    config = {
        "architectures": ["LlamaForCausalLM"], "vocab_size": vocab, "hidden_size": hidden, "intermediate_size": inner,
        "num_hidden_layers": layers, "num_attention_heads": 32, "num_key_value_heads": 8, "rms_norm_eps": 1e-5,
        "max_position_embeddings": 4096, "dtype": "bfloat16",
    }  # fmt: skip
    (directory / "config.json").write_text(json.dumps(config))
    save_tokenizer(directory)


def copy(source: Path, target: Path) -> None:
    target.mkdir()
    for path in sorted(source.iterdir()):
        digest = hashlib.sha256()
        with path.open("rb", buffering=0) as read, (target / path.name).open("wb", buffering=0) as written:
            while data := read.read(8 << 20):
                digest.update(data)
                written.write(data)


def measured(work: Callable[[], object]) -> float:
    os.sync()  # what earlier work has left to be written is not this one's
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gigabytes", type=float, default=3.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--directory", type=Path, help="where 4 times as much room is; by default the system's")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="enginehouse-bench-", dir=arguments.directory) as directory:
        root = Path(directory)
        os.environ["XDG_CACHE_HOME"] = str(root / "cache")
        make(root / "checkpoint", arguments.gigabytes)
        size = sum(path.stat().st_size for path in (root / "checkpoint").iterdir())
        seconds: dict[str, list[float]] = {"copy": [], "build": []}
        for _ in range(arguments.rounds):
            seconds["copy"].append(measured(lambda: copy(root / "checkpoint", root / "copy")))
            shutil.rmtree(root / "copy")
            (root / "work").mkdir()
            seconds["build"].append(
                measured(
                    lambda: build(
                        root / "checkpoint",
                        BuildConfig(dtype="bfloat16"),
                        store=DirectoryStore(root / "store"),
                        work_dir=root / "work",
                    )
                )
            )
            for name in ("store", "work", "cache"):
                shutil.rmtree(root / name)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    ratio = medians["copy"] / medians["build"]
    print(
        f"{size / 1e9:.2f} GB: copy {medians['copy']:.1f} s, build {medians['build']:.1f} s: {ratio:.2f} of the copy's speed"
    )
    if arguments.out:
        commit = ["git", "describe", "--always", "--abbrev=40", "--dirty"]
        results = {
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "commit": subprocess.run(commit, cwd=ROOT, capture_output=True, text=True).stdout.strip(),
            "device": f"{platform.machine()}, {os.cpu_count()} cores",
            "bytes": size,
            "seconds": {name: [round(each, 2) for each in times] for name, times in seconds.items()},
            "ratio": round(ratio, 3),
        }
        arguments.out.write_text(json.dumps(results, indent=1) + "\n")
    if ratio < LEAST:
        raise SystemExit(f"less than {LEAST} of a plain copy with SHA-256")


if __name__ == "__main__":
    main()
