"""What `LLM` can do, a task each: python llm_examples.py --task run_llm_generate --prompt P --hf_model_dir D."""

import argparse
import asyncio
import inspect
import tempfile
from collections.abc import Callable

from enginehouse import LLM, CalibConfig, KvCacheConfig, QuantAlgo, QuantConfig, SamplingParams

TASKS: dict[str, Callable[..., None]] = {}


def task(function: Callable[..., None]) -> Callable[..., None]:
    TASKS[function.__name__] = function
    return function


@task
def run_llm_generate(prompt: str, hf_model_dir: str) -> None:
    """Builds an engine if there is none of this model, and completes prompts."""
    with LLM(hf_model_dir) as llm:
        for output in llm.generate([prompt, prompt.upper()]):
            print(output.prompt, "->", output.outputs[0].text)


@task
def run_llm_generate_async_example(prompt: str, hf_model_dir: str) -> None:
    """Tokens as they come, in an event loop."""

    async def stream(llm: LLM) -> None:
        async for output in llm.generate_async(prompt, SamplingParams(max_tokens=24), streaming=True):
            print(output.outputs[0].text_diff, end="", flush=True)
        print()
        output = await llm.generate_async(prompt)
        print(output.outputs[0].text)

    with LLM(hf_model_dir) as llm:
        asyncio.run(stream(llm))


@task
def run_llm_save_and_load(prompt: str, hf_model_dir: str) -> None:
    """An engine directory can be copied, and is loaded without a build."""
    with tempfile.TemporaryDirectory() as engine_dir:
        with LLM(hf_model_dir) as llm:
            llm.save(engine_dir)
        with LLM(engine_dir) as llm:
            print(llm.generate(prompt).outputs[0].text)


@task
def run_llm_with_custom_tokenizer(prompt: str, hf_model_dir: str) -> None:
    """Any object with encode and decode will do."""
    from transformers import AutoTokenizer

    with LLM(hf_model_dir, tokenizer=AutoTokenizer.from_pretrained(hf_model_dir)) as llm:
        print(llm.generate(prompt).outputs[0].text)


@task
def run_llm_without_tokenizer(hf_model_dir: str) -> None:
    """Token ids in, token ids out."""
    with LLM(hf_model_dir, skip_tokenizer_init=True) as llm:
        print(llm.generate([32, 12]).outputs[0].token_ids)


@task
def run_llm_with_sampling(prompt: str, hf_model_dir: str) -> None:
    """Two samples, with the model's log-probabilities; the most probable text by beam search."""
    with LLM(hf_model_dir) as llm:
        params = SamplingParams(temperature=0.8, top_p=0.95, seed=7, n=2, logprobs=1, max_tokens=16, stop=["."])
        for completion in llm.generate(prompt, params).outputs:
            print(f"{completion.cumulative_logprob:.2f}", completion.text, completion.finish_reason)
        print(llm.generate(prompt, SamplingParams(beam_width=4, max_tokens=16)).outputs[0].text)


@task
def run_llm_with_kv_cache_config(prompt: str, hf_model_dir: str) -> None:
    """Memory for 4096 tokens of all sequences together."""
    with LLM(hf_model_dir, kv_cache_config=KvCacheConfig(max_tokens=4096)) as llm:
        print(llm.generate(prompt).outputs[0].text)
        print(llm.get_stats())


@task
def run_llm_with_quantization(prompt: str, hf_model_dir: str, quant_type: str) -> None:
    """Weights of 4 bits by AWQ, or of 8 in floating point, calibrated with the text that is bundled."""
    if quant_type == "int4_awq":
        quant_config = QuantConfig(quant_algo=QuantAlgo.W4A16_AWQ, group_size=128)
    else:
        quant_config = QuantConfig(quant_algo=QuantAlgo.FP8, kv_cache_quant_algo=QuantAlgo.FP8)
    calib_config = CalibConfig(calib_batches=32)  # sequences; more of them see more of what activations can be
    with LLM(hf_model_dir, quant_config=quant_config, calib_config=calib_config) as llm:
        print(llm.generate(prompt).outputs[0].text)


@task
def run_llm_on_tensor_parallel(prompt: str, hf_model_dir: str, tp_size: int) -> None:
    """Each layer divided among several GPUs; on the CPU, among processes."""
    with LLM(hf_model_dir, tensor_parallel_size=tp_size) as llm:
        print(llm.generate(prompt).outputs[0].text)


@task
def run_llm_connected(prompt: str, gateway: str, model: str) -> None:
    """The same over a running cluster: enginehouse up demo=examples/demo-model."""
    with LLM.connect(gateway, model) as llm:
        print(llm.generate(prompt).outputs[0].text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--task", choices=TASKS, required=True)
    parser.add_argument("--prompt", default="In the beginning God created the")
    parser.add_argument("--hf_model_dir", help="a model in Hugging Face layout, or of the hub")
    parser.add_argument("--quant_type", choices=("int4_awq", "fp8"), default="int4_awq")
    parser.add_argument("--tp_size", type=int, default=2, help="GPUs of run_llm_on_tensor_parallel")
    parser.add_argument("--gateway", default="127.0.0.1:8400")
    parser.add_argument("--model", default="demo")
    arguments = vars(parser.parse_args())
    run = TASKS[arguments["task"]]
    names = inspect.signature(run).parameters
    if "hf_model_dir" in names and arguments["hf_model_dir"] is None:
        parser.error("--hf_model_dir is needed")
    run(**{name: arguments[name] for name in names})


if __name__ == "__main__":
    main()
