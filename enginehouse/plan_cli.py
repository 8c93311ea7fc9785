"""What can be typed about plans."""

from typing import Any

import click

from enginehouse.completion import complete_gpu, complete_model_or_directory
from enginehouse.options import on_store

_share = click.FloatRange(0, 1, min_open=True)
_amount = click.FloatRange(min=0, min_open=True)
_count = click.IntRange(min=1, max=2**31)


@click.command()
@click.argument("model", metavar="CHECKPOINT|ENGINE", required=False, shell_complete=complete_model_or_directory)
@click.option("--gpu", metavar="NAME", shell_complete=complete_gpu, help="A known GPU; `--gpu list` shows them all.")
@click.option("--memory", metavar="GB", type=_amount, help="Of the device, instead of the GPU's.")
@click.option("--bandwidth", metavar="GB/S", type=_amount, help="Of its memory.")
@click.option("--flops", metavar="TFLOP/S", type=_amount, help="Dense, in the dtype of the plan.")
@click.option(
    "--memory-use", type=_share, default=0.9, show_default=True, help="Share of the memory for weights and KV cache."
)
@click.option(
    "--bandwidth-efficiency", type=_share, default=0.85, show_default=True, help="Share of it that kernels reach."
)
@click.option("--compute-efficiency", type=_share, default=0.7, show_default=True, help="The same of --flops.")
@click.option(
    "--dtype",
    type=click.Choice(["auto", "float32", "bfloat16", "float16", "fp8", "int8"]),
    default="auto",
    show_default=True,
    help="Of the weights; auto is the checkpoint's or engine's own. fp8 and int8 are of the layers' matrices alone.",
)
@click.option(
    "--kv-dtype",
    type=click.Choice(["auto", "float32", "bfloat16", "float16", "fp8", "int8"]),
    default="auto",
    show_default=True,
    help="Of the KV cache; auto is that of the activations.",
)
@click.option("--tp", type=_count, default=1, show_default=True, help="Cards among which each layer is divided.")
@click.option(
    "--pp", type=_count, default=1, show_default=True, help="Groups of cards that the layers are divided among."
)
@click.option("--input-len", type=_count, help="Tokens of a prompt.  [default: 1024, or what fits]")
@click.option("--output-len", type=_count, help="Tokens of a completion.  [default: 256, or what fits]")
@click.option("--batch", type=_count, multiple=True, help="May be repeated.  [default: 1, 8, 64 and what fits]")
@on_store
def plan(model: str | None, gpu: str | None, store: str, as_json: bool, **choices: Any) -> None:
    """Say what a model needs of a GPU, and how fast it can be.

    Before you build or rent: weights, KV cache, how many sequences fit, and the tokens/s that memory and arithmetic
    allow (the roofline), each with what limits it. Nothing is run, and of a checkpoint config.json alone is read: a
    directory, or a repository of the hub (ORG/NAME). A word without a slash that is no directory is an engine in the
    store, by name or id.

    The efficiencies are what good kernels reach: on an H100 we measured 89% of the bandwidth in plain reading and 72%
    of the bfloat16 throughput in a long prefill. The executor's own kernels may be slower.
    """
    from enginehouse.commands import plan as command
    from enginehouse.commands.plan_text import Choices

    if gpu == "list":
        command.list_gpus(as_json=as_json)
        return
    if model is None:
        raise click.UsageError("Missing argument 'CHECKPOINT|ENGINE'.")
    command.run(model, Choices(gpu=gpu, **choices), store, as_json=as_json)
