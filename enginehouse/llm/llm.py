"""`LLM`: a model by whatever it is called, and text out of it."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, overload

from builder_svc.build_config import DEVICES, BuildConfig
from builder_svc.quant_config import CalibConfig, QuantConfig, checked
from builder_svc.tensorrt_names import also_takes
from engine.artifact import Engine
from engine.errors import FailedPrecondition, InvalidArgument
from enginehouse.client import GatewayClient
from enginehouse.llm.executor import ExecutorStats, GenerationExecutor, KvCacheConfig, Skipped
from enginehouse.llm.generator import Generator
from enginehouse.llm.outputs import RequestOutput
from enginehouse.llm.remote import RemoteGenerator
from enginehouse.llm.result import GenerationResult
from enginehouse.llm.sampling import Prompt, SamplingParams
from enginehouse.llm.source import build_engine, find_built
from enginehouse.llm.tokenizer import GivenTokenizer
from enginehouse.progress import Bars, stderr
from gateway.models import open_tokenizer
from gateway.tokenizer import Tokenizer, TokenizerConfig

if TYPE_CHECKING:
    from builder_svc.causal_lm import CausalLM

_ABSENT = {
    "peft_cache_config": None,
    "decoding_config": None,
    "logits_post_processor_map": None,
    "auto_parallel": False,
    "speculative_config": None,
    "enable_lora": False,
}
_IGNORED = (
    "scheduler_config", "batching_type", "normalize_log_probs", "embedding_parallel_mode", "share_embedding_table", "world_size",
    "devices", "trust_remote_code", "max_beam_width",
)  # fmt: skip


@also_takes(ignored=_IGNORED, off=_ABSENT)
class LLM:
    """A language model, ready to generate.

    The engine runs in a process of its own, which ends with `shutdown`, with a `with` block, with the last reference, or with
    the program, however that ends. May be used from several threads and event loops, and beside other LLMs; a forked child
    needs its own.

    Attributes:
        engine: that runs; None of a cluster.
        tokenizer: with encode and decode: the engine's own, or what was given; None if it was skipped.

    Example:
        >>> from enginehouse import LLM, SamplingParams
        >>> with LLM("examples/demo-model") as llm:
        ...     output = llm.generate("In the beginning God created the", SamplingParams(max_tokens=4))
        >>> output.outputs[0].text
        ' heavens, in the'
    """

    def __init__(
        self,
        model: "str | Path | Engine | CausalLM",
        tokenizer: Any = None,
        skip_tokenizer_init: bool = False,
        tensor_parallel_size: int = 1,
        dtype: Any = "auto",
        revision: str | None = None,
        tokenizer_revision: str | None = None,
        *,
        pipeline_parallel_size: int = 1,
        quant_config: QuantConfig | None = None,
        calib_config: CalibConfig | None = None,
        build_config: BuildConfig | None = None,
        kv_cache_config: KvCacheConfig | None = None,
        enable_build_cache: bool = True,
        enable_tqdm: bool = True,
        store: str | None = None,
        device: str = "auto",
    ) -> None:
        """Finds out what the model is, builds an engine if there is none of it, and loads it.

        Args:
            model: a checkpoint (a directory, a GGUF file, or ORG/NAME[@REVISION] of the Hugging Face hub), an engine directory,
                s3://BUCKET/PREFIX/NAME, a name in the store; or an Engine, or a model of `AutoModelForCausalLM`.
            tokenizer: instead of the engine's own: a directory or repository of the hub, or an object with encode(text) and
                decode(token_ids).
            skip_tokenizer_init: token ids in and out, no text.
            tensor_parallel_size, pipeline_parallel_size: GPUs that each layer is divided among, and groups of GPUs that the
                layers are; on the CPU, processes. An engine that is there must be for as many; left at 1, they are the engine's.
            dtype: of a new engine's weights and activations; "auto" is the checkpoint's own, and float32 on the CPU.
            revision: branch, tag or commit of the model's repository.
            tokenizer_revision: of the tokenizer's.
            quant_config: how a new engine's weights are quantized, and its KV cache.
            calib_config: the text for that.
            build_config: what else decides a new engine.
            kv_cache_config: memory for keys and values.
            enable_build_cache: keep a new engine in the store, and take one from there that was built of the same.
            enable_tqdm: show on stderr how far building and loading are, if it is a terminal.
            store: where engines are and go; by default the one of the data folder (see `Home`).
            device: "cpu" or "cuda"; "auto" is the engine's, of a new one the build_config's.

        Raises:
            NotFound: no such model.
            InvalidArgument: (a ValueError) an option that cannot be; names the value and what is allowed.
            Unimplemented: (a NotImplementedError) an architecture, or an option, that is not supported.
            FailedPrecondition: an engine that needs another device, or more memory, than there is.
            EnginehouseError: what builds, stores and the hub raise.
        """
        ranks = _ranks(tensor_parallel_size, pipeline_parallel_size)
        given = {"quant_config": checked(quant_config), "calib_config": calib_config}
        quantizing = {name: value for name, value in given.items() if value is not None}
        if device not in DEVICES:
            raise InvalidArgument(f"device {device!r}: choose one of {', '.join(DEVICES)}")
        console = stderr()
        console.quiet = not (enable_tqdm and console.is_terminal)
        with Bars(console) as bars:
            engine = find_built(model, store)
            if engine is not None and quantizing:
                raise InvalidArgument(
                    f"{model} is an engine, whose weights are what they are: leave quant_config out, or give the checkpoint"
                )
            if engine is None:
                engine = build_engine(
                    model,
                    _config(build_config, dtype, device, ranks | quantizing),
                    store=store,
                    revision=revision,
                    keep=enable_build_cache,
                    bars=bars,
                )
            self.engine: Engine | None = engine
            _check_device(engine, device)
            _check_ranks(engine, ranks)
            self._tokenizer = _tokenizer(engine, tokenizer, tokenizer_revision, skip=skip_tokenizer_init)
            self._generator: Generator = GenerationExecutor(
                engine,
                kv_cache_config=kv_cache_config,
                tokenizer=self._tokenizer,
                name=str(model) if isinstance(model, str | Path) else "",
                progress=lambda done, total: bars.update("load", done, total, "bytes"),
            )

    @classmethod
    def connect(
        cls,
        address: str,
        model: str,
        *,
        skip_tokenizer_init: bool = False,
        api_key: str | None = None,
        tls_ca: str | None = None,
        tls_cert: str | None = None,
        tls_key: str | None = None,
    ) -> Self:
        """The same over a running cluster, whose executors run the engine.

        Args:
            address: the gateway's host:port.
            model: a name that it serves.
            skip_tokenizer_init: token ids in and out, no text.
            api_key, tls_ca, tls_cert, tls_key: as `GatewayClient` takes them.

        Raises:
            Unauthenticated: the gateway asks for an API key, and does not know this one.
            Unavailable: no gateway answers there.
            NotFound: no model of that name; the message lists those that are there.
        """
        llm = cls.__new__(cls)
        llm.engine = None
        client = GatewayClient(address, api_key=api_key, tls_ca=tls_ca, tls_cert=tls_cert, tls_key=tls_key)
        llm._generator = remote = RemoteGenerator(client, model, text=not skip_tokenizer_init)
        llm._tokenizer = None if skip_tokenizer_init else remote.tokenizer  # type: ignore[assignment]
        return llm

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()

    def __reduce__(self) -> Any:
        raise TypeError("an LLM has a process of its own, which cannot be pickled: make one in each process")

    @property
    def tokenizer(self) -> Any:
        """With encode and decode: the engine's own, or what was given; None if it was skipped."""
        if isinstance(self._tokenizer, GivenTokenizer):
            return self._tokenizer.given
        return None if isinstance(self._tokenizer, Skipped) else self._tokenizer

    @overload
    def generate(  # type: ignore[overload-overlap]
        self,
        inputs: str | Sequence[int] | Sequence[Mapping[str, str]],
        sampling_params: SamplingParams | None = None,
        use_tqdm: bool = True,
    ) -> RequestOutput: ...

    @overload
    def generate(
        self,
        inputs: Sequence[str] | Sequence[Sequence[int]] | Sequence[Sequence[Mapping[str, str]]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]: ...

    def generate(
        self,
        inputs: Any,
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
    ) -> RequestOutput | list[RequestOutput]:
        """Completes a prompt, or each of a list, all at once.

        Args:
            inputs: a text, token ids (a list, or an array), a conversation (messages with role and content), or a list of these.
            sampling_params: for all, or one for each; by default 32 tokens, the most probable ones.
            use_tqdm: show on stderr how far it is, if it is a terminal.

        Returns:
            An output for a single prompt, a list for a list.

        Raises:
            InvalidArgument: (a ValueError) names the value and what is allowed; nothing has been sent then.
            FailedPrecondition: text without a tokenizer, a conversation without a chat template.
            Unavailable: the process that runs the engine, or the cluster, is gone.
        """
        return self._generator.complete(inputs, sampling_params, use_tqdm)

    def generate_async(
        self, inputs: Prompt, sampling_params: SamplingParams | None = None, streaming: bool = False
    ) -> GenerationResult:
        """Begins to complete a prompt, and returns at once.

        Args:
            inputs: a text, token ids or a conversation.
            sampling_params: by default 32 tokens, the most probable ones.
            streaming: whether iterating gives outputs as they grow, or one at the end.

        Raises:
            InvalidArgument, FailedPrecondition, Unavailable: as `generate`; later ones by the result.
        """
        return self._generator.start(inputs, sampling_params, streaming)

    def save(self, engine_dir: str | Path) -> None:
        """Writes the engine into a directory, which `LLM` takes as a model. Raises what `Engine.save` raises."""
        if self.engine is None:
            raise FailedPrecondition("the engine is the cluster's: save it where it was built")
        self.engine.save(engine_dir)

    def get_stats(self) -> ExecutorStats:
        """How busy it is. Raises FailedPrecondition of a cluster, which tells it by its metrics."""
        if not isinstance(self._generator, GenerationExecutor):
            raise FailedPrecondition("a cluster tells how busy it is by its metrics (docs/metrics.md)")
        return self._generator.get_stats()

    def shutdown(self) -> None:
        """Ends it; requests that are under way fail. Nothing happens the second time."""
        self._generator.shutdown()


def _ranks(tensor_parallel_size: int, pipeline_parallel_size: int) -> dict[str, Any]:
    """What is asked for, by the fields of a BuildConfig; nothing where it is 1."""
    sizes = {"tensor_parallel_size": tensor_parallel_size, "pipeline_parallel_size": pipeline_parallel_size}
    for name, size in sizes.items():
        if type(size) is not int or size < 1:
            raise InvalidArgument(f"{name} is {size!r}: give a number, at least 1")
    asked = {"tp_size": tensor_parallel_size, "pp_size": pipeline_parallel_size}
    return {name: size for name, size in asked.items() if size > 1}


def _config(build_config: BuildConfig | None, dtype: Any, device: str, others: dict[str, Any]) -> BuildConfig:
    """What a new engine is built by."""
    if not isinstance(build_config, BuildConfig | None):
        raise InvalidArgument(f"build_config is {build_config!r}: give a BuildConfig")
    config, dtype = build_config or BuildConfig(), str(dtype).removeprefix("torch.")
    if dtype != "auto":
        if config.dtype not in ("auto", dtype):
            raise InvalidArgument(f"dtype is {dtype!r}, but build_config has {config.dtype!r}: give it once")
        config = replace(config, dtype=dtype)
    for name, value in others.items():
        if getattr(config, name) not in (1, None, value):
            raise InvalidArgument(f"{name} is {value}, but build_config has {getattr(config, name)}: give it once")
    return replace(config, device=config.target if device == "auto" else device, **others)


def _check_device(engine: Engine, device: str) -> None:
    built_for = engine.manifest.fingerprint.device
    if device not in ("auto", built_for):
        raise InvalidArgument(f"device is {device!r}, but engine {engine.engine_id[:12]} was built for {built_for!r}")


def _check_ranks(engine: Engine, ranks: dict[str, int]) -> None:
    for name, size in ranks.items():
        built_for = getattr(engine.manifest.mapping, name)
        if size != built_for:
            raise InvalidArgument(f"{name} is {size}, but engine {engine.engine_id[:12]} was built for {built_for}")


def _tokenizer(engine: Engine, given: Any, revision: str | None, *, skip: bool) -> Tokenizer:
    if skip:
        if given is not None:
            raise InvalidArgument("a tokenizer and skip_tokenizer_init exclude each other: leave one of both out")
        return Skipped(engine.engine_id)
    if given is None:
        return open_tokenizer(engine.store, engine.manifest)
    if not isinstance(given, str | Path):
        return GivenTokenizer(given)
    from builder_svc.checkpoint.sources import fetch_here
    from builder_svc.tokenizer import normalize

    directory, _ = fetch_here(given, revision, weights=False)
    found = normalize(directory, engine.manifest.model.vocab_size)
    return Tokenizer(found.tokenizer_json, TokenizerConfig.from_json(found.config_json))
