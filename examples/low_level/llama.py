"""The low-level workflow: a checkpoint becomes a model, the model an engine, and the engine tokens."""

import argparse
from pathlib import Path

from transformers import AutoTokenizer

from enginehouse import BuildConfig, Engine, GenerationExecutor, LLaMAForCausalLM, SamplingParams, build

PROMPTS = ["In the beginning God created the", "And it came to pass, that", "A hacker is someone who"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--hf_model_dir", type=Path, required=True, help="a LLaMA model in Hugging Face layout")
    parser.add_argument(
        "--engine_dir", type=Path, required=True, help="where the engine goes, or is from an earlier run"
    )
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--max_tokens", type=int, default=24)
    arguments = parser.parse_args()
    if not arguments.engine_dir.exists():
        model = LLaMAForCausalLM.from_hugging_face(arguments.hf_model_dir, dtype=arguments.dtype)
        engine = build(model, BuildConfig(max_batch_size=8, max_seq_len=256))
        engine.save(arguments.engine_dir)
    engine = Engine.from_dir(arguments.engine_dir)
    tokenizer = AutoTokenizer.from_pretrained(arguments.hf_model_dir)
    with GenerationExecutor.create(engine) as executor:
        params = SamplingParams(max_tokens=arguments.max_tokens, end_id=tokenizer.eos_token_id)
        prompts: list[list[int]] = [tokenizer.encode(prompt) for prompt in PROMPTS]
        for prompt, output in zip(PROMPTS, executor.generate(prompts, params), strict=True):
            print(f"{prompt!r} -> {tokenizer.decode(output.outputs[0].token_ids)!r}")


if __name__ == "__main__":
    main()
