"""Quantization: a checkpoint becomes a quantized one by AWQ, that an engine, and the engine tokens."""

import argparse
from pathlib import Path

from transformers import AutoTokenizer

from enginehouse import (
    BuildConfig,
    GenerationExecutor,
    LLaMAForCausalLM,
    QuantAlgo,
    QuantConfig,
    SamplingParams,
    build,
)

PROMPTS = ["In the beginning God created the", "And it came to pass, that", "A hacker is someone who"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--hf_model_dir", type=Path, required=True, help="a LLaMA model in Hugging Face layout")
    parser.add_argument(
        "--cache_dir", type=Path, required=True, help="where the quantized checkpoint goes, or is from an earlier run"
    )
    parser.add_argument("--quant_algo", default=QuantAlgo.W4A16_AWQ, choices=list(QuantAlgo))
    parser.add_argument(
        "--calib_batches", type=int, default=128, help="sequences of the text that it is calibrated with"
    )
    parser.add_argument("--max_tokens", type=int, default=24)
    arguments = parser.parse_args()
    checkpoint = arguments.cache_dir / "checkpoint"
    if not (checkpoint / "config.json").exists():
        LLaMAForCausalLM.quantize(
            arguments.hf_model_dir,
            checkpoint,
            quant_config=QuantConfig(quant_algo=QuantAlgo(arguments.quant_algo)),
            calib_batches=arguments.calib_batches,
        )
    model = LLaMAForCausalLM.from_checkpoint(checkpoint)
    engine = build(model, BuildConfig(max_batch_size=8, max_seq_len=256))
    tokenizer = AutoTokenizer.from_pretrained(arguments.hf_model_dir)
    with GenerationExecutor.create(engine) as executor:
        params = SamplingParams(max_tokens=arguments.max_tokens, end_id=tokenizer.eos_token_id)
        prompts: list[list[int]] = [tokenizer.encode(prompt) for prompt in PROMPTS]
        for prompt, output in zip(PROMPTS, executor.generate(prompts, params), strict=True):
            print(f"{prompt!r} -> {tokenizer.decode(output.outputs[0].token_ids)!r}")


if __name__ == "__main__":
    main()
