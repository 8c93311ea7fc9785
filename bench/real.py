"""A real model: how fast it generates through `LLM`, and what it answers.

    python -m bench.real MODEL [--device cuda] [--dtype bfloat16] [--batches 1 8 64] [--tokens 256] [--out FILE.json]

MODEL is a checkpoint: a GGUF file or a directory. An engine is built of it in a store that is thrown away; then prompts of 128
random token ids at several batch sizes (tokens/s, medians of three; end-of-sequence ids do not count), and five fixed questions
through the chat template, greedy.
"""

import argparse
import random
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from bench.serving import save
from enginehouse import LLM, BuildConfig, SamplingParams

QUESTIONS = (
    "Write a Python function fibonacci(n) that returns the n-th Fibonacci number, without recursion. Only the code.",
    "What does this print, and why? `print([i * i for i in range(5) if i % 2])`",
    "Write a SQL query that gives the three customers with the largest sum of orders.amount.",
    "Find the bug: `def mean(xs): return sum(xs) / len(xs) if xs else xs`. Answer in two sentences.",
    "Write a Rust function that reverses the words of a sentence.",
)
PROMPT = 128


def rate(llm: LLM, batch: int, tokens: int, rounds: int) -> float:
    """Generated tokens a second, of `batch` requests at once; each round has other prompts."""
    params, times = SamplingParams(max_tokens=tokens, ignore_eos=True, temperature=0.0), []
    for number in range(rounds + 1):  # the first warms up
        draw = random.Random(1000 * batch + number)
        prompts = [[draw.randrange(1000, 20_000) for _ in range(PROMPT)] for _ in range(batch)]
        began = time.perf_counter()
        outputs = llm.generate(prompts, params, use_tqdm=False)
        times.append(time.perf_counter() - began)
        if any(len(output.outputs[0].token_ids) != tokens for output in outputs):
            raise SystemExit("a request has not got all its tokens")
    return batch * tokens / statistics.median(times[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    config = BuildConfig(max_batch_size=max(arguments.batches), max_seq_len=2048)
    found: dict[str, Any] = {"model": Path(arguments.model).name}
    began = time.perf_counter()
    with (
        tempfile.TemporaryDirectory() as store,
        LLM(
            arguments.model, build_config=config, dtype=arguments.dtype, device=arguments.device, store=store, enable_tqdm=False
        ) as llm,
    ):  # fmt: skip
        if llm.engine is None:
            raise SystemExit("the engine is another machine's")
        size = sum(file.size for file in llm.engine.manifest.ranks[0].weights)
        found |= {
            "built_and_loaded_s": round(time.perf_counter() - began, 1),
            "dtype": llm.engine.manifest.model.dtype,
            "weights_gb": round(size / 1e9, 3),
        }
        for batch in arguments.batches:
            found[f"tokens_per_s_b{batch}"] = round(rate(llm, batch, arguments.tokens, arguments.rounds), 1)
        for name, value in found.items():
            print(f"{name:24}{value}", flush=True)
        conversations = [[{"role": "user", "content": question}] for question in QUESTIONS]
        answers = llm.generate(conversations, SamplingParams(max_tokens=200, temperature=0.0), use_tqdm=False)
    found["answers"] = [
        {"question": question, "answer": output.outputs[0].text, "tokens": len(output.outputs[0].token_ids)}
        for question, output in zip(QUESTIONS, answers, strict=True)
    ]
    for pair in found["answers"]:
        print(f"\n> {pair['question']}\n{pair['answer']}")
    save(arguments.out, found)


if __name__ == "__main__":
    main()
