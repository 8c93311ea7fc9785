"""The low-level workflow over several GPUs of a machine; on the CPU they are processes. Each rank has its part of the model."""

import argparse
from pathlib import Path

from transformers import AutoTokenizer

from enginehouse import BuildConfig, Engine, GenerationExecutor, LLaMAForCausalLM, Mapping, SamplingParams, build

PROMPTS = ["In the beginning God created the", "And it came to pass, that", "A hacker is someone who"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--hf_model_dir", type=Path, required=True, help="a LLaMA model in Hugging Face layout")
    parser.add_argument(
        "--engine_dir", type=Path, required=True, help="where the engine goes, or is from an earlier run"
    )
    parser.add_argument("--tp_size", type=int, default=2, help="ranks that each layer is divided among")
    parser.add_argument("--pp_size", type=int, default=1, help="groups of ranks that the layers are divided among")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--max_tokens", type=int, default=24)
    arguments = parser.parse_args()
    world_size = arguments.tp_size * arguments.pp_size
    if not arguments.engine_dir.exists():
        mapping = Mapping(world_size=world_size, rank=0, tp_size=arguments.tp_size, pp_size=arguments.pp_size)
        model = LLaMAForCausalLM.from_hugging_face(arguments.hf_model_dir, dtype=arguments.dtype, mapping=mapping)
        engine = build(model, BuildConfig(max_batch_size=8, max_seq_len=256))  # of all ranks
        engine.save(arguments.engine_dir)
    engine = Engine.from_dir(arguments.engine_dir)
    tokenizer = AutoTokenizer.from_pretrained(arguments.hf_model_dir)
    with GenerationExecutor.create(engine, model_world_size=world_size) as executor:  # which starts a process a rank
        params = SamplingParams(max_tokens=arguments.max_tokens, end_id=tokenizer.eos_token_id)
        prompts: list[list[int]] = [tokenizer.encode(prompt) for prompt in PROMPTS]
        for prompt, output in zip(PROMPTS, executor.generate(prompts, params), strict=True):
            print(f"{prompt!r} -> {tokenizer.decode(output.outputs[0].token_ids)!r}")


if __name__ == "__main__":
    main()
