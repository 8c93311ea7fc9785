"""`enginehouse build`: a checkpoint becomes an engine, in this process or by a builder."""

import asyncio
import shlex
import time
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from builder_svc.checkpoint.sources import HUB, UPLOAD, find_local, find_source, is_checkpoint
from engine import registry, signing
from engine.backends import TRANSFER_PATIENCE, open_store
from engine.checkpoints import model_name
from engine.errors import FailedPrecondition, InvalidArgument, NotFound
from enginehouse.client import BuilderClient, is_loopback, not_unicode
from enginehouse.commands.follow import follow
from enginehouse.home import Home
from enginehouse.progress import Bars, format_bytes, stderr
from enginehouse.quant_options import Quantization
from enginehouse.tables import print_json
from protos.v1 import builder_pb2
from protos.v1.builder_pb2 import DEVICE_KIND_CPU, DEVICE_KIND_CUDA, BuildSpec, Target


@dataclass(frozen=True)
class Choices:
    """What a person chose about a build; None leaves it to the builder."""

    dtype: str = "auto"
    device: str = "cpu"
    compute_capability: str | None = None
    max_batch_size: int | None = None
    max_seq_len: int | None = None
    max_num_tokens: int | None = None
    dummy_weights: bool = False
    kv_cache_dtype: str = "auto"
    tp_size: int | None = None
    pp_size: int | None = None
    quantization: Quantization = Quantization()  # noqa: RUF009  (frozen)
    backend: str = "torch"
    weight_streaming: bool = False

    def spec(self, checkpoint: str) -> BuildSpec:
        """The same on the wire. Raises InvalidArgument for a path that is not valid Unicode."""
        try:
            return BuildSpec(
                checkpoint=checkpoint,
                dtype=self.dtype,
                target=Target(
                    device=DEVICE_KIND_CUDA if self.device == "cuda" else DEVICE_KIND_CPU,
                    compute_capability=self.compute_capability or "",
                ),
                max_batch_size=self.max_batch_size,
                max_seq_len=self.max_seq_len,
                max_num_tokens=self.max_num_tokens,
                dummy_weights=self.dummy_weights,
                kv_cache_dtype=self.kv_cache_dtype,
                tp_size=self.tp_size,
                pp_size=self.pp_size,
                quantization=_on_the_wire(self.quantization),
                backend=self.backend,
                weight_streaming=self.weight_streaming,
            )
        except UnicodeEncodeError as error:
            raise not_unicode(error) from None


def _on_the_wire(chosen: Quantization) -> builder_pb2.Quantization | None:
    if not chosen.asked:
        return None
    return builder_pb2.Quantization(
        quant_algo=chosen.quant or "",
        kv_cache_quant_algo=chosen.kv_cache_quant or "",
        group_size=chosen.group_size,
        has_zero_point=chosen.zero_points,
        smoothquant_val=chosen.smoothquant,
        exclude_modules=chosen.exclude,
        quantize_lm_head=chosen.quantize_lm_head,
        calib_dataset=chosen.calib_data or "",
        calib_samples=chosen.calib_samples,
        calib_max_seq_length=chosen.calib_length,
        random_seed=chosen.calib_seed,
    )


@dataclass(frozen=True)
class Result:
    """What came of it; `size`, in bytes, is known where the store is."""

    name: str
    engine_id: str
    reused: bool
    seconds: float
    size: int | None = None


def run(
    checkpoint: str,
    choices: Choices,
    *,
    name: str | None,
    home: Home,
    store: str | None,
    builder: str | None,
    sign_with: Path | None = None,
    as_json: bool,
    revision: str | None = None,
    upload: bool = False,
) -> None:
    """Builds, or has it built when `builder` is given, and says what came of it.

    Args:
        checkpoint: a directory, a GGUF file, or a repository of the hub as ORG/NAME[/FILE.gguf][@REVISION], with or without
            hf:// before it.
        revision: of the hub's repository.
        upload: send a local directory or file to the builder even if that could see it.
        sign_with: a private key, with which an engine that is built here is signed.
    """
    console = stderr()
    source = find_source(checkpoint, revision)
    if source != checkpoint and not checkpoint.startswith(HUB):
        console.print(f"{checkpoint}: nothing of that name here, so the repository of the Hugging Face hub is meant")
    name = registry.check_name(name) if name else default_name(source)
    if builder:
        there, local = _place(source, builder, upload)
        result = asyncio.run(_build_there(there, local, choices, name, builder, console))
    elif upload:
        raise InvalidArgument("--upload sends the checkpoint to a builder: say to which with --builder HOST:PORT")
    else:
        result = _build_here(source, choices, name, home, store, sign_with, console)
    if as_json:
        print_json(
            {
                "name": result.name,
                "engine_id": result.engine_id,
                "reused": result.reused,
                "dummy_weights": choices.dummy_weights,
                "seconds": round(result.seconds, 3),
                "size": result.size,
            }
        )
        return
    verb = "found, nothing to build" if result.reused else "built"
    size = f", {format_bytes(result.size)}" if result.size is not None else ""
    dummy = ", dummy weights" if choices.dummy_weights else ""
    print(f"{result.name}: engine {result.engine_id[:12]}{size}{dummy}, {verb} in {result.seconds:.1f} s")
    print(f"engine id: {result.engine_id}")
    if not builder:
        print(f"next:      enginehouse up {result.name}{same_place(home, store)}")


def default_name(checkpoint: str) -> str:
    """The name of the checkpoint's directory, file or repository. Raises InvalidArgument when it cannot be a model's name."""
    if checkpoint.startswith(HUB):
        name = checkpoint.removeprefix(HUB).partition("@")[0].rpartition("/")[2]
    elif checkpoint.endswith(".gguf"):  # a link keeps its name
        name = Path(checkpoint).name
    else:
        name = Path(checkpoint).expanduser().resolve().name
    name = model_name(name)
    try:
        return registry.check_name(name)
    except InvalidArgument:
        raise InvalidArgument(
            f"the checkpoint's name {name!r} cannot name a model (1 to 128 letters, digits and . _ -): "
            "`build` takes one with --name, `up` as NAME=CHECKPOINT",
            reason="MODEL_NAME_INVALID",
        ) from None


async def _build_there(
    checkpoint: str, local: Path | None, choices: Choices, name: str, address: str, console: Console
) -> Result:
    """`local`: what to upload; None where the builder has the checkpoint or gets it by itself."""
    began = time.monotonic()
    async with BuilderClient(address) as builder:
        with Bars(console, name) as bars:
            if local:
                checkpoint = await builder.upload(local, bars.update, not choices.dummy_weights)
            job = await follow(builder, choices.spec(checkpoint), name, bars, console)
    return Result(name, job.engine_id, job.reused, time.monotonic() - began)


def _place(source: str, address: str, upload: bool) -> tuple[str, Path | None]:
    """The checkpoint as the builder is to be asked for it, or what to upload before.

    A builder on this machine sees the same files. What is not here is a path on the builder's machine.
    """
    local = Path(source).expanduser()
    if source.startswith((HUB, UPLOAD)) or not is_checkpoint(local):
        if upload:
            raise NotFound(f"--upload sends a directory or .gguf file of this machine, and {source} is none")
        return source, None
    if upload or not is_loopback(address):
        return source, local
    return str(local.absolute() if local.is_file() else local.resolve()), None


def _build_here(
    checkpoint: str,
    choices: Choices,
    name: str,
    home: Home,
    store_url: str | None,
    sign_with: Path | None,
    console: Console,
) -> Result:
    private = signing.load_private(sign_with) if sign_with else None  # a bad key file is told before the work
    began = time.monotonic()  # with the seconds that the import of torch takes: the person waits for them, too
    source = checkpoint if checkpoint.startswith((HUB, UPLOAD)) else str(find_local(checkpoint))
    try:
        from builder_svc.build_config import BuildConfig
        from builder_svc.checkpoint.sources import fetch
        from builder_svc.pipeline import build
        from builder_svc.work_directory import WorkDirectory, clear
    except ModuleNotFoundError as error:
        raise FailedPrecondition(
            f"building in this process needs {error.name}: pip install 'enginehouse[builder]', "
            "or have it built with --builder HOST:PORT",
            reason="EXTRA_MISSING",
        ) from None
    chosen = {key: value for key, value in vars(choices).items() if value is not None}
    quantization = chosen.pop("quantization")
    if quantization.asked:
        chosen |= {"quant_config": quantization.config(), "calib_config": quantization.calibration()}
    options = BuildConfig(**chosen)
    home.make()
    clear(home.work)
    store = open_store(store_url or home.store, TRANSFER_PATIENCE)

    def unsigned(engine_id: str) -> bool:
        return private is not None and private.public.id not in signing.claims(store, engine_id)

    try:
        with (
            Bars(console, name) as bars,
            WorkDirectory(home.work) as work,
        ):
            path = fetch(source, store, work, bars.update, not options.dummy_weights)
            built = build(
                path, options, store=store, source=source, again=unsigned, work_dir=work, progress=bars.update
            )
    except KeyboardInterrupt:
        console.print("interrupted")
        raise
    if private and built.ours:  # before the name: who finds the engine by it finds it signed
        signing.sign(store, built.manifest.engine_id, private, built.digest)
    elif private and unsigned(built.manifest.engine_id):
        raise FailedPrecondition(
            f"engine {built.manifest.engine_id[:12]} in {store.url} is not what this build makes, and is not signed: remove it "
            f"with `enginehouse engines rm {built.manifest.engine_id}`, and build again",
            reason="MANIFEST_CHANGED",
        )
    registry.set_name(store, name, built.manifest.engine_id)
    size = sum(file.size for file in built.manifest.files())
    return Result(name, built.manifest.engine_id, built.reused, time.monotonic() - began, size)


def same_place(home: Home, store: str | None) -> str:
    """The options with which another command finds this data folder and store; empty for the default ones."""
    data = "" if home == Home.find() else f" --data {shlex.quote(str(home.root))}"
    return data if store in (None, home.store) else f"{data} --store {shlex.quote(str(store))}"
