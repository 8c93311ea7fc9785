"""What can be typed about quantizing without a build."""

from pathlib import Path

import click

from enginehouse.completion import complete_directory
from enginehouse.options import MOST, with_json
from enginehouse.quant_options import Quantization, with_quantization


@click.command()
@click.argument("model", metavar="CHECKPOINT", shell_complete=complete_directory)
@click.option(
    "--output",
    metavar="DIR",
    type=click.Path(path_type=Path, file_okay=False),
    required=True,
    help="Where the quantized checkpoint goes.",
)
@click.option("--revision", metavar="R", help="Branch, tag or commit of the hub's repository.  [default: main]")
@click.option(
    "--dtype",
    type=click.Choice(["auto", "float32", "bfloat16", "float16"]),
    default="auto",
    show_default=True,
    help="Of what is not quantized; auto is the checkpoint's own.",
)
@click.option(
    "--device",
    type=click.Choice(["auto", "cpu", "cuda"]),
    default="auto",
    show_default=True,
    help="Where the calibration text is run; auto is a GPU if there is one.",
)
@click.option(
    "--report",
    is_flag=True,
    help="Measure what is lost: a table here, report.json and report.svg in the directory.",
)
@click.option(
    "--report-tokens",
    type=click.IntRange(2, MOST),
    default=20_000,
    show_default=True,
    help="Of the held-out text that perplexity is measured on.",
)
@with_quantization
@with_json
def quantize(
    model: str,
    output: Path,
    revision: str | None,
    dtype: str,
    device: str,
    report: bool,
    report_tokens: int,
    quantization: Quantization,
    as_json: bool,
) -> None:
    """Quantize a checkpoint, and say what that loses.

    CHECKPOINT is a directory in Hugging Face layout, a .gguf file, or a repository of the hub (ORG/NAME). What comes out
    is a checkpoint again, which `enginehouse build` takes; `build --quant` does both at once.

    The report has sizes, perplexity before and after on text that is bundled and was not calibrated with, the error of
    each layer's outputs, and which layers to --exclude if the loss is too large.
    """
    from enginehouse.commands import quantize as command

    if not quantization.asked:
        raise click.UsageError("say how to quantize, with --quant or --kv-cache-quant")
    command.run(
        model,
        output,
        quantization,
        revision=revision,
        dtype=dtype,
        device=device,
        report_tokens=report_tokens if report else None,
        as_json=as_json,
    )
