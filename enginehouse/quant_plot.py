"""A report of quantizing as a picture: the error of each linear's outputs over the layers."""

import re
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from builder_svc.quantize.report import Report


def plot(report: "Report", path: Path) -> None:
    """Draws a line for each kind of linear, and sizes and perplexities as its title. Needs matplotlib, the extra `plot`."""
    from matplotlib.figure import Figure

    kinds: dict[str, list[tuple[int, float]]] = {}
    for one in report.linears:
        if one.error is not None:
            match = re.fullmatch(r"layers\.(\d+)\.(.+)", one.name)
            number, kind = (int(match[1]), match[2]) if match else (-1, one.name)
            kinds.setdefault(kind, []).append((number, 100 * one.error))
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    for kind, points in kinds.items():
        axes.plot([number for number, _ in points], [error for _, error in points], "o-", label=kind, markersize=4)
    axes.set_xlabel("layer")
    axes.set_ylabel("error of its outputs, %")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    if kinds:
        axes.legend(frameon=False)
    algo = report.facts["quant_algo"] or f"KV cache {report.facts['kv_cache_quant_algo']}"
    axes.set_title(
        f"{algo}: {report.bytes_before / 1e6:.1f} -> {report.bytes_after / 1e6:.1f} MB, perplexity "
        f"{report.perplexity_before:.3f} -> {report.perplexity_after:.3f} ({report.loss:+.2%})"
    )
    figure.savefig(path, dpi=150)
