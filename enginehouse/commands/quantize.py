"""`enginehouse quantize`: a checkpoint becomes a quantized one, and what that loses is measured."""

import json
import time
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from engine.errors import FailedPrecondition
from enginehouse.progress import Bars, format_bytes, stderr
from enginehouse.quant_options import Quantization
from enginehouse.tables import print_json, print_table

if TYPE_CHECKING:
    from builder_svc.quantize.report import Report


def run(
    model: str,
    output: Path,
    quantization: Quantization,
    *,
    revision: str | None,
    dtype: str,
    device: str,
    report_tokens: int | None,
    as_json: bool,
) -> None:
    """Quantizes, and says what came of it.

    Args:
        report_tokens: of the held-out text; None for no report.
    """
    began, console = time.monotonic(), stderr()
    quant_config = quantization.config()
    calib = replace(quantization.calibration(), device=device)
    quant_config.check()
    try:
        from builder_svc.auto import AutoModelForCausalLM
        from builder_svc.quantize.report import quantize_and_report
    except ModuleNotFoundError as error:
        raise FailedPrecondition(
            f"quantizing needs {error.name}: pip install 'enginehouse[builder]'", reason="EXTRA_MISSING"
        ) from None
    with Bars(console, output.name) as bars:
        read = AutoModelForCausalLM.from_hugging_face(model, dtype, revision=revision)
        if report_tokens is None:
            read.write_quantized(read.plan(quant_config, calib), output, bars.update)
            found = None
        else:
            found = quantize_and_report(read, quant_config, calib, output, report_tokens, bars.update)
    size = sum(file.stat().st_size for file in output.iterdir() if file.suffix == ".safetensors")
    seconds = round(time.monotonic() - began, 3)
    if found:
        _write(found, output, console)
    if as_json:
        print_json({"output": str(output), "size": size, "seconds": seconds, "report": found and found.to_dict()})
        return
    if found:
        _print(found)
    print(f"{output}: {format_bytes(size)}, quantized in {seconds:.1f} s")
    print(f"next:      enginehouse build {output}")


def _write(report: "Report", output: Path, console: Console) -> None:
    """report.json, and report.svg if that can be drawn."""
    (output / "report.json").write_text(json.dumps(report.to_dict(), indent=1) + "\n")
    if find_spec("matplotlib") is None:
        console.print("report.svg needs matplotlib: pip install 'enginehouse[plot]'")
        return
    from enginehouse.quant_plot import plot

    plot(report, output / "report.svg")


def _print(report: "Report") -> None:
    change = report.bytes_after / report.bytes_before - 1
    print_table(
        ("", "before", "after", "change"),
        [
            ("weights", format_bytes(report.bytes_before), format_bytes(report.bytes_after), f"{change:+.1%}"),
            (
                f"perplexity, {report.tokens} tokens",
                f"{report.perplexity_before:.4f}",
                f"{report.perplexity_after:.4f}",
                f"{report.loss:+.2%}",
            ),
        ],
        "",
    )
    print()
    rows = [
        (one.name, one.form, format_bytes(one.nbytes), "" if one.error is None else f"{one.error:.2%}")
        for one in report.linears
    ]
    print_table(("linear", "form", "size", "error of its outputs"), rows, "no linear is quantized")
    print()
    if report.exclude:
        options = " ".join(f"--exclude {name}" for name in report.exclude)
        print(
            f"errors of more than twice the median: to keep these as they are costs {format_bytes(report.exclude_bytes)}:"
        )
        print(f"  {options}")
    elif report.linears:
        print("no error stands out: there is nothing that --exclude would help in particular")
