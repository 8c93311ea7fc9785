"""The scripts in examples/, as they are called, and each snippet of the documents that the API comes from, with our import."""

import asyncio
import json
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from enginehouse import (
    AutoConfig,
    AutoModelForCausalLM,
    BuildConfig,
    GenerationExecutor,
    Home,
    Mapping,
    SamplingParams,
    build,
)
from enginehouse.hlapi import LLM, GenerationOutput, ModelConfig, ParallelConfig, QuantConfig, SamplingConfig
from enginehouse.hlapi import GenerationExecutor as TextExecutor
from enginehouse.process import service_environment
from tests.integration.llm_harness import DEMO, IDS, PROMPT

ROOT = Path(__file__).parents[2]


def run(*command: str, cwd: Path) -> str:
    environment = {**service_environment(), "PYTHON": sys.executable}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout


def test_run_examples(home: Home) -> None:
    said = run(str(ROOT / "examples" / "high_level" / "run_examples.sh"), str(DEMO), cwd=home.root)
    tasks = dict(part.split("\n", 1) for part in said.split("== ")[1:])
    assert len(tasks) == 8
    whole = " heavens, in the clouds of the earth"
    assert tasks["run_llm_generate"].startswith(f"{PROMPT} -> {whole}")
    streamed, awaited = tasks["run_llm_generate_async_example"].splitlines()
    assert awaited.startswith(streamed) and streamed.startswith(whole)
    assert tasks["run_llm_save_and_load"] == tasks["run_llm_with_custom_tokenizer"] == awaited + "\n"
    assert tasks["run_llm_without_tokenizer"].startswith("[32, 200, 34")
    assert len(tasks["run_llm_with_sampling"].splitlines()) == 3
    assert "total_kv_blocks=256" in tasks["run_llm_with_kv_cache_config"]
    assert tasks["run_llm_with_quantization"].startswith(" heavens")


def test_low_level(home: Home) -> None:
    script = str(ROOT / "examples" / "low_level" / "llama.py")
    command = [sys.executable, script, "--hf_model_dir", str(DEMO), "--engine_dir", "llama.engine"]
    said = run(*command, cwd=home.root)
    assert f"{PROMPT!r} -> ' heavens, in the clouds of the earth" in said
    assert run(*command, cwd=home.root) == said  # out of the directory


def test_low_level_quantized(home: Home) -> None:
    script = str(ROOT / "examples" / "low_level" / "llama_quantize.py")
    command = [sys.executable, script, "--hf_model_dir", str(DEMO), "--cache_dir", "awq", "--calib_batches", "8"]
    said = run(*command, cwd=home.root)
    assert f"{PROMPT!r} -> ' heavens" in said
    assert json.loads((home.root / "awq" / "checkpoint" / "config.json").read_text())["quantization"] == {
        "quant_algo": "W4A16_AWQ", "kv_cache_quant_algo": None, "group_size": 128, "has_zero_point": False, "exclude_modules": [],
    }  # fmt: skip
    assert run(*command, cwd=home.root) == said  # from the checkpoint


def test_low_level_on_several_ranks(home: Home) -> None:
    script = str(ROOT / "examples" / "low_level" / "llama_multi_gpu.py")
    options = ("--hf_model_dir", str(DEMO), "--engine_dir", "several.engine", "--tp_size", "2", "--pp_size", "2")
    said = run(sys.executable, script, *options, cwd=home.root)
    assert f"{PROMPT!r} -> ' heavens, in the clouds of the earth" in said


def test_high_level_on_several_ranks(home: Home) -> None:
    script = str(ROOT / "examples" / "high_level" / "llm_examples.py")
    command = (sys.executable, script, "--task", "run_llm_on_tensor_parallel", "--prompt", PROMPT, "--hf_model_dir")
    assert run(*command, str(DEMO), cwd=home.root).startswith(" heavens, in the clouds of the earth")


# The first dialect


def test_basic_usage_and_the_engine_as_a_model(home: Home, capsys: pytest.CaptureFixture[str]) -> None:
    config = ModelConfig(model_dir=DEMO)
    llm = LLM(config)
    prompts = ["To tell a story"]
    for output in llm.generate(prompts):
        print(output)
    said = capsys.readouterr().out
    assert said.startswith("GenerationOutput(text=") and "token_ids" not in said
    llm.save(home.root / "first")
    again = LLM(ModelConfig(model_dir=home.root / "first"))
    assert [output.text for output in again.generate(prompts)] == [output.text for output in llm.generate(prompts)]
    default = again.get_default_sampling_config()
    default.max_new_tokens = 3
    (short,) = again.generate("To tell a story", default)
    assert len(short.token_ids) == 3
    one, other = again.generate((prompt for prompt in ("In the", "And")), [SamplingConfig(max_new_tokens=2), default])
    assert (len(one.token_ids), len(other.token_ids)) == (2, 3)
    (beam,) = again.generate(["To tell"], SamplingConfig(num_beams=3, max_new_tokens=4, length_penalty=0.5))
    assert beam.cumulative_logprob is not None and len(beam.token_ids) == 4
    (told,) = again.generate(["To tell"], SamplingConfig(output_log_probs=True, max_new_tokens=4))
    assert told.logprobs is not None and len(told.logprobs) == 4
    with pytest.raises(Exception, match="async_mode=True"):
        again.generate_async("To tell a story")
    with TextExecutor.create(home.root / "first", DEMO) as executor:
        both = executor.generate(["In the", "And it"], [2, 3])
        assert isinstance(both, list) and [output.text[:6] for output in both] == ["In the", "And it"]


def test_quantization_is_described_and_done(home: Home) -> None:
    config = ModelConfig(model_dir=DEMO)
    config.quant_config.init_from_description(quantize_weights=True, use_int4_weights=True, per_group=True)
    assert config.quant_config.asked.quant_algo == "W4A16_AWQ"
    config.quant_config.quantize_lm_head = True
    with pytest.raises(NotImplementedError, match="quantize_lm_head: .*demo-model is its embedding"):
        LLM(config)
    config = ModelConfig(model_dir=DEMO)
    config.quant_config.init_from_description(quantize_weights=True)
    with LLM(config) as llm:
        assert str(llm.generate([PROMPT])[0].text).startswith(" heavens, in the clouds of the earth")
    for flags, algo, cache in (
        ({"quantize_weights": True}, "W8A16", None),
        ({"quantize_weights": True, "use_int4_weights": True}, "W4A16", None),
        ({"quantize_weights": True, "quantize_activations": True, "per_token": True}, "W8A8_SQ_PER_CHANNEL", None),
        ({"use_fp8_qdq": True, "use_fp8_kv_cache": True}, "FP8", "FP8"),
        ({"use_int8_kv_cache": True}, None, "INT8"),
        ({}, None, None),
    ):
        described = QuantConfig()
        described.init_from_description(**flags)
        assert (described.asked.quant_algo, described.asked.kv_cache_quant_algo) == (algo, cache)
    described = QuantConfig()
    described.set_fp8_qdq()
    described.set_int8_kv_cache()
    assert (described.asked.quant_algo, described.asked.kv_cache_quant_algo) == ("FP8", "INT8")
    described.set_fp8_kv_cache()
    assert described.asked.kv_cache_quant_algo == "FP8"
    for wrong in ({"quantize_activations": True}, {"per_channel": True}):
        with pytest.raises(ValueError, match="need"):
            QuantConfig().init_from_description(**wrong)
    config = ModelConfig(model_dir=DEMO, parallel_config=ParallelConfig(tp_size=7))
    assert config.is_multi_gpu
    with pytest.raises(ValueError, match="cannot be divided among tp_size 7"):
        LLM(config)


def test_between_the_dialects_the_newer_class_had_the_older_place(home: Home) -> None:
    from enginehouse import LLM as Newer
    from enginehouse.hlapi import SamplingParams as Params

    llm = LLM(DEMO)
    assert type(llm) is Newer
    assert llm.generate(PROMPT, Params(max_tokens=4)).outputs[0].text == " heavens, in the"
    with pytest.raises(ValueError, match="a ModelConfig is for enginehouse.hlapi.LLM"):
        Newer(ModelConfig(DEMO))  # type: ignore[arg-type]


def test_asynchronous_generation(home: Home) -> None:
    config = ModelConfig(model_dir=DEMO)
    llm = LLM(config, async_mode=True, kvcahe_free_gpu_memory_fraction=0.1)
    outputs: list[GenerationOutput] = []

    async def main() -> None:
        async for output in llm.generate_async("To tell a story", streaming=True):
            outputs.append(output)  # noqa: PERF401
        whole = [output async for output in llm.generate_async("To tell a story")]
        assert [one.text for one in whole] == [outputs[-1].text]
        assert (await llm.generate_async("To tell a story")).text == outputs[-1].text

    asyncio.run(main())
    assert len(outputs) > 1 and "".join(output.text_diff for output in outputs) == outputs[-1].text
    assert [output.text for output in llm.generate_async("To tell a story")] == [outputs[-1].text]
    assert llm.generate_async("To tell a story").result(60).text == outputs[-1].text
    ended = llm.generate_async("To tell a story", SamplingConfig(max_new_tokens=1000, end_id=-1))
    ended.cancel()
    assert len(ended.result(60).token_ids) < 1000
    llm.shutdown()
    with pytest.raises(TypeError, match="no_such"):
        LLM(config, no_such=1)


def test_customization(home: Home) -> None:
    config = ModelConfig(model_dir=DEMO)
    tokenizer = AutoTokenizer.from_pretrained(DEMO)
    llm = LLM(config, tokenizer=tokenizer)
    assert llm.tokenizer is tokenizer
    (output,) = llm.generate([PROMPT])
    assert output.text is not None and output.text.startswith(" heavens")
    llm = LLM(config, enable_tokenizer=False)
    for output in llm.generate([32, 12]):
        assert output.text is None and len(output.token_ids) == 20
    assert len(llm.generate([32, 12])) == 1


# The second dialect


def test_auto_model_and_auto_config(home: Home) -> None:
    hf_model_dir, world_size, tp, pp = DEMO, 1, 1, 1
    build_config = BuildConfig(max_input_len=256, max_seq_len=512, max_batch_size=8)  # type: ignore[call-arg]
    mapping = Mapping(world_size=world_size, rank=0, tp_size=tp, pp_size=pp)
    trtllm_model = AutoModelForCausalLM.from_hugging_face(hf_model_dir, mapping=mapping)
    engine = build(trtllm_model, build_config)
    with pytest.raises(ValueError, match="model_world_size is 2, but the engine was built for 1"):
        GenerationExecutor.create(engine, None, 2, world_size=2, mpi_session=None, reuse_mpi_comm=False)
    executor = GenerationExecutor.create(engine)
    assert executor.generate(IDS, SamplingParams(max_new_tokens=4)).outputs[0].length == 4  # type: ignore[call-arg]
    executor.shutdown()

    trtllm_config = AutoConfig.from_hugging_face(hf_model_dir, dtype="float16", mapping=mapping)
    trtllm_model_fake_weights = AutoModelForCausalLM.get_trtllm_model_class(hf_model_dir)(trtllm_config)
    with GenerationExecutor.create(build(trtllm_model_fake_weights, build_config)) as executor:
        several = executor.generate([IDS, IDS[:3]], SamplingParams(max_tokens=4))
        assert isinstance(several, list) and [output.outputs[0].length for output in several] == [4, 4]
        result = executor.generate_async(IDS, SamplingParams(max_tokens=4), streaming=True)
        assert [output.outputs[0].length for output in result][-1] == 4
        assert executor.get_stats().total_kv_blocks > 0
