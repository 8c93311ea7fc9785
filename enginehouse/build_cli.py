"""What can be typed about builds that begin here; `enginehouse/builds_cli.py` has the jobs of builders."""

from pathlib import Path
from typing import Any

import click

from engine.tensorrt import capability_of
from enginehouse.completion import complete_directory
from enginehouse.options import MOST, check_address, with_data, with_json
from enginehouse.quant_options import Quantization, with_quantization


@click.command()
@click.argument("checkpoint", shell_complete=complete_directory)
@click.option("--name", metavar="NAME", help="What to call the model.  [default: the directory's or repository's name]")
@click.option("--revision", metavar="R", help="Branch, tag or commit of the hub's repository.  [default: main]")
@click.option("--store", metavar="URL", help="Where the engine goes.  [default: store/ in the data folder]")
@click.option(
    "--builder",
    metavar="HOST:PORT",
    envvar="ENGINEHOUSE_BUILDER",
    callback=check_address,
    help="Have it built there, into the builder's store.  [default: $ENGINEHOUSE_BUILDER, else in this process]",
)
@click.option(
    "--upload",
    is_flag=True,
    help="Send the directory to a builder that is on this machine, too; to others it always is.",
)
@click.option(
    "--dtype",
    type=click.Choice(["auto", "float32", "bfloat16", "float16"]),
    default="auto",
    show_default=True,
    help="Of weights and activations; auto is the checkpoint's own on CUDA, float32 on the CPU.",
)
@click.option(
    "--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True, help="Where the engine will run."
)
@click.option(
    "--compute-capability", metavar="X", help="Of the GPU, such as 9.0: kernels are compiled for it.  [default: any]"
)
@click.option(
    "--backend",
    type=click.Choice(["torch", "tensorrt", "tensorrt_rtx"]),
    default="torch",
    show_default=True,
    help="What runs the engine. tensorrt makes a plan for the builder's GPU, tensorrt_rtx one for --target.",
)
@click.option(
    "--target",
    metavar="SM",
    help="The GPU, as in sm120 (GeForce RTX 50) or sm89; the same as --compute-capability 12.0.",
)
@click.option(
    "--weight-streaming", is_flag=True, help="Let a plan of TensorRT keep its weights in main memory while it runs."
)
@click.option("--max-batch-size", type=click.IntRange(1, MOST), help="Requests in one step.  [default: 64]")
@click.option(
    "--max-seq-len", type=click.IntRange(1, MOST), help="Prompt and completion together.  [default: the model's]"
)
@click.option("--max-num-tokens", type=click.IntRange(1, MOST), help="Tokens in one step.  [default: 2048]")
@click.option(
    "--tp", "tp_size", type=click.IntRange(1, MOST), help="Ranks that each layer is divided among.  [default: 1]"
)
@click.option(
    "--pp",
    "pp_size",
    type=click.IntRange(1, MOST),
    help="Groups of ranks that the layers are divided among.  [default: 1]",
)
@click.option(
    "--kv-cache-dtype",
    type=click.Choice(["auto", "fp8"]),
    default="auto",
    show_default=True,
    help="Of the KV cache: auto is that of activations, fp8 takes half of 16 bits.",
)
@click.option(
    "--dummy-weights",
    is_flag=True,
    help="Read no weights: config.json is enough. Executors make random ones, the engine is some megabytes.",
)
@click.option(
    "--sign-with",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="Sign the engine with this private key (enginehouse keys generate FILE); one that is there unsigned is built again.",
)
@with_quantization
@with_data
@with_json
def build(
    checkpoint: str,
    name: str | None,
    store: str | None,
    builder: str | None,
    sign_with: Path | None,
    data: str | None,
    as_json: bool,
    revision: str | None,
    upload: bool,
    target: str | None,
    quantization: Quantization,
    **choices: Any,
) -> None:
    """Build an engine from a checkpoint.

    CHECKPOINT is a directory in Hugging Face layout, a .gguf file, or a repository of the hub (ORG/NAME[@REVISION], and
    ORG/NAME/FILE.gguf where it has several). What is on this machine is sent to a builder on another one; after an
    interruption the same command goes on where it was. What is not here and begins with . or / is a path on the
    builder's machine. $HF_TOKEN opens private and gated repositories.

    With --quant weights are quantized before, some of the options by a text that is run through the model, on a GPU if there
    is one; of a builder, --calib-data is a path under its checkpoint root. `enginehouse quantize` says what that loses.

    The same checkpoint and options give the same engine: a second build finds it in the store.
    """
    from enginehouse.commands import build as command
    from enginehouse.home import Home

    context = click.get_current_context()
    if target:
        if choices["compute_capability"]:
            raise click.UsageError("--target and --compute-capability say the same: give one of them")
        choices["compute_capability"] = capability_of(target)
    if choices["backend"] != "torch" and context.get_parameter_source("device") is click.core.ParameterSource.DEFAULT:
        choices["device"] = "cuda"
    if builder and (store or sign_with):
        if context.get_parameter_source("builder") is click.core.ParameterSource.COMMANDLINE:
            own = "--store and --builder exclude each other: a builder has its own store"
            key = "--sign-with and --builder exclude each other: a builder has its own --signing-key"
            raise click.UsageError(own if store else key)
        builder = None
    command.run(
        checkpoint,
        command.Choices(**choices, quantization=quantization),
        name=name,
        home=Home.find(data),
        store=store,
        builder=builder,
        sign_with=sign_with,
        as_json=as_json,
        revision=revision,
        upload=upload,
    )
