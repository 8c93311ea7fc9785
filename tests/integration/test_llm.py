"""LLM over the demo model, with its real worker process: what a script, a notebook, a server and a careless user do with it."""

import asyncio
import contextlib
import gc
import json
import os
import pickle
import pty
import re
import threading
import time
from pathlib import Path
from typing import Any

import hub_server
import pytest
from tokenizers import Tokenizer as HubTokenizer

from builder_svc.build_config import BuildConfig
from engine.artifact import Engine
from engine.errors import DataLoss, FailedPrecondition, NotFound
from enginehouse import LLM, GenerationExecutor, GuidedDecodingParams, Home, KvCacheConfig, QuantConfig, SamplingParams
from tests.integration.llm_harness import DEMO, IDS, LONG, PROMPT, script, text, workers
from tests.seaweed import SeaweedFS

# Prompts and outputs


def test_text_ids_and_conversations_alone_and_together(llm: LLM) -> None:
    one = llm.generate(PROMPT)
    assert (one.prompt, one.prompt_token_ids, one.finished) == (PROMPT, IDS, True)
    assert one.outputs[0].length == 32 and one.outputs[0].text.startswith(" heavens")
    by_ids, by_text, other = llm.generate([IDS, PROMPT, "And it came to pass"], SamplingParams(max_tokens=32))
    assert by_ids.outputs == by_text.outputs == one.outputs and by_ids.prompt is None
    assert other.outputs != one.outputs
    assert llm.generate([]) == []
    assert llm.tokenizer.decode(llm.tokenizer.encode("hello")) == "hello"


def test_each_prompt_has_its_own_params(llm: LLM) -> None:
    params = [SamplingParams(max_tokens=count, temperature=0.8, seed=3) for count in (2, 5)]
    short, longer = llm.generate([PROMPT, PROMPT], params)
    assert [len(short.outputs[0].token_ids), len(longer.outputs[0].token_ids)] == [2, 5]
    assert longer.outputs[0].token_ids[:2] == short.outputs[0].token_ids  # a seed counts, the batch does not


def test_several_completions_beams_and_log_probabilities(llm: LLM) -> None:
    sampled = llm.generate(PROMPT, SamplingParams(n=3, temperature=1.0, seed=1, max_tokens=6, logprobs=2)).outputs
    assert [one.index for one in sampled] == [0, 1, 2] and len({one.text for one in sampled}) > 1
    for one in sampled:
        assert one.logprobs is not None and one.cumulative_logprob is not None
        assert len(one.logprobs) == 6 and one.cumulative_logprob == pytest.approx(sum(p.logprob for p in one.logprobs))
        assert [
            place.top.get(token, place.logprob) for place, token in zip(one.logprobs, one.token_ids, strict=True)
        ] == [place.logprob for place in one.logprobs]
    best = llm.generate(PROMPT, SamplingParams(n=1, best_of=3, temperature=1.0, seed=1, max_tokens=6)).outputs
    assert best[0].text in {one.text for one in sampled}
    beams = llm.generate(PROMPT, SamplingParams(beam_width=3, max_tokens=6)).outputs
    scores = [one.cumulative_logprob for one in beams]
    assert len(beams) == 3 and None not in scores
    prompt = llm.generate(PROMPT, SamplingParams(prompt_logprobs=0, max_tokens=1))
    assert len(prompt.prompt_logprobs or ()) == len(IDS) - 1


def test_stop_strings_and_the_prompt_in_the_output(llm: LLM) -> None:
    output = llm.generate(PROMPT, SamplingParams(stop=["clouds"])).outputs[0]
    assert (output.text, output.finish_reason, output.stop_reason) == (" heavens, in the ", "stop", "clouds")
    assert text(llm, stop="clouds", include_stop_str_in_output=True) == " heavens, in the clouds"
    assert text(llm, max_tokens=2, exclude_input_from_output=False) == f"{PROMPT} heavens,"
    stopped = llm.generate(PROMPT, SamplingParams(stop_token_ids=[13])).outputs[0]
    assert (stopped.finish_reason, stopped.stop_reason, stopped.token_ids[-1]) == ("stop", 13, 13)
    ended = llm.generate(PROMPT, SamplingParams(end_id=13)).outputs[0]
    assert (ended.finish_reason, ended.stop_reason) == ("stop", None)


def test_guided_output(llm: LLM) -> None:
    """In batches with free ones, streamed, with stop strings and seeds; what is no grammar fails alone."""
    number = GuidedDecodingParams(regex=r"( [0-9]{3}){4}!")
    params = SamplingParams(temperature=1.0, seed=7, n=2, guided_decoding=number)
    held, free = llm.generate([PROMPT, PROMPT], [params, SamplingParams()])
    assert all(re.fullmatch(r"( [0-9]{3}){4}!", one.text) and one.finish_reason == "stop" for one in held.outputs)
    assert held.outputs[0].text != held.outputs[1].text
    assert free.outputs == llm.generate(PROMPT).outputs
    one = SamplingParams(temperature=1.0, seed=7, guided_decoding=number)
    assert [part.outputs[0].text for part in llm.generate_async(PROMPT, one, streaming=True)][-1] == held.outputs[
        0
    ].text
    cut = text(llm, stop=" 1", guided_decoding=GuidedDecodingParams(regex="( 1| 2){40}"), max_tokens=64)
    assert set(cut) <= set(" 2")
    limits = {"n": {"type": "integer", "minimum": 0, "maximum": 999}}
    schema = {"type": "object", "properties": limits, "required": ["n"], "additionalProperties": False}
    told = text(llm, guided_decoding=GuidedDecodingParams(json=schema), max_tokens=64)
    assert set(json.loads(told)) == {"n"}
    with pytest.raises(ValueError, match="guided_decoding.regex cannot be used"):
        llm.generate(PROMPT, SamplingParams(guided_decoding=GuidedDecodingParams(regex="(")))


@pytest.mark.drill
def test_streaming_in_a_script_adds_up(llm: LLM) -> None:
    result = llm.generate_async(PROMPT, LONG, streaming=True)
    outputs = list(result)
    assert len(outputs) > 1  # steps that the reader is too slow for come as one, but hardly so many
    whole = llm.generate(PROMPT, LONG).outputs[0]
    assert "".join(output.outputs[0].text_diff for output in outputs) == whole.text
    assert (
        sum((output.outputs[0].token_ids_diff for output in outputs), [])
        == whole.token_ids
        == outputs[-1].outputs[0].token_ids
    )
    assert [output.finished for output in outputs] == [False] * (len(outputs) - 1) + [True]
    (once,) = llm.generate_async(PROMPT, LONG)
    assert once.outputs[0].text == whole.text


async def test_in_a_running_event_loop(llm: LLM) -> None:
    """Streams, awaits, and even the blocking call."""
    ticks = 0

    async def tick() -> None:
        nonlocal ticks
        while True:
            await asyncio.sleep(0.005)
            ticks += 1

    task = asyncio.create_task(tick())
    params = SamplingParams(max_tokens=100, ignore_eos=True)

    async def stream(prompt: str) -> str:
        return "".join([o.outputs[0].text_diff async for o in llm.generate_async(prompt, params, streaming=True)])

    prompts = [f"{PROMPT} {number}" for number in range(4)]
    streamed = await asyncio.gather(*map(stream, prompts))
    awaited = await asyncio.gather(*(llm.generate_async(prompt, params) for prompt in prompts))
    assert ticks > 5
    task.cancel()
    assert streamed == [output.outputs[0].text for output in awaited]
    assert [output.outputs[0].text for output in llm.generate(prompts, params)] == streamed


def test_from_many_threads(llm: LLM) -> None:
    expected = text(llm, max_tokens=8)
    found: list[str] = []
    threads = [threading.Thread(target=lambda: found.append(text(llm, max_tokens=8))) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [expected] * 6


def idle(llm: LLM) -> bool:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        stats = llm.get_stats()
        if (stats.running, stats.waiting, stats.free_kv_blocks) == (0, 0, stats.total_kv_blocks):
            return True
        time.sleep(0.02)
    return False


def test_cancel_frees_the_engine(llm: LLM) -> None:
    results = [llm.generate_async(f"{PROMPT} {number}", LONG, streaming=True) for number in range(8)]
    next(results[0])
    while not llm.get_stats().running:
        time.sleep(0.01)
    for result in results:
        result.cancel()
    assert [result.result().outputs[0].finish_reason for result in results] == ["cancelled"] * 8
    assert results[0].result().outputs[0].length < 2000
    assert idle(llm)
    whole = llm.generate_async(PROMPT, LONG)
    while not llm.get_stats().running:  # told with its first token
        time.sleep(0.01)
    whole.cancel()
    assert whole.result().outputs[0].finish_reason == "cancelled"
    assert 0 < whole.result().outputs[0].length < 2000  # what has come so far
    assert idle(llm)


def test_results_that_nobody_holds_are_cancelled(llm: LLM) -> None:
    result = llm.generate_async(PROMPT, LONG, streaming=True)
    next(result)
    before = llm.get_stats().completion_tokens
    del result
    gc.collect()
    assert idle(llm)
    assert llm.get_stats().completion_tokens - before < 1800


# Wrong input


BAD: list[tuple[Any, dict[str, Any], str]] = [
    (PROMPT, {"max_tokens": 10**6}, r"prompt \(8 tokens\) and max_tokens \(1000000\) are more than the 2048"),
    ([7] * 2048, {}, "the prompt has 2048 tokens, but model .* takes 2048"),
    ([3072], {}, "token_ids holds 3072, but model .* has 3072 tokens"),
    (PROMPT, {"temperature": -1.0}, "temperature is -1"),
    (PROMPT, {"stop_token_ids": [5000]}, "stop_token_ids holds 5000"),
    (PROMPT, {"beam_width": 17}, "beam_search.width is 17"),
    ("", {}, "the prompt is empty"),
    (3.5, {}, "3.5 is no prompt"),
]


@pytest.mark.parametrize(("prompt", "options", "words"), BAD, ids=[words[:30] for *_, words in BAD])
def test_a_wrong_value_is_told_before_anything_is_sent(
    llm: LLM, prompt: Any, options: dict[str, Any], words: str
) -> None:
    before = llm.get_stats().prompt_tokens
    params = SamplingParams(**options)
    with pytest.raises(ValueError, match=words):
        llm.generate_async(prompt, params)
    with pytest.raises(ValueError, match=words):
        llm.generate([PROMPT, prompt], [SamplingParams(), params])
    time.sleep(0.05)
    stats = llm.get_stats()
    assert (stats.running + stats.waiting, stats.prompt_tokens) == (0, before)


def test_a_conversation_is_written_as_the_model_knows_it(llm: LLM) -> None:
    chat = [{"role": "user", "content": "Who made the heaven?"}]
    one, other = llm.generate([chat, PROMPT], SamplingParams(max_tokens=4))
    assert one.prompt_token_ids == llm.tokenizer.encode(llm.tokenizer.render(chat), False)
    assert llm.generate(chat, SamplingParams(max_tokens=4)).outputs == one.outputs != other.outputs


def test_what_an_llm_cannot_be_made_of(engine_dir: Path, tmp_path: Path) -> None:
    for options, error, words in (
        ({"tensor_parallel_size": 2}, ValueError, "tp_size is 2, but engine [0-9a-f]{12} was built for 1"),
        ({"pipeline_parallel_size": 0}, ValueError, "pipeline_parallel_size is 0"),
        ({"quant_config": QuantConfig("W4A8_AWQ")}, NotImplementedError, "W4A8_AWQ: it is not made here"),
        ({"device": "tpu"}, ValueError, "device 'tpu'"),
        ({"kv_cache_config": {"max_tokens": 5}}, ValueError, "give a KvCacheConfig"),
        ({"device": "cuda"}, ValueError, "was built for 'cpu'"),
        ({"auto_parallel": True}, NotImplementedError, "auto_parallel is True"),
        ({"tokenizer": object()}, ValueError, "has no encode"),
        ({"tokenizer": "x", "skip_tokenizer_init": True}, ValueError, "exclude each other"),
        ({"kv_cache_config": KvCacheConfig(max_tokens=0)}, ValueError, "max_tokens of the KV cache is 0"),
        ({"kv_cache_config": KvCacheConfig(free_gpu_memory_fraction=2)}, ValueError, "free_gpu_memory_fraction is 2"),
        ({"kv_cache_config": KvCacheConfig(max_tokens=16)}, FailedPrecondition, "less than one sequence of 2048"),
    ):
        with pytest.raises(error, match=words):
            LLM(engine_dir, **options)  # type: ignore[arg-type]
    for model, kind, words in (
        ("no-such-model", NotFound, "no directory, and no model in .*there are: demo"),
        ("./no/such/directory", NotFound, "is no directory and no .gguf file"),
        (f"file://{tmp_path}/store/demo", NotFound, "no model 'demo'"),
        ("s3://", ValueError, "names no model"),
        (5, ValueError, "model is 5: give a path"),
    ):
        with pytest.raises(kind, match=words):
            LLM(model)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="give a BuildConfig"):
        LLM(DEMO, build_config={"max_seq_len": 5})  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="tensr_parallel_size"):
        LLM(engine_dir, tensr_parallel_size=2)  # type: ignore[call-arg]
    with pytest.raises(ValueError, match="dtype is 'float16', but build_config has 'bfloat16'"):
        LLM(DEMO, dtype="float16", build_config=BuildConfig(dtype="bfloat16"))
    assert len(workers(os.getpid())) <= 1  # the module's own


# Where the model comes from


def trusts_code(llm: LLM) -> bool:
    """Whether its workers run native code that nobody has signed."""
    told = [Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0") for pid in ranks(llm)]
    assert len({b"--trust-native" in arguments for arguments in told}) == 1
    return b"--trust-native" in told[0]


def ranks(llm: LLM) -> list[int]:
    """The workers' processes."""
    assert isinstance(llm._generator, GenerationExecutor)
    return llm._generator._worker._started().pids


def test_an_engine_of_several_ranks_gives_the_same_text(llm: LLM, tmp_path: Path) -> None:
    store = str(tmp_path / "store")
    with LLM(DEMO, tensor_parallel_size=2, kv_cache_config=KvCacheConfig(max_tokens=4096), store=store) as divided:
        assert text(divided, max_tokens=24) == text(llm, max_tokens=24)
        assert divided.get_stats().total_kv_blocks == 4096 // 16
        assert trusts_code(divided)
        assert len(workers(os.getpid())) >= 1 + 2
        divided.save(tmp_path / "saved")
    with pytest.raises(ValueError, match="tp_size is 2, but build_config has 4"):
        LLM(DEMO, tensor_parallel_size=2, build_config=BuildConfig(tp_size=4), store=store)
    with GenerationExecutor.create(tmp_path / "saved", model_world_size=2) as executor:
        assert executor.generate(IDS, SamplingParams(max_tokens=4)).outputs[0].length == 4


def test_a_checkpoint_is_built_once_and_found_again(home: Home, engine_dir: Path, tmp_path: Path) -> None:
    with LLM(DEMO, build_config=BuildConfig(max_seq_len=64), store=str(tmp_path / "store")) as first:
        assert first.engine is not None and not first.engine.reused
        assert trusts_code(first), "what this process has compiled itself"
        expected = text(first, max_tokens=4)
        with pytest.raises(ValueError, match="more than the 64"):
            first.generate(PROMPT, SamplingParams(max_tokens=60))
        first.save(tmp_path / "saved")
        with pytest.raises(TypeError, match="cannot be pickled"):
            pickle.dumps(first)
    with LLM(DEMO, build_config=BuildConfig(max_seq_len=64), store=str(tmp_path / "store")) as again:
        assert again.engine is not None and again.engine.reused and not trusts_code(again)
    with LLM(tmp_path / "saved") as saved:
        assert saved.engine is not None and saved.engine.manifest.limits.max_seq_len == 64 and not trusts_code(saved)
        assert text(saved, max_tokens=4) == expected
    before = list((tmp_path / "store" / "engines").iterdir())
    config = BuildConfig(max_seq_len=63)
    with LLM(
        DEMO, dtype="bfloat16", build_config=config, store=str(tmp_path / "store"), enable_build_cache=False
    ) as gone:
        assert gone.engine is not None and gone.engine.manifest.model.dtype == "bfloat16"
        assert list((tmp_path / "store" / "engines").iterdir()) == before
    assert list(home.work.iterdir()) == []


def test_a_name_of_the_store_and_an_engine_at_hand(home: Home, engine_dir: Path) -> None:
    """Two LLMs live in one process."""
    with LLM("demo") as named, LLM(Engine.from_dir(engine_dir)) as held:
        assert named.engine is not None and held.engine is not None
        assert named.engine.store.url == home.store and named.engine.engine_id == held.engine.engine_id
        assert text(named, max_tokens=4) == text(held, max_tokens=4) == " heavens, in the"
        named.shutdown()
        assert text(held, max_tokens=4) == " heavens, in the"


def test_a_repository_of_the_hub(engine_dir: Path, tmp_path: Path) -> None:
    """Downloaded, built and found again; in a process of its own, in which huggingface_hub reads the environment."""
    with hub_server.serve({"org/demo": hub_server.Repository(DEMO)}) as hub:
        process = script(
            f"""
            from enginehouse import LLM, SamplingParams
            for _ in range(2):
                with LLM("org/demo", revision="main") as llm:
                    print(llm.engine.reused, llm.engine.manifest.source, end=" ")
                    print(llm.generate({PROMPT!r}, SamplingParams(max_tokens=4)).outputs[0].text)
            with LLM({str(engine_dir)!r}, tokenizer="org/demo", tokenizer_revision="main") as llm:
                print(llm.generate({PROMPT!r}, SamplingParams(max_tokens=4)).outputs[0].text)
            """,
            **hub_server.environment(hub.url, tmp_path / "hub"),
            ENGINEHOUSE_HOME=str(tmp_path / "home"),
        )
        out, err = process.communicate(timeout=200)
        assert process.returncode == 0, err
        source = "hf://org/demo@main"
        said = " heavens, in the"
        assert out.splitlines() == [f"False {source} {said}", f"True {source} {said}", said]


async def test_made_in_a_thread_of_a_running_loop(engine_dir: Path) -> None:
    made = await asyncio.to_thread(LLM, engine_dir)
    assert (await made.generate_async(PROMPT, SamplingParams(max_tokens=4))).outputs[0].text == " heavens, in the"
    await asyncio.to_thread(made.shutdown)


def test_a_name_in_a_bucket(bucket: SeaweedFS, engine_dir: Path) -> None:
    url = bucket.url("llm")
    place, _, query = url.partition("?")
    Engine.from_dir(engine_dir).push(url, "demo")
    with LLM(f"{place}/demo?{query}") as llm:
        assert llm.engine is not None and llm.engine.store.url.startswith("s3://")
        assert text(llm, max_tokens=4) == " heavens, in the"


def test_a_damaged_engine_is_told_by_the_process_that_loads_it(engine_dir: Path, tmp_path: Path) -> None:
    Engine.from_dir(engine_dir).push(str(tmp_path / "copy"))
    (weights,) = Engine.from_dir(engine_dir).manifest.ranks[0].weights
    file = tmp_path / "copy" / "blobs" / "sha256" / weights.digest[:2] / weights.digest
    data = bytearray(file.read_bytes())
    data[1000] ^= 1
    file.unlink()
    file.write_bytes(data)
    with pytest.raises(DataLoss, match="is damaged: chunk 0"):
        LLM(tmp_path / "copy")


def test_how_much_memory_keys_and_values_get(engine_dir: Path, llm: LLM) -> None:
    """A part of what is free, some 12 MB; and nothing shared between prompts."""
    with open("/proc/meminfo") as file:
        free = 1024 * int(next(line for line in file if line.startswith("MemAvailable:")).split()[1])
    config = KvCacheConfig(max_tokens=10**6, free_gpu_memory_fraction=12e6 / free, enable_block_reuse=False)
    prompt = IDS * 20
    with LLM(engine_dir, kv_cache_config=config) as small:
        assert 128 <= small.get_stats().total_kv_blocks < 600 < llm.get_stats().total_kv_blocks
        assert [small.generate(prompt).cached_tokens for _ in range(2)] == [0, 0]
    assert [llm.generate(prompt).cached_tokens for _ in range(2)][1] >= 144


@pytest.mark.parametrize("shown", [True, False])
def test_a_terminal_shows_how_far_it_is(engine_dir: Path, shown: bool) -> None:
    ours, theirs = pty.openpty()
    process = script(
        f"""
        from enginehouse import LLM
        with LLM({str(engine_dir)!r}, enable_tqdm={shown}) as llm:
            llm.generate(["In the", "And"], use_tqdm={shown})
        """,
        stderr=theirs,
        TERM="xterm",
    )
    os.close(theirs)
    said = b""
    with contextlib.suppress(OSError):  # the other end is closed
        while data := os.read(ours, 4096):
            said += data
    os.close(ours)
    process.communicate(timeout=200)
    assert process.returncode == 0
    assert [word in said for word in (b"load", b"generate")] == [shown, shown]


# Tokenizers


class Reversed:
    """A tokenizer of somebody's own, with nothing but the two methods."""

    def __init__(self) -> None:
        self._real = HubTokenizer.from_file(str(DEMO / "tokenizer.json"))

    def encode(self, text: str) -> list[int]:
        return [0, *self._real.encode(text[::-1], add_special_tokens=False).ids]

    def decode(self, token_ids: list[int]) -> str:
        return "".join(f"<{token}>" for token in token_ids)


def test_a_tokenizer_of_ones_own(engine_dir: Path, llm: LLM) -> None:
    with LLM(engine_dir, tokenizer=Reversed()) as own:
        assert isinstance(own.tokenizer, Reversed)
        output = own.generate(PROMPT[::-1], SamplingParams(max_tokens=5))
        expected = llm.generate(PROMPT, SamplingParams(max_tokens=5)).outputs[0]
        assert output.prompt_token_ids == IDS and output.outputs[0].token_ids == expected.token_ids
        assert output.outputs[0].text == "".join(f"<{token}>" for token in expected.token_ids)
        stopped = own.generate(PROMPT[::-1], SamplingParams(stop=f"<{expected.token_ids[2]}>")).outputs[0]
        assert stopped.token_ids == expected.token_ids[:3] and stopped.text == "".join(
            f"<{t}>" for t in expected.token_ids[:2]
        )
    with LLM(engine_dir, tokenizer=str(DEMO)) as given:
        assert text(given, max_tokens=4) == " heavens, in the"


def test_without_a_tokenizer(engine_dir: Path, llm: LLM) -> None:
    with LLM(engine_dir, skip_tokenizer_init=True) as bare:
        assert bare.tokenizer is None
        output = bare.generate(IDS, SamplingParams(max_tokens=4))
        assert (output.outputs[0].text, len(output.outputs[0].token_ids)) == ("", 4)
        assert output.outputs[0].token_ids == llm.generate(IDS, SamplingParams(max_tokens=4)).outputs[0].token_ids
        with pytest.raises(FailedPrecondition, match="no tokenizer, as it was asked for: send the prompt as token ids"):
            bare.generate(PROMPT)
        with pytest.raises(FailedPrecondition, match="no stop string can be found"):
            bare.generate(IDS, SamplingParams(stop="x"))
