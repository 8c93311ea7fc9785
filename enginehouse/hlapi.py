"""The Python API of TensorRT-LLM 0.8 and 0.9 (`ModelConfig`, `SamplingConfig`, `GenerationOutput`), thin over ours.

Scripts of that time run when they import from here; new ones import from `enginehouse`. Between the two, TensorRT-LLM had the
newer `LLM` under this module's name: without a ModelConfig, `LLM` here is that one.
"""

from collections.abc import AsyncIterator, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self

import enginehouse
from builder_svc.build_config import BuildConfig as BuildConfig
from builder_svc.quant_config import QuantAlgo
from builder_svc.quant_config import QuantConfig as Quantization
from engine.errors import FailedPrecondition, InvalidArgument
from enginehouse.llm.executor import KvCacheConfig as KvCacheConfig
from enginehouse.llm.generator import as_prompts
from enginehouse.llm.outputs import RequestOutput
from enginehouse.llm.sampling import SamplingParams as SamplingParams


@dataclass
class ParallelConfig:
    """Over how many GPUs a model is spread.

    Example:
        >>> from enginehouse.hlapi import ModelConfig
        >>> config = ModelConfig("examples/demo-model")
        >>> config.parallel_config.tp_size = 2
        >>> config.is_multi_gpu
        True
    """

    tp_size: int = 1
    pp_size: int = 1
    devices: list[int] = field(default_factory=list)


@dataclass
class QuantConfig:
    """What is to be quantized, as flags.

    Attributes:
        quantize_lm_head: whether the head is, too.
        asked: the same by the newer API's names.

    Example:
        >>> from enginehouse.hlapi import QuantConfig
        >>> quant_config = QuantConfig()
        >>> quant_config.init_from_description(quantize_weights=True, use_int4_weights=True, per_group=True)
        >>> quant_config.asked.quant_algo
        <QuantAlgo.W4A16_AWQ: 'W4A16_AWQ'>
    """

    quantize_lm_head: bool = False
    asked: Quantization = field(default_factory=Quantization)

    def init_from_description(
        self,
        quantize_weights: bool = False,
        quantize_activations: bool = False,
        per_token: bool = False,
        per_channel: bool = False,
        per_group: bool = False,
        use_int4_weights: bool = False,
        use_int8_kv_cache: bool = False,
        use_fp8_kv_cache: bool = False,
        use_fp8_qdq: bool = False,
    ) -> None:
        """Sets all of it.

        Raises:
            InvalidArgument: (a ValueError) flags that do not go together.
        """
        if quantize_activations and not quantize_weights:
            raise InvalidArgument("quantize_activations needs quantize_weights: set both or none")
        if (per_token or per_channel) and not (quantize_weights and quantize_activations):
            raise InvalidArgument("per_token and per_channel need quantize_weights and quantize_activations")
        if use_int8_kv_cache and use_fp8_kv_cache:
            raise InvalidArgument("use_int8_kv_cache and use_fp8_kv_cache exclude each other: set one")
        algo = None
        if quantize_activations:
            algo = QuantAlgo.W8A8_SQ_PER_CHANNEL
        elif quantize_weights and use_int4_weights:
            algo = QuantAlgo.W4A16_AWQ if per_group else QuantAlgo.W4A16
        elif quantize_weights:
            algo = QuantAlgo.W8A16
        elif use_fp8_qdq:
            algo = QuantAlgo.FP8
        cache = QuantAlgo.INT8 if use_int8_kv_cache else QuantAlgo.FP8 if use_fp8_kv_cache else None
        self.asked = Quantization(quant_algo=algo, kv_cache_quant_algo=cache)

    def set_int8_kv_cache(self) -> None:
        """Asks for a KV cache in INT8."""
        self.asked.kv_cache_quant_algo = QuantAlgo.INT8

    def set_fp8_kv_cache(self) -> None:
        """Asks for a KV cache in FP8."""
        self.asked.kv_cache_quant_algo = QuantAlgo.FP8

    def set_fp8_qdq(self) -> None:
        """Asks for weights and activations in FP8."""
        self.asked.quant_algo = QuantAlgo.FP8


@dataclass
class ModelConfig:
    """Which model, and how it is built.

    Attributes:
        model_dir: a Hugging Face model, a saved checkpoint or an engine.
        model: taken, and not needed.
        plugin_config: taken, and without effect.

    Example:
        >>> from enginehouse.hlapi import LLM, ModelConfig
        >>> llm = LLM(ModelConfig(model_dir="examples/demo-model"))
        >>> for output in llm.generate(["In the beginning God created the"]):
        ...     print(output.text[:8])
         heavens
    """

    model_dir: str | Path
    model: object = None
    parallel_config: ParallelConfig = field(default_factory=ParallelConfig)
    quant_config: QuantConfig = field(default_factory=QuantConfig)
    plugin_config: object = None

    @property
    def is_multi_gpu(self) -> bool:
        """Whether there is more than one rank."""
        return self.parallel_config.tp_size * self.parallel_config.pp_size > 1


@dataclass
class SamplingConfig:
    """How tokens are chosen. By default 20 tokens, the most probable ones.

    Example:
        >>> from enginehouse.hlapi import SamplingConfig
        >>> SamplingConfig(max_new_tokens=8, top_k=40, top_p=0.9).params().top_k
        40
    """

    end_id: int | None = None
    pad_id: int | None = None
    max_new_tokens: int = 20
    num_beams: int = 1
    temperature: float = 1.0
    top_k: int = 1
    top_p: float = 0.0
    length_penalty: float = 1.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    min_length: int = 1
    beam_search_diversity_rate: float = 0.0
    random_seed: int | None = None
    output_cum_log_probs: bool = False
    output_log_probs: bool = False
    output_sequence_lengths: bool = False
    return_dict: bool = False
    use_beam_hyps: bool = True

    def params(self) -> "enginehouse.SamplingParams":
        """The same for ours."""
        return enginehouse.SamplingParams(
            max_tokens=self.max_new_tokens,
            min_tokens=min(self.min_length, self.max_new_tokens),
            end_id=self.end_id,
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p or None,
            repetition_penalty=self.repetition_penalty,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            seed=self.random_seed,
            beam_width=self.num_beams,
            length_penalty=self.length_penalty if self.num_beams > 1 else None,
            beam_search_diversity_rate=self.beam_search_diversity_rate if self.num_beams > 1 else None,
            return_log_probs=(self.output_log_probs or self.output_cum_log_probs) and self.num_beams == 1,
        )


@dataclass(frozen=True)
class GenerationOutput:
    """A completion, of several beams the best one.

    Attributes:
        text: None without a tokenizer.
        text_diff: what of it the output before this one of the same prompt had not.
        logprobs: of each token, if they were asked for.

    Example:
        >>> from enginehouse.hlapi import LLM, ModelConfig
        >>> llm = LLM(ModelConfig("examples/demo-model"), enable_tokenizer=False)
        >>> [output.text for output in llm.generate([32, 12])]
        [None]
    """

    text: str | None
    token_ids: list[int] = field(default_factory=list, repr=False)
    text_diff: str = field(default="", repr=False)
    cumulative_logprob: float | None = field(default=None, repr=False)
    logprobs: list[float] | None = field(default=None, repr=False)

    @staticmethod
    def of(output: RequestOutput, has_text: bool) -> "GenerationOutput":
        """The first completion of ours."""
        best = output.outputs[0]
        logprobs = None if best.logprobs is None else [one.logprob for one in best.logprobs]
        text = best.text if has_text else None
        return GenerationOutput(text, best.token_ids, best.text_diff, best.cumulative_logprob, logprobs)


class GenerationResult:
    """What `generate_async` gives: iterable and async-iterable, awaitable, with `result()`.

    Example:
        >>> from enginehouse.hlapi import LLM, ModelConfig
        >>> llm = LLM(ModelConfig("examples/demo-model"), async_mode=True)
        >>> "".join(output.text_diff for output in llm.generate_async("In the", streaming=True)) != ""
        True
    """

    def __init__(self, result: "enginehouse.GenerationResult", has_text: bool) -> None:
        self._result, self._has_text = result, has_text

    def result(self, timeout: float | None = None) -> GenerationOutput:
        """Waits for the end. Raises TimeoutError after so many seconds, and what the request has failed with."""
        return GenerationOutput.of(self._result.result(timeout), self._has_text)

    async def aresult(self) -> GenerationOutput:
        """The same in an event loop."""
        return GenerationOutput.of(await self._result, self._has_text)

    def cancel(self) -> None:
        """Ends the request."""
        self._result.cancel()

    def __await__(self) -> Generator[Any, None, GenerationOutput]:
        return self.aresult().__await__()

    def __iter__(self) -> Iterator[GenerationOutput]:
        return (GenerationOutput.of(output, self._has_text) for output in self._result)

    async def __aiter__(self) -> AsyncIterator[GenerationOutput]:
        async for output in self._result:
            yield GenerationOutput.of(output, self._has_text)


class LLM:
    """A model, built or loaded when this is made.

    Example:
        >>> from enginehouse.hlapi import LLM, ModelConfig
        >>> llm = LLM(ModelConfig("examples/demo-model"))
        >>> llm.save("demo.engine")
        >>> llm = LLM(ModelConfig("demo.engine"))
    """

    def __new__(cls, config: Any, *args: Any, **options: Any) -> Any:
        """What is not a ModelConfig is for the API of 0.10 and later, whose LLM was in the same place."""
        if isinstance(config, ModelConfig):
            return super().__new__(cls)
        return enginehouse.LLM(config, *args, **options)

    def __init__(
        self,
        config: ModelConfig,
        tokenizer: Any = None,
        enable_tokenizer: bool = True,
        async_mode: bool = False,
        async_engine_tmp_dir: str | None = None,  # noqa: ARG002  (taken, and not needed)
        **options: Any,
    ) -> None:
        """Builds what must be built, and loads it.

        Args:
            config: which model.
            tokenizer: instead of the model's own.
            enable_tokenizer: False takes and gives token ids alone.
            async_mode: whether `generate_async` will be called.
            options: kvcahe_free_gpu_memory_fraction, spelled so or rightly.

        Raises:
            TypeError: another option.
            EnginehouseError: what `enginehouse.LLM` raises.
        """
        share = None
        for name in ("kvcahe_free_gpu_memory_fraction", "kvcache_free_gpu_memory_fraction"):
            share = options.pop(name, share)
        if options:
            raise TypeError(f"LLM takes no {', '.join(options)}: enginehouse.LLM has more options")
        self._async, self._has_text = async_mode, enable_tokenizer
        self._llm = enginehouse.LLM(
            config.model_dir,
            tokenizer,
            not enable_tokenizer,
            config.parallel_config.tp_size,
            pipeline_parallel_size=config.parallel_config.pp_size,
            quant_config=replace(config.quant_config.asked, quantize_lm_head=config.quant_config.quantize_lm_head),
            kv_cache_config=enginehouse.KvCacheConfig(free_gpu_memory_fraction=share),
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()

    def shutdown(self) -> None:
        """Ends it; one that is forgotten ends with its last reference."""
        self._llm.shutdown()

    @property
    def tokenizer(self) -> Any:
        """With encode and decode; None where there is none."""
        return self._llm.tokenizer

    def get_default_sampling_config(self) -> SamplingConfig:
        """What is used where none is given."""
        return SamplingConfig()

    def generate(
        self,
        prompts: str | Sequence[int] | Iterable[str] | Iterable[Sequence[int]],
        sampling_config: SamplingConfig | Sequence[SamplingConfig] | None = None,
    ) -> list[GenerationOutput]:
        """Completes prompts: texts, or token ids. A flat list of ids, or a text, is one prompt; a list comes back all the same.

        Raises:
            InvalidArgument: (a ValueError) names the value and what is allowed.
        """
        several: Any = as_prompts(prompts if isinstance(prompts, str | Sequence) else list(prompts))[0]
        config = sampling_config or SamplingConfig()
        params: Any = config.params() if isinstance(config, SamplingConfig) else [one.params() for one in config]
        outputs = self._llm.generate(several, params, use_tqdm=False)
        return [GenerationOutput.of(output, self._has_text) for output in outputs]

    def generate_async(
        self, prompt: str | Sequence[int], sampling_config: SamplingConfig | None = None, streaming: bool = False
    ) -> GenerationResult:
        """Begins with one prompt. Raises FailedPrecondition without async_mode, InvalidArgument as `generate`."""
        if not self._async:
            raise FailedPrecondition("generate_async needs LLM(config, async_mode=True)")
        params = (sampling_config or SamplingConfig()).params()
        return GenerationResult(self._llm.generate_async(prompt, params, streaming), self._has_text)

    def save(self, engine_dir: str | Path) -> None:
        """Writes the engine, which `ModelConfig` takes as model_dir."""
        self._llm.save(engine_dir)


class GenerationExecutor:
    """An engine that takes text; its results begin with the prompt.

    Example:
        >>> from enginehouse.hlapi import LLM, ModelConfig, GenerationExecutor
        >>> LLM(ModelConfig("examples/demo-model")).save("demo.engine")
        >>> with GenerationExecutor.create("demo.engine", "examples/demo-model") as executor:
        ...     executor.generate("In the beginning", max_new_tokens=3).text
        'In the beginning of the first'
    """

    def __init__(self, llm: "enginehouse.LLM") -> None:
        self._llm = llm

    @staticmethod
    def create(engine_dir: str | Path, tokenizer_dir: str | Path, max_beam_width: int = 1) -> "GenerationExecutor":  # noqa: ARG004
        """Loads an engine and the tokenizer of a directory. Raises what `enginehouse.LLM` raises."""
        return GenerationExecutor(enginehouse.LLM(engine_dir, str(tokenizer_dir)))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()

    def generate(
        self, prompt: str | Sequence[str], max_new_tokens: int | Sequence[int] = 20
    ) -> GenerationOutput | list[GenerationOutput]:
        """Completes a text, or each of several. Raises InvalidArgument."""
        params: Any = _text_params(max_new_tokens)
        outputs = self._llm.generate(prompt, params, use_tqdm=False)
        if isinstance(outputs, RequestOutput):
            return GenerationOutput.of(outputs, has_text=True)
        return [GenerationOutput.of(output, has_text=True) for output in outputs]

    def generate_async(self, prompt: str, streaming: bool = False, max_new_tokens: int = 20) -> GenerationResult:
        """Begins with one text. Raises InvalidArgument."""
        return GenerationResult(
            self._llm.generate_async(prompt, _text_params(max_new_tokens), streaming), has_text=True
        )

    def shutdown(self) -> None:
        """Ends it."""
        self._llm.shutdown()


def _text_params(max_new_tokens: int | Sequence[int]) -> Any:
    if isinstance(max_new_tokens, int):
        return enginehouse.SamplingParams(max_tokens=max_new_tokens, exclude_input_from_output=False)
    return [_text_params(count) for count in max_new_tokens]
