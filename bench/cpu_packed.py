"""Tokens a second of packed weights on this machine's CPU, beside the same model's in float32 and bfloat16.

    python -m bench.cpu_packed [--model bench/models/qwen2.5-0.5b] [--repeats 3] [--tokens 64] [--only FORM ...] [--gguf FILE]
        [--out FILE.json]

Dummy weights: speeds do not depend on their values. Decode is of one request and of 8 at once, greedy, behind prompts of 32;
prefill is of 512 tokens. Activations are float32, but of bfloat16's form. Packed forms have the head in 8 bits, as Q4_K_M files
have it in 6 to 8. MB are those that a token reads. All run by turns in one process, whose threads wait as a worker's do, and
medians are compared; with --gguf llama.cpp is beside them (`pip install llama-cpp-python`), one request at a time. The exit
status is 1 where a bound does not hold: int4 decodes at least twice as fast as float32, and no packed form is slower than it.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec

from bench.cpu import LlamaCpp, prompts
from bench.serving import build_dummy, save
from engine.directory import DirectoryStore
from engine.program import Program
from executor_svc.core import Sampling, Sequence
from executor_svc.kernels import prepare, unpack
from executor_svc.launch import THREADS
from executor_svc.loader import load_engine
from executor_svc.node import this_node
from tests.running import Engine

INT8 = {"num_bits": 8, "strategy": "channel"}
BOUNDS = {"int4 g128": 2.0, "int4 g32": 2.0}  # decode of one request, times that of float32
PREFILL = 0.95  # of float32's, with what two runs differ by


@dataclass(frozen=True)
class Form:
    """A form of the weights: what compressed-tensors says of them, None for dense; and whether activations are rounded, too."""

    weights: dict[str, Any] | None
    dtype: str = "float32"
    rounds: bool = False


FORMS = {
    "float32": Form(None),
    "bfloat16": Form(None, "bfloat16"),
    "int8": Form(INT8),
    "int8, activations too": Form(INT8, rounds=True),
    "int4 g128": Form({"num_bits": 4, "strategy": "group", "group_size": 128}),
    "int4 g32": Form({"num_bits": 4, "strategy": "group", "group_size": 32}),
}


def config_of(model: Path, weights: dict[str, Any] | None) -> dict[str, Any]:
    """The model's config, its layers in that form and its head in 8 bits."""
    config: dict[str, Any] = json.loads((model / "config.json").read_text())
    if weights is None:
        return config
    settled = {"type": "int", "symmetric": True, "dynamic": False}
    groups = [(weights, ["re:.*self_attn.*", "re:.*mlp.*"]), (INT8, ["lm_head"])]
    quantization = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "ignore": [],
        "config_groups": {
            f"group_{number}": {"targets": targets, "weights": {**settled, **form}, "input_activations": None}
            for number, (form, targets) in enumerate(groups)
        },
    }
    return config | {"tie_word_embeddings": False, "quantization_config": quantization}


def rounding(program: Program) -> Program:
    """With products of int8 that round their input by token."""
    ops = [
        msgspec.structs.replace(op, attrs={"per_token": True}) if op.op == "linear_int8" else op for op in program.ops
    ]
    return msgspec.structs.replace(program, ops=tuple(ops), opset_version=5)


class Contestant:
    """An engine of dummy weights, in this process."""

    def __init__(self, model: Path, form: Form, place: Path) -> None:
        place.mkdir()
        (place / "config.json").write_text(json.dumps(config_of(model, form.weights)))
        engine_id = build_dummy(place, place / "store", device="cpu", dtype=form.dtype, max_seq_len=1024)
        loaded = load_engine(DirectoryStore(place / "store"), engine_id, this_node("cpu"))
        program, weights = unpack("cpu", rounding(loaded.program) if form.rounds else loaded.program, loaded.weights)
        self.bytes = sum(weight.nbytes for weight in weights.values())
        if "lm_head.weight" in weights:  # of the embedding, a token reads a row
            self.bytes -= weights["embedding"].nbytes
        prepared = prepare("cpu", program, weights)
        self._engine = Engine(replace(loaded, program=program, weights=prepared), kv_blocks=512)
        self._serial = 0

    def seconds(self, count: int, prompt: int, tokens: int) -> float:
        """That so many requests take."""
        work = []
        for _ in range(count):
            self._serial += 1
            ids = [(1000 + 64 * self._serial + 7 * at) % 150000 for at in range(prompt)]
            work.append(Sequence(0, self._serial, ids, prompt, tokens, Sampling(0.0)))
        began = time.perf_counter()
        self._engine.run(work)
        return time.perf_counter() - began


class LlamaCppContestant:
    """llama.cpp with a GGUF file of the same model; 8 requests one after another."""

    def __init__(self, file: Path) -> None:
        self._model, self.bytes, self._serial = LlamaCpp(file), file.stat().st_size, 0

    def seconds(self, count: int, prompt: int, tokens: int) -> float:
        """That so many requests take."""
        self._serial += 1
        ids = prompts(count, prompt, self._serial)
        began = time.perf_counter()
        self._model.generate(ids, tokens)
        return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path("bench/models/qwen2.5-0.5b"))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--only", nargs="+", choices=list(FORMS), default=list(FORMS))
    parser.add_argument("--gguf", type=Path)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    if not THREADS.items() <= os.environ.items():  # read when torch is loaded, which it is by now
        os.execve(sys.executable, [sys.executable, "-m", "bench.cpu_packed", *sys.argv[1:]], {**os.environ, **THREADS})
    tokens = arguments.tokens
    with tempfile.TemporaryDirectory() as directory:
        made: dict[str, Contestant | LlamaCppContestant] = {
            name: Contestant(arguments.model, FORMS[name], Path(directory) / str(number))
            for number, name in enumerate(arguments.only)
        }
        if arguments.gguf:
            made[f"llama.cpp, {arguments.gguf.stem[-6:]}"] = LlamaCppContestant(arguments.gguf)
        measured: dict[str, dict[str, list[float]]] = {
            name: {kind: [] for kind in ("alone", "8 at once", "prefill")} for name in made
        }
        for turn in range(arguments.repeats + 1):
            for name, contestant in made.items():
                speeds = {
                    "alone": tokens / contestant.seconds(1, 32, tokens),
                    "8 at once": 8 * tokens / contestant.seconds(8, 32, tokens),
                    "prefill": 512 / contestant.seconds(1, 512, 1),
                }
                for kind, speed in speeds.items() if turn else ():  # the first time is to get warm
                    measured[name][kind].append(speed)
        sizes = {name: contestant.bytes for name, contestant in made.items()}
    medians = {
        name: {kind: round(statistics.median(speeds), 1) for kind, speeds in kinds.items()}
        for name, kinds in measured.items()
    }
    print(f"{'tokens/s':24}{'MB':>7}{'alone':>9}{'8 at once':>11}{'prefill':>9}{'GB/s alone':>12}")
    for name, found in medians.items():
        read = found["alone"] * sizes[name] / 1e9
        print(
            f"{name:24}{sizes[name] / 1e6:7.0f}{found['alone']:9.1f}{found['8 at once']:11.1f}{found['prefill']:9.1f}{read:12.1f}"
        )
    save(
        arguments.out,
        {"tokens_per_second": medians, "megabytes": {name: size // 10**6 for name, size in sizes.items()}},
    )
    failed = []
    for name, found in medians.items():
        whole = medians.get("float32")
        if whole and name in FORMS and found["alone"] < BOUNDS.get(name, 1.0) * whole["alone"]:
            failed.append(f"{name} decodes {found['alone'] / whole['alone']:.2f} times as fast as float32")
        if whole and name in FORMS and FORMS[name].weights and found["prefill"] < PREFILL * whole["prefill"]:
            failed.append(f"{name} takes {whole['prefill'] / found['prefill']:.2f} times as long to the first token")
    print("\n".join(failed) or "all bounds hold")
    raise SystemExit(bool(failed))


if __name__ == "__main__":
    main()
