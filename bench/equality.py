"""Greedy decoding in float32 against transformers, token for token, on a real checkpoint.

python bench/equality.py CHECKPOINT, a directory or a .gguf file: 64 tokens of each prompt alone, among 32 requests of mixed
lengths, with and without prefix-cache hits, and across forced preemption; and one seed in every one of these situations.
Prints what was equal; the exit status is 1 if anything was not.
"""

import argparse
import tempfile
import time
from pathlib import Path

import torch
import transformers

from executor_svc.core import Sampling, Sequence
from tests.running import Engine, make_engine

LENGTH, AT_ONCE = 64, 32
PROMPTS = [
    "def fibonacci(n):",
    "Write a Python function that reverses a linked list.",
    "The quick brown fox",
    "import numpy as np\n\n\ndef softmax(x: np.ndarray) -> np.ndarray:\n    ",
    "# A class for a bank account with deposit and withdraw\nclass Account:",
    "SELECT name, count(*) FROM orders",
    "Explain what a hash table is, in three sentences. " * 6,
    "你好，请用一句话介绍你自己。",
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    checkpoint = parser.parse_args().checkpoint
    is_gguf = checkpoint.is_file()
    place, options = (checkpoint.parent, {"gguf_file": checkpoint.name}) if is_gguf else (checkpoint, {})
    tokenizer = transformers.AutoTokenizer.from_pretrained(place, **options)
    prompts = [tokenizer(prompt).input_ids for prompt in PROMPTS]
    model = transformers.AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32, **options).eval()
    settings = {
        "max_new_tokens": LENGTH,
        "do_sample": False,
        "eos_token_id": None,
        "pad_token_id": 0,
        "repetition_penalty": 1.0,
    }
    began = time.monotonic()
    greedy = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        greedy.append(model.generate(ids, attention_mask=torch.ones_like(ids), **settings)[0].tolist()[len(prompt) :])
    print(f"transformers: {len(prompts) * LENGTH / (time.monotonic() - began):.1f} tokens/s, one after another")
    del model

    failed = False

    def requests(count: int, sampling: Sampling) -> list[Sequence]:
        chosen = [prompts[row % len(prompts)] for row in range(count)]
        return [Sequence(0, row, list(prompt), len(prompt), LENGTH, sampling) for row, prompt in enumerate(chosen)]

    def texts(run: list[Sequence]) -> list[list[int]]:
        return [sequence.token_ids[sequence.prompt_len :] for sequence in run]

    def compare(name: str, engine: Engine, run: list[Sequence], wanted: list[list[int]]) -> None:
        began, before = time.monotonic(), engine.scheduler.num_preemptions
        engine.run(run)
        seconds, cached = time.monotonic() - began, sum(sequence.num_cached or 0 for sequence in run)
        nonlocal failed
        equal = sum(text == wanted[row % len(wanted)] for row, text in enumerate(texts(run)))
        failed |= equal < len(run)
        preempted = engine.scheduler.num_preemptions - before
        print(
            f"{name}: {equal} of {len(run)} equal, {len(run) * LENGTH / seconds:.1f} tokens/s, "
            f"{cached} prompt tokens cached, {preempted} preemptions",
            flush=True,
        )

    with tempfile.TemporaryDirectory() as store:
        loaded = make_engine(checkpoint, Path(store), dtype="float32", max_seq_len=512, max_num_tokens=256)
        print("alone, greedy")
        for row, prompt in enumerate(prompts):
            alone = Sequence(0, 0, list(prompt), len(prompt), LENGTH, Sampling(0.0))
            compare(f"  prompt {row}", Engine(loaded), [alone], [greedy[row]])
        engine = Engine(loaded)
        compare("32 at once, greedy", engine, requests(AT_ONCE, Sampling(0.0)), greedy)
        compare("the same again, prefixes cached", engine, requests(AT_ONCE, Sampling(0.0)), greedy)
        tight = Engine(loaded, kv_blocks=48)
        compare("with a cache of 48 blocks", tight, requests(AT_ONCE, Sampling(0.0)), greedy)
        sampling = Sampling(0.8, top_k=20, top_p=0.95, seed=11)
        first = requests(len(prompts), sampling)
        Engine(loaded).run(first)
        compare("one seed, 32 at once", engine, requests(AT_ONCE, sampling), texts(first))
        compare("one seed, 48 blocks", tight, requests(AT_ONCE, sampling), texts(first))
    raise SystemExit(failed)


if __name__ == "__main__":
    main()
