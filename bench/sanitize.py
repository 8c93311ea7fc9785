"""A short run of every kind of step on a tiny model, for compute-sanitizer: `bench/sanitize.sh` starts it.

A prompt in one step, prompts in chunks beside decodes, shared prefixes, sampling; then the operators that the model has not:
windows, caps, heads of 256, experts, packed products.
Where allocations are not cached, as graphs need, steps are computed instead of replayed.
"""

import json
import os
import random
import tempfile
from pathlib import Path

import torch

from bench.serving import Loaded, build_dummy, load, run
from executor_svc import cuda_graphs
from executor_svc.core import Sampling, Sequence
from tests.running import random_step

CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 1000, "hidden_size": 256, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64, "intermediate_size": 512, "rms_norm_eps": 1e-5,
    "max_position_embeddings": 512, "rope_theta": 10000.0, "hidden_act": "silu", "tie_word_embeddings": False,
}  # fmt: skip


def engine(store: Path) -> Loaded:
    """Dummy weights in 16 bits, and a runner of them."""
    with tempfile.TemporaryDirectory() as model:
        (Path(model) / "config.json").write_text(json.dumps(CONFIG))
        limits = {"max_batch_size": 4, "max_seq_len": 320, "max_num_tokens": 150}
        engine_id = build_dummy(Path(model), store, device="cuda", dtype="bfloat16", **limits)
    return load(store, engine_id, kv_blocks=40)


def steps(loaded: Loaded) -> int:
    """Tokens that were made: whole and chunked prompts, mixed steps, decodes, sampling, log-probabilities, preemption."""
    made = 0
    for lengths, sampling in (
        ((5,), Sampling(0.0)),
        ((130, 200, 7, 40), Sampling(0.0)),
        ((200, 30, 129), Sampling(0.8, top_k=20, seed=3)),
    ):
        work = [
            Sequence(0, row, [(7 * at + row) % 1000 for at in range(length)], length, 12, sampling)
            for row, length in enumerate(lengths)
        ]
        work[0].prompt_logprobs = 1
        run(loaded, work)
        made += sum(sequence.num_completion for sequence in work)
    return made


@torch.inference_mode()
def operators() -> None:
    """One call each of what the model does not use."""
    from executor_svc.kernels import gpu

    draw = random.Random(0)
    lens = [(1, 70), (1, 0), (130, 0), (20, 33)]
    for head_dim, dtype, window, cap in (
        (256, torch.float16, 50, 0.0),
        (80, torch.bfloat16, 0, 20.0),
        (128, torch.bfloat16, 0, 0.0),
    ):
        step = random_step(lens, 2, head_dim, dtype, draw, "cuda")
        q, k, v = (torch.randn(152, heads * head_dim, device="cuda").to(dtype) for heads in (6, 2, 2))
        attrs = {"cache": 0, "head_dim": head_dim, "scale": 0.1, "window": window, "soft_cap": cap}
        slopes = torch.rand(6, device="cuda") if head_dim == 80 else None
        gpu.attention(q, k, v, slopes, step=step, **attrs)
    x, logits = torch.randn(37, 100, device="cuda").half(), torch.randn(37, 5, device="cuda").half()
    gate_up, down = (torch.randn(shape, device="cuda").half() for shape in ((5, 80, 100), (5, 100, 40)))
    gpu.experts(x, logits, gate_up, down, top_k=2, normalize=True)
    for rows in (1, 2, 4, 9, 33):
        gpu.linear(
            x[:rows].contiguous(), torch.randn(77, 100, device="cuda").half(), torch.randn(77, device="cuda").half()
        )
    codes, scales = (
        torch.randint(0, 256, (77, 1032), dtype=torch.uint8, device="cuda"),
        torch.rand(77, 17, device="cuda"),
    )
    for rows in (1, 9, 70):  # packed, of sizes that no tile divides; sums in parts
        wide = torch.randn(rows, 2064, device="cuda").half()
        gpu.linear_int4(wide, codes, scales, codes[:, :17].contiguous() & 15, group_size=128)
        gpu.linear_int8(wide[:, :1032], codes.view(torch.int8), scales[:, 0].contiguous())
    torch.cuda.synchronize()


def main() -> None:
    if "PYTORCH_NO_CUDA_MEMORY_CACHING" in os.environ:
        cuda_graphs.Graph.capture = lambda *_: None  # type: ignore[method-assign]
    with tempfile.TemporaryDirectory() as store:
        loaded = engine(Path(store))
        print(f"{loaded.runner.capabilities.num_blocks} blocks; {steps(loaded)} tokens made", flush=True)
    operators()
    torch.cuda.synchronize()
    print("all steps and operators ran", flush=True)


if __name__ == "__main__":
    main()
