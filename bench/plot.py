"""Draws what the README shows of the results: python -m bench.plot [--out docs/images/benchmarks.svg]

Takes the newest file of each kind in bench/results, and nothing else.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt  # noqa: E402  # the backend is chosen before

RESULTS = Path(__file__).parent / "results"
OUT = Path(__file__).parent.parent / "docs" / "images" / "benchmarks.svg"
OURS, OTHERS, FLOOR = "#2563c9", ("#9aa5b1", "#c9ced6"), "#444444"
WEIGHTS_GB = {"bfloat16": 15.0, "FP8": 8.0}  # of the 8B that a step reads


def newest(kind: str) -> dict[str, Any]:
    """The results of a kind with the latest date in their file's name."""
    found: dict[str, Any] = json.loads(max(RESULTS.glob(f"*-{kind}.json")).read_text())
    return found


def cpu(axes: Any) -> None:
    """Tokens/s of a real model of half a billion parameters."""
    results = newest("cpu-qwen-0.5b")
    speed = results["tokens_per_second"]
    bars = {
        "ours": (speed["ours alone"], speed["ours 8"]),
        "transformers": (
            max(speed["transformers alone, bfloat16"], speed["transformers alone, float32"]),
            max(speed["transformers 8, bfloat16"], speed["transformers 8, float32"]),
        ),
        "llama.cpp, F16": (speed["llama.cpp alone, qwen2.5-coder-0.5b-f16"],),
    }
    for place, ((name, values), color) in enumerate(zip(bars.items(), (OURS, *OTHERS), strict=True)):
        drawn = axes.bar([at + 0.27 * (place - 1) for at in range(len(values))], values, 0.25, label=name, color=color)
        axes.bar_label(drawn, fmt="%.0f", padding=2, fontsize=8)
    axes.set_xticks([0, 1], ["1 request", "8 at once"])
    axes.set_title(f"Qwen2.5-Coder-0.5B, bfloat16, {results['device'].removeprefix('x86_64, ')}\ntokens/s", fontsize=9)


def gpu(axes: Any) -> None:
    """Milliseconds of a decode step, and what reading the weights alone takes."""
    results = newest("h200-8b")
    batches = (1, 8, 64, 256)
    for (name, size), prefix, color in zip(WEIGHTS_GB.items(), ("", "fp8_"), (OURS, "#e07b39"), strict=True):
        times = [results[f"{prefix}itl_ms_b{batch}"] for batch in batches]
        axes.plot(range(4), times, "o-", color=color, label=name)
        for at, value in enumerate(times):
            axes.annotate(f"{value:.1f}", (at, value), (0, 5), textcoords="offset points", ha="center", fontsize=8)
        axes.axhline(size / results["read_gb_s"] * 1000, color=color, linestyle=":", linewidth=1)
    axes.set_xticks(range(4), [str(batch) for batch in batches])
    axes.set_xlabel("requests at once; dotted: reading the weights", fontsize=8)
    axes.set_title(f"Llama 3.1 8B, one {results['device']}\nms a decode step", fontsize=9)


def fleet(axes: Any) -> None:
    """Throughput by prefix and load beside random choice, simulated."""
    results = newest("routing")
    cases = {
        "one gateway": "one gateway",
        "8 gateways": "8 gateways",
        "8, roaming": "8 gateways, any for each turn",
        "small caches": "caches of a quarter of it all",
    }
    values = [results[f"{case}: throughput"] for case in cases.values()]
    axes.bar_label(
        axes.bar(range(len(cases)), values, 0.6, color=OURS, label="ours"), fmt="%.2f", padding=2, fontsize=8
    )
    axes.axhline(1, color=FLOOR, linestyle=":", linewidth=1, label="random choice")
    axes.set_xticks(range(len(cases)), list(cases), fontsize=7)
    axes.set_title("4 executors, 64 conversations, simulated\nthroughput beside random choice", fontsize=9)


def draw(out: Path) -> None:
    """An SVG that is the same bytes for the same results and the same matplotlib."""
    settings = {"svg.hashsalt": "enginehouse", "svg.fonttype": "path", "font.size": 9}
    with plt.rc_context(settings):
        figure, panels = plt.subplots(1, 3, figsize=(11, 3.2), layout="constrained")
        for axes, panel in zip(panels, (cpu, gpu, fleet), strict=True):
            panel(axes)
            axes.set_ylim(0, axes.get_ylim()[1] * 1.12)
            axes.spines[["top", "right"]].set_visible(False)
            axes.legend(frameon=False, fontsize=8)
        figure.savefig(out, metadata={"Date": None})
        plt.close(figure)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=OUT)
    draw(parser.parse_args().out)
