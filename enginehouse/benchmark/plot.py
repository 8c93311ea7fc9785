"""A sweep as a picture. matplotlib is imported here and nowhere else: it is the extra `plot`."""

from collections.abc import Sequence
from pathlib import Path

from engine.errors import FailedPrecondition
from enginehouse.benchmark.results import Distribution, Point

SUFFIXES = (".png", ".svg")


def check_available() -> None:
    """Raises FailedPrecondition, with the command that installs it, where matplotlib is missing."""
    try:
        import matplotlib  # noqa: F401
    except ModuleNotFoundError:
        raise FailedPrecondition(
            "--plot needs matplotlib: pip install 'enginehouse[plot]'", reason="EXTRA_MISSING"
        ) from None


def plot(points: Sequence[Point], title: str, path: Path) -> None:
    """Draws throughput, time to first token and inter-token latency over the load, one above the other."""
    check_available()
    from matplotlib.figure import Figure
    from matplotlib.ticker import FixedLocator, NullLocator

    loads = [float(point.concurrency or point.rate or 0) for point in points]
    figure = Figure(figsize=(7, 8), layout="constrained")
    throughput, first, between = figure.subplots(3, 1, sharex=True)
    throughput.plot(loads, [point.tokens_per_second for point in points], "o-", color="tab:blue")
    throughput.margins(y=0.1)
    throughput.set_ylabel("output tokens/s")
    throughput.set_ylim(bottom=0)
    throughput.set_title(title)
    for axes, label, values in (
        (first, "time to first token, ms", [point.ttft for point in points]),
        (between, "inter-token latency, ms", [point.inter_token_latency for point in points]),
    ):
        for name, style in (("median", "o-"), ("p90", "s--"), ("p99", "^:")):
            axes.plot(loads, _milliseconds(values, name), style, label=name)
        axes.set_ylabel(label)
        axes.set_ylim(bottom=0)
        axes.legend(loc="upper left", frameon=False)
    for axes in (throughput, first, between):
        axes.grid(alpha=0.3)
    between.set_xlabel("concurrent requests" if points[0].concurrency else "requests/s offered")
    if len(loads) > 2 and min(loads) > 0 and max(loads) / min(loads) >= 8:
        between.set_xscale("log", base=2)
    between.xaxis.set_major_locator(FixedLocator(sorted(set(loads))))
    between.xaxis.set_minor_locator(NullLocator())
    between.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    figure.savefig(path, dpi=150)


def _milliseconds(values: Sequence[Distribution], name: str) -> list[float]:
    found = (getattr(value, name) for value in values)
    return [float("nan") if value is None else value * 1e3 for value in found]
