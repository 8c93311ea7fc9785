"""How far logits are from transformers' in float32, beside transformers' own in bfloat16: models of moderate size, through the
runner's own steps: prompts in chunks, then decodes in graphs, a batch ahead.

    python -m pytest -s tests/gpu/test_gpu_logits.py
"""

import gc
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from executor_svc.core import Sampling, Sequence
from executor_svc.loop import scheduler_config
from executor_svc.scheduler import Scheduler
from tests.conftest import save_checkpoint
from tests.running import make_engine, run_ahead, watch_logits

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]

SIZE = {
    "vocab_size": 8000, "hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 4, "num_attention_heads": 16,
    "num_key_value_heads": 4, "max_position_embeddings": 1024, "initializer_range": 0.03,
}  # fmt: skip
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-128": ("llama", {"num_attention_heads": 8, "num_key_value_heads": 2}),
    "qwen2": ("qwen2", {"num_attention_heads": 14, "num_key_value_heads": 2, "hidden_size": 896}),
    "gemma2": ("gemma2", {"head_dim": 256, "num_attention_heads": 4, "num_key_value_heads": 2, "sliding_window": 100}),
    "gpt2": ("gpt2", {"n_inner": 4096}),
    "phi": ("phi", {"hidden_size": 1280, "num_key_value_heads": 16}),
    "mixtral": ("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 4, "intermediate_size": 704}),
}
"""Heads of 128, 64 and 7 to a key head, 256 with windows and caps, 64 with layer norms, 80 of which a part is rotated; experts,
all chosen, since rounding turns near ties of a router around."""

PROMPTS, NEW_TOKENS = (300, 41, 150), 40  # the third waits for a place, and is computed beside decodes


def transformers_logits(checkpoint: Path, texts: list[list[int]], dtype: torch.dtype) -> list[Tensor]:
    model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint, dtype=dtype, attn_implementation="eager")
    model.cuda().eval()
    with torch.inference_mode():
        return [model(torch.tensor([text], device="cuda")).logits[0].float() for text in texts]


def distance(found: list[Tensor], wanted: list[Tensor]) -> float:
    """Relative L2 error of all rows."""
    ours, theirs = torch.cat(found), torch.cat(wanted)
    return float((ours - theirs).norm() / theirs.norm())


@pytest.mark.parametrize("case", CASES)
def test_errs_as_transformers_does(case: str, tmp_path: Path) -> None:
    from executor_svc.cuda_runner import CudaRunner

    family, changes = CASES[case]
    checkpoint = save_checkpoint(tmp_path / "checkpoint", family, **{**SIZE, **changes})
    model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.bfloat16)
    model.save_pretrained(checkpoint)  # so that both read the same weights, and differ in arithmetic alone
    options = {"max_seq_len": 512, "max_batch_size": 2, "max_num_tokens": 200}
    loaded = make_engine(checkpoint, tmp_path / "store", "cuda", dtype="bfloat16", **options)
    assert CudaRunner.takes(loaded.program)
    runner = CudaRunner(loaded.program, loaded.weights, loaded.manifest.limits)
    rows = watch_logits(runner)
    work = []
    for row, length in enumerate(PROMPTS):
        prompt = torch.randint(2, SIZE["vocab_size"], (length,), generator=torch.Generator().manual_seed(row)).tolist()
        sequence = Sequence(0, row, prompt, length, NEW_TOKENS, Sampling(0.0), prompt_logprobs=0 if row == 0 else None)
        work.append(sequence)
    run_ahead(runner, Scheduler(scheduler_config(runner, loaded.manifest)), work)
    del runner, loaded
    gc.collect()
    exact, half = (
        transformers_logits(checkpoint, [one.token_ids for one in work], dtype)
        for dtype in (torch.float32, torch.bfloat16)
    )
    for kind, first in (("prompt", 0), ("decode", 1)):
        found, wanted, theirs = [], [], []
        for sequence, ours, reference in zip(work, exact, half, strict=True):
            at = [
                position
                for position in range(len(sequence.token_ids) - 1)
                if (sequence.handle, position) in rows and (position >= sequence.prompt_len) == first
            ]
            found += [rows[sequence.handle, position] for position in at]
            wanted += list(ours[at])
            theirs += list(reference[at])
        errors = [distance([torch.stack(some)], [torch.stack(wanted)]) for some in (found, theirs)]
        print(f"{case} {kind}: {len(found)} rows, error {errors[0]:.2e}, transformers' {errors[1]:.2e}", flush=True)
        assert len(found) >= (300 if kind == "prompt" else 3 * NEW_TOKENS - 3)
        assert errors[0] <= 1.5 * errors[1]
    for sequence, logits in zip(work, exact, strict=True):
        rows_before = logits[sequence.prompt_len - 1 : -1]
        chosen = torch.tensor(sequence.token_ids[sequence.prompt_len :], device="cuda")
        best, magnitude = rows_before.max(-1).values, rows_before.abs().max(-1).values
        assert (rows_before.gather(1, chosen[:, None])[:, 0] >= best - 0.02 * magnitude).all()
