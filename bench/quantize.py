"""What quantizing a model loses, in all forms, in one run: perplexity on held-out text, against the bounds that must hold.

    python -m bench.quantize CHECKPOINT [--tokens 50000] [--device auto] [--forms NAME,NAME] [--out FILE.json]

CHECKPOINT is a directory, or a .gguf file, whose dequantized weights are then the baseline. The text is the one of reports
(`builder_svc/quantize/texts`), or `--text FILE`; calibration is by the bundled text. The exit status is 1 if a bound does not
hold, or if there are not enough tokens.
"""

import argparse
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bench.serving import save
from builder_svc.auto import open_model
from builder_svc.causal_lm import CausalLM
from builder_svc.quant_config import CalibConfig, QuantConfig
from builder_svc.quantize.forward import compute_device
from builder_svc.quantize.measure import perplexity
from builder_svc.quantize.text import HELD_OUT, Tokens, read_text

LENGTH = 1024  # of a sequence


@dataclass(frozen=True)
class Form:
    """One way to quantize.

    Attributes:
        most: the largest loss of perplexity that is allowed, relative.
        half_of: or half the loss of that form.
    """

    config: dict[str, Any]
    most: float | None = None
    half_of: str = ""


FORMS = {  # those with a bound first
    "int8": Form({"quant_algo": "W8A16"}, most=0.002),
    "int4": Form({"quant_algo": "W4A16"}),
    "int4 awq": Form({"quant_algo": "W4A16_AWQ"}, half_of="int4"),
    "fp8": Form({"quant_algo": "FP8"}, most=0.005),
    "fp8 per token": Form({"quant_algo": "FP8_PER_CHANNEL_PER_TOKEN"}, most=0.005),
    "smoothquant": Form({"quant_algo": "W8A8_SQ_PER_CHANNEL"}, most=0.015),
    "int4 gptq": Form({"quant_algo": "W4A16_GPTQ"}),
    "kv fp8": Form({"kv_cache_quant_algo": "FP8"}),
    "kv int8": Form({"kv_cache_quant_algo": "INT8"}),
    "int4 g32": Form({"quant_algo": "W4A16", "group_size": 32}),
    "int4 awq g32": Form({"quant_algo": "W4A16_AWQ", "group_size": 32}),
    "int4 awq g64": Form({"quant_algo": "W4A16_AWQ", "group_size": 64}),
    "int4 zeros": Form({"quant_algo": "W4A16", "has_zero_point": True}),
    "int4 awq zeros": Form({"quant_algo": "W4A16_AWQ", "has_zero_point": True}),
}


def measure(
    model: CausalLM, form: Form, calib: CalibConfig, sequences: torch.Tensor, start: int, directory: Path
) -> dict[str, Any]:
    began = time.monotonic()
    plan = model.plan(QuantConfig(**form.config), calib)
    errors = model.write_quantized(plan, directory)
    seconds = time.monotonic() - began
    made = open_model(directory)
    found = perplexity(made, sequences, start, calib.device)
    known = sorted((one.error, one.name) for one in errors if one.error is not None)
    return {
        "perplexity": found.value,
        "tokens": found.tokens,
        "bytes": sum(declared.nbytes for declared in made.declared().values()),
        "quantize_seconds": round(seconds, 1),
        "measure_seconds": round(time.monotonic() - began - seconds, 1),
        "worst": [{"linear": name, "error": error} for error, name in known[-3:]],
    }


def bound(name: str, results: dict[str, dict[str, Any]]) -> float | None:
    """The largest loss that is allowed; None where nothing is said of it, or what it depends on was not measured."""
    form = FORMS[name]
    if form.half_of:
        return results[form.half_of]["loss"] / 2 if form.half_of in results else None
    return form.most


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--tokens", type=int, default=50_000, help="of the held-out text, at least, if it has as many")
    parser.add_argument("--text", type=Path, default=HELD_OUT, help="another held-out text")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--forms", default=",".join(FORMS), help="some of them, by commas")
    parser.add_argument("--calib-data", default="", help="another text to calibrate with")
    parser.add_argument("--calib-samples", type=int, default=CalibConfig.calib_batches)
    parser.add_argument("--out", type=Path, help="where the results go, as JSON")
    arguments = parser.parse_args()
    names = arguments.forms.split(",")
    if unknown := set(names) - set(FORMS):
        parser.error(f"no form {', '.join(sorted(unknown))}: choose of {', '.join(FORMS)}")
    model = open_model(arguments.checkpoint)
    tokenizer = model.tokenizer()
    if tokenizer is None:
        parser.error(f"{arguments.checkpoint} has no tokenizer")
    tokens = Tokens(read_text(arguments.text), tokenizer.files())
    start = len(tokens.start)
    length = min(LENGTH, model.config.max_position_embeddings, arguments.tokens + start)
    sequences = tokens.sequences(length, -(-arguments.tokens // (length - max(start, 1))))
    device = compute_device(arguments.device)
    calib = CalibConfig(device.type, arguments.calib_data, arguments.calib_samples)
    where = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    before = perplexity(model, sequences, start, device.type)
    size = sum(declared.nbytes for declared in model.declared().values())
    print(
        f"{arguments.checkpoint.name} on {where}, {before.tokens} tokens: perplexity {before.value:.4f}, {size / 1e6:.1f} MB"
    )
    if before.tokens < arguments.tokens:
        print(f"the text has no more than {before.tokens} tokens, {arguments.tokens} were asked for")
    results: dict[str, dict[str, Any]] = {}
    told = {"checkpoint": arguments.checkpoint.name, "device": where, "tokens": before.tokens, "bytes": size}
    told |= {"perplexity": before.value, "calibration_samples": calib.samples, "forms": results}
    failed = before.tokens < arguments.tokens
    for name in names:
        with tempfile.TemporaryDirectory() as directory:
            found = measure(model, FORMS[name], calib, sequences, start, Path(directory) / "checkpoint")
        found["loss"] = found["perplexity"] / before.value - 1
        results[name] = found
        most = bound(name, results)
        verdict = ""
        if most is not None:
            found |= {"bound": most, "holds": found["loss"] <= most}
            failed |= not found["holds"]
            verdict = f"  {'holds' if found['holds'] else 'DOES NOT HOLD'}: at most {most:+.2%}"
        print(
            f"{name:15s} perplexity {found['perplexity']:.4f} ({found['loss']:+.3%}), {found['bytes'] / 1e6:.1f} MB, "
            f"{found['quantize_seconds']:.0f} s to quantize, {found['measure_seconds']:.0f} s to measure{verdict}",
            flush=True,
        )
        save(arguments.out, told)
    sys.exit(failed)


if __name__ == "__main__":
    main()
