"""SamplingParams as a gateway's request: every option arrives, every wrong value is refused by name."""

from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from google.protobuf.json_format import MessageToDict

from builder_svc.build_config import BuildConfig
from builder_svc.tensorrt_names import PluginConfig
from enginehouse import GuidedDecodingParams, KvCacheConfig, Mapping, QuantConfig, SamplingParams
from enginehouse.llm.generator import as_params, as_prompts


def request(prompt: Any = "hello", **options: Any) -> dict[str, Any]:
    return MessageToDict(SamplingParams(**options).to_request(prompt), preserving_proto_field_name=True)


def test_by_default_32_of_the_most_probable_tokens() -> None:
    assert request() == {
        "text": "hello",
        "sampling": {"temperature": 0.0},
        "stopping": {"max_tokens": 32},
        "add_special_tokens": True,
        "skip_special_tokens": True,
        "n": 1,
    }


SAMPLING = [
    ({"temperature": 0.5}, {"temperature": 0.5}),
    ({"temperature": 0}, {"temperature": 0.0}),
    ({"top_k": 5}, {"top_k": 5}),
    ({"top_p": 0.5}, {"top_p": 0.5}),
    ({"min_p": 0.25}, {"min_p": 0.25}),
    ({"top_p": 0.0, "temperature": 0.7}, {"temperature": 0.0}),
    ({"top_p": 0.0, "top_k": 3}, {"top_k": 3}),
    ({"embedding_bias": [-float("inf")]}, {"temperature": 0.0, "logit_bias": {"0": -100.0}}),
    ({"temperature": 1, "seed": 2**64 - 1}, {"temperature": 1.0, "seed": "18446744073709551615"}),
    ({"temperature": 1, "random_seed": 3}, {"temperature": 1.0, "seed": "3"}),
    ({"repetition_penalty": 1.5}, {"temperature": 0.0, "repetition_penalty": 1.5}),
    ({"presence_penalty": -1, "frequency_penalty": 2}, {"temperature": 0.0, "presence_penalty": -1.0, "frequency_penalty": 2.0}),
    ({"logit_bias": {7: -100}}, {"temperature": 0.0, "logit_bias": {"7": -100.0}}),
    ({"embedding_bias": torch.tensor([0.0, 0.5, 0.0])}, {"temperature": 0.0, "logit_bias": {"1": 0.5}}),
    ({"embedding_bias": [0, 1], "logit_bias": {1: 2}}, {"temperature": 0.0, "logit_bias": {"1": 2.0}}),
    ({"bad_token_ids": [5, 6]}, {"temperature": 0.0, "bad_token_ids": [{"ids": [5]}, {"ids": [6]}]}),
    ({"bad_token_ids": [[5, 6]]}, {"temperature": 0.0, "bad_token_ids": [{"ids": [5, 6]}]}),
]  # fmt: skip


@pytest.mark.parametrize(("options", "wanted"), SAMPLING, ids=str)
def test_how_tokens_are_chosen(options: dict[str, Any], wanted: dict[str, Any]) -> None:
    assert request(**options)["sampling"] == wanted


STOPPING = [
    ({"max_tokens": 5}, {"max_tokens": 5}),
    ({"max_new_tokens": 5}, {"max_tokens": 5}),
    ({"max_tokens": None}, {}),
    ({"min_length": 3}, {"max_tokens": 32, "min_tokens": 3}),
    ({"ignore_eos": True}, {"max_tokens": 32, "ignore_eos": True}),
    ({"end_id": -1}, {"max_tokens": 32, "ignore_eos": True}),
    ({"end_id": -2}, {"max_tokens": 32, "ignore_eos": True}),
    ({"end_id": 9, "stop_token_ids": [4]}, {"max_tokens": 32, "ignore_eos": True, "stop_token_ids": [4, 9]}),
]


@pytest.mark.parametrize(("options", "wanted"), STOPPING, ids=str)
def test_when_it_ends(options: dict[str, Any], wanted: dict[str, Any]) -> None:
    assert request(**options).get("stopping", {}) == wanted


OTHERS = [
    ({"n": 3, "best_of": 5}, {"n": 3, "best_of": 5}),
    ({"beam_width": 4}, {"n": 4, "beam_search": {"width": 4, "early_stopping": "EARLY_STOPPING_HEURISTIC"}}),
    (
        {"use_beam_search": True, "best_of": 4, "n": 2, "length_penalty": 0.5, "early_stopping": 2},
        {"n": 2, "beam_search": {"width": 4, "length_penalty": 0.5, "early_stopping": "EARLY_STOPPING_NEVER"}},
    ),
    ({"use_beam_search": True}, {"n": 1, "beam_search": {"width": 1, "early_stopping": "EARLY_STOPPING_HEURISTIC"}}),
    (
        {"beam_width": 2, "early_stopping": 1, "beam_search_diversity_rate": 1},
        {"n": 2, "beam_search": {"width": 2, "early_stopping": "EARLY_STOPPING_ENOUGH", "diversity_rate": 1.0}},
    ),
    ({"return_log_probs": True}, {"n": 1, "output": {"logprobs": 0}}),
    ({"logprobs": 5, "prompt_logprobs": 0}, {"n": 1, "output": {"logprobs": 5, "prompt_logprobs": 0}}),
    ({"exclude_input_from_output": False}, {"n": 1, "echo": True}),
    ({"stop": "x", "bad": ["y", "z"]}, {"n": 1, "stop": ["x"], "bad_words": ["y", "z"]}),
    ({"priority": -2}, {"n": 1, "priority": -2}),
    ({"skip_special_tokens": False}, {"n": 1, "skip_special_tokens": False}),
    ({"add_special_tokens": False}, {"n": 1, "add_special_tokens": False}),
    ({"pad_id": 3, "top_p_decay": None, "no_repeat_ngram_size": 0, "return_context_logits": False}, {"n": 1}),
]  # fmt: skip


@pytest.mark.parametrize(("options", "wanted"), OTHERS, ids=str)
def test_what_is_told(options: dict[str, Any], wanted: dict[str, Any]) -> None:
    basic = request()
    assert request(**options) == {**basic, **wanted}


def test_names_can_be_set_later_and_only_names_that_there_are() -> None:
    params = SamplingParams()
    params.max_new_tokens = 3
    assert (params.max_tokens, params.max_new_tokens) == (3, 3)
    with pytest.raises(AttributeError):
        params.max_tokns = 4
    with pytest.raises(TypeError, match="max_tokns"):
        SamplingParams(max_tokns=4)  # type: ignore[call-arg]


class Person:
    """As a pydantic model has it."""

    @staticmethod
    def model_json_schema() -> dict[str, Any]:
        return {"type": "object", "title": "Person"}


GUIDES = [
    ({"json": '{"type": "null"}'}, {"json_schema": '{"type": "null"}'}),
    ({"json": {"const": "ä"}}, {"json_schema": '{"const": "\\u00e4"}'}),
    ({"json": Person}, {"json_schema": '{"type": "object", "title": "Person"}'}),
    ({"regex": "a+"}, {"regex": "a+"}),
    ({"choices": ["a", "b"]}, {"choices": {"choices": ["a", "b"]}}),
    ({"grammar": "start: A"}, {"grammar": "start: A"}),
    ({"json_object": True, "structural_tag": None}, {"json_object": True}),
]


@pytest.mark.parametrize(("guide", "wanted"), GUIDES, ids=str)
def test_guides(guide: dict[str, Any], wanted: dict[str, Any]) -> None:
    assert request(guided_decoding=GuidedDecodingParams(**guide))["guided_decoding"] == wanted


WRONG_GUIDES = [
    ({}, "guided_decoding has none: give exactly one of json"),
    ({"regex": "a", "json_object": True}, "guided_decoding has regex, json_object: give exactly one"),
    ({"regex": ""}, "guided_decoding.regex holds an empty text"),
    ({"regex": b"\xff"}, "guided_decoding.regex cannot be sent"),
    ({"regex": "\ud800"}, "not valid Unicode"),
    ({"choices": "ab"}, "guided_decoding.choices is 'ab': give a list"),
    ({"choices": [1]}, "guided_decoding.choices cannot be sent"),
    ({"json": {"const": {1, 2}}}, "guided_decoding.json cannot be sent"),
    ({"json": "{"}, "json_schema is no JSON"),
]


@pytest.mark.parametrize(("guide", "words"), WRONG_GUIDES, ids=str)
def test_wrong_guides(guide: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        request(guided_decoding=GuidedDecodingParams(**guide))


WRONG = [
    ({"temperature": -1}, "temperature is -1"),
    ({"temperature": "hot"}, "temperature is 'hot'"),
    ({"top_k": -1}, "top_k is -1"),
    ({"top_p": -0.5}, "top_p is -0.5: give a number above 0"),
    ({"seed": 2**64}, "seed is 18446744073709551616"),
    ({"max_tokens": 0}, "max_tokens is 0"),
    ({"max_tokens": 1.5}, "max_tokens is 1.5"),
    ({"min_tokens": 33}, "min_tokens is 33, max_tokens 32"),
    ({"stop": 5}, "stop is 5"),
    ({"logit_bias": 5}, "logit_bias is 5"),
    ({"stop": [b"x"]}, r"stop is \[b'x'\]"),
    ({"stop": [""]}, "a stop string has 0 characters"),
    ({"stop_token_ids": [-1]}, r"stop_token_ids is \[-1\]"),
    ({"stop_token_ids": 3}, "stop_token_ids is 3"),
    ({"end_id": "</s>"}, r"end_id is \['</s>'\]"),
    ({"bad_token_ids": [[]]}, "bad_token_ids holds an empty sequence"),
    ({"logit_bias": {-1: 1}}, "logit_bias is {-1: 1}"),
    ({"logit_bias": {1: 101}}, "logit_bias of token 1 is 101"),
    ({"n": 17}, "n is 17: give 1 to 16"),
    ({"n": 2, "best_of": 1}, "best_of is 1"),
    ({"beam_width": 17}, "beam_search.width is 17"),
    ({"beam_width": 0}, "beam_width is 0"),
    ({"beam_width": 2, "n": 3}, "beam_width is 2 and n is 3"),
    ({"beam_width": 2, "early_stopping": "soon"}, "early_stopping is 'soon'"),
    ({"beam_width": 2, "early_stopping": [1]}, r"early_stopping is \[1\]"),
    ({"beam_width": 2, "return_log_probs": True}, "logprobs is asked for beside beam_search"),
    ({"logprobs": 21}, "logprobs is 21"),
    ({"guided_decoding": "a+"}, "guided_decoding is 'a\\+': give GuidedDecodingParams"),
    (
        {"guided_decoding": GuidedDecodingParams(regex="a"), "beam_width": 2},
        "guided_decoding and beam_search exclude each other",
    ),
]


@pytest.mark.parametrize(("options", "words"), WRONG, ids=str)
def test_a_wrong_value_is_a_value_error_that_names_it(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        request(**options)


@pytest.mark.parametrize(
    ("cls", "options", "words"),
    [
        (SamplingParams, {"no_repeat_ngram_size": 3}, "no_repeat_ngram_size is 3"),
        (SamplingParams, {"lora_config": object}, "lora_config is"),
        (BuildConfig, {"max_draft_len": 4}, "max_draft_len is 4"),
        (BuildConfig, {"gather_context_logits": True}, "gather_context_logits is True"),
        (KvCacheConfig, {"host_cache_size": 1}, "host_cache_size is 1"),
        (GuidedDecodingParams, {"structural_tag": "{}"}, "structural_tag is '{}'"),
    ],
)
def test_what_tensorrt_llm_has_and_we_have_not_says_so(cls: type, options: dict[str, Any], words: str) -> None:
    with pytest.raises(NotImplementedError, match=f"{cls.__name__}: {words}"):
        cls(**options)


def test_a_build_config_takes_what_tunes_tensorrt_and_what_is_off() -> None:
    config = BuildConfig(
        max_input_len=256, max_beam_width=4, strongly_typed=True, kv_cache_type="paged", max_draft_len=0
    )  # type: ignore[call-arg]
    config.plugin_config.gemm_plugin = "auto"
    assert config == BuildConfig() and isinstance(config.plugin_config, PluginConfig)
    assert BuildConfig.from_dict(BuildConfig(max_batch_size=3).to_dict()) == BuildConfig(max_batch_size=3)
    config.max_seq_len = 0
    with pytest.raises(ValueError, match="max_seq_len is 0"):
        config.check()
    with pytest.raises(ValueError, match="max_batch_size is '8'"):
        BuildConfig(max_batch_size="8")  # type: ignore[arg-type]


def test_quantization_is_named_or_refused() -> None:
    assert QuantConfig("W8A16", "INT8").kv_cache_quant_algo == "INT8"
    with pytest.raises(ValueError, match="quant_algo is 'W3A5': choose one of W8A16, W4A16"):
        QuantConfig("W3A5")


# Prompts

CHAT = [{"role": "user", "content": "hi"}]


@pytest.mark.parametrize(
    ("inputs", "prompts", "single"),
    [
        ("text", ["text"], True),
        ([1, 2], [[1, 2]], True),
        ((1, 2), [(1, 2)], True),
        (numpy.array([1, 2]), [[1, 2]], True),
        (torch.tensor([[1, 2], [3, 4]]), [[1, 2], [3, 4]], False),
        ([numpy.array([1, 2])], [[1, 2]], False),
        ([numpy.int64(4)], [[4]], True),
        (["a", [1], CHAT], ["a", [1], CHAT], False),
        (CHAT, [CHAT], True),
        ([], [], False),
        ({"prompt": "text"}, ["text"], True),
        ([{"prompt_token_ids": [1]}, {"prompt": "b"}], [[1], "b"], False),
    ],
    ids=str,
)
def test_one_prompt_or_several(inputs: Any, prompts: list[Any], single: bool) -> None:
    assert as_prompts(inputs) == (prompts, single)


@pytest.mark.parametrize("inputs", [None, 5, b"text", ["a", 5], ["a", None], [b"x"], {"role": "user"}], ids=str)
def test_what_is_no_prompt(inputs: Any) -> None:
    with pytest.raises(ValueError, match="is no prompt: give text, token ids"):
        as_prompts(inputs)


def test_prompts_become_what_the_gateway_takes() -> None:
    assert request([3, 4])["token_ids"] == {"ids": [3, 4]}
    assert request(CHAT)["chat"] == {"messages": CHAT}
    for wrong, words in (
        ([-1], r"token ids is \[-1\]"),
        ([1, "x"], "token ids is"),
        ([{"role": "user"}], "a role and a content"),
        ("", "the prompt is empty"),
        ("\ud800", "not valid Unicode"),
    ):
        with pytest.raises(ValueError, match=words):
            request(wrong)


def test_params_for_all_or_one_for_each() -> None:
    one, other = SamplingParams(), SamplingParams(n=2)
    assert as_params(None, 2) == [one, one]
    assert as_params(other, 2) == [other, other]
    assert as_params([one, other], 2) == [one, other]
    with pytest.raises(ValueError, match="1 sampling_params for 2 prompts"):
        as_params([one], 2)
    with pytest.raises(ValueError, match="give a SamplingParams"):
        as_params({"max_tokens": 3}, 1)  # type: ignore[arg-type]


def test_what_is_set_later_is_looked_at_like_what_is_given() -> None:
    config, params = BuildConfig(), SamplingParams()
    config.strongly_typed = config.plugin_config = params.pad_id = 5  # type: ignore[attr-defined,misc,assignment]
    params.top_p_decay, params.no_repeat_ngram_size = 1.0, 1 << 30  # type: ignore[attr-defined]
    assert config == BuildConfig() and params == SamplingParams() and config.max_input_len is None  # type: ignore[attr-defined]
    with pytest.raises(NotImplementedError, match="BuildConfig: gather_context_logits is True"):
        config.gather_context_logits = True  # type: ignore[attr-defined]
    with pytest.raises(AttributeError, match="BuildConfig has no 'max_btch_size'"):
        config.max_btch_size = 5  # type: ignore[attr-defined]
    assert config.plugin_config.gemm_plugin is None
    assert Mapping(cp_size=1).world_size == 1  # type: ignore[call-arg]
    with pytest.raises(NotImplementedError, match="Mapping: cp_size is 2"):
        Mapping(cp_size=2)  # type: ignore[call-arg]


def test_a_build_is_for_the_gpu_that_it_finds(monkeypatch: pytest.MonkeyPatch) -> None:
    assert BuildConfig(device="cuda").target == "cuda"
    monkeypatch.setattr(Path, "exists", lambda _: False)  # no driver: torch need not be asked
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert BuildConfig().target == "cpu"
    monkeypatch.setattr(Path, "exists", lambda _: True)
    assert BuildConfig().target == "cuda"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert BuildConfig().target == "cpu"
