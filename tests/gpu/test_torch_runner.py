"""The torch runner on CUDA, with the operators' references: the demo model against transformers on the same device."""

from pathlib import Path

import pytest
import torch
import transformers

from executor_svc.core import Sampling, Sequence
from tests.running import Engine, make_engine

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]

DEMO = Path(__file__).parents[2] / "examples" / "demo-model"
LENGTH = 64


def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randint(2, 3000, (length,), generator=generator).tolist() for length in (1, 7, 33, 64, 150, 300, 20, 90)
    ]


def sequences(sampling: Sampling) -> list[Sequence]:
    return [Sequence(0, row, list(prompt), len(prompt), LENGTH, sampling) for row, prompt in enumerate(prompts())]


def texts(run: list[Sequence]) -> list[list[int]]:
    return [sequence.token_ids[sequence.prompt_len :] for sequence in run]


def reference(dtype: torch.dtype) -> transformers.PreTrainedModel:
    return transformers.AutoModelForCausalLM.from_pretrained(DEMO, dtype=dtype).cuda().eval()


def test_float32_equals_transformers_together_and_across_preemption(tmp_path: Path) -> None:
    loaded = make_engine(DEMO, tmp_path, "cuda", dtype="float32", max_seq_len=512, max_num_tokens=96)
    model = reference(torch.float32)
    wanted = []
    for prompt in prompts():
        ids = torch.tensor([prompt], device="cuda")
        settings = {"max_new_tokens": LENGTH, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        text = model.generate(ids, attention_mask=torch.ones_like(ids), **settings)
        wanted.append(text[0].tolist()[len(prompt) :])
    together, tight = Engine(loaded), Engine(loaded, kv_blocks=34)
    for engine in (together, tight):
        run = sequences(Sampling(0.0))
        engine.run(run)
        assert texts(run) == wanted
    assert tight.scheduler.num_preemptions > 0


def test_a_seed_gives_one_text_in_any_batch(tmp_path: Path) -> None:
    loaded = make_engine(DEMO, tmp_path, "cuda", dtype="float32", max_seq_len=512)
    sampling = Sampling(0.9, top_k=50, top_p=0.95, seed=4)
    together, alone = sequences(sampling), sequences(sampling)
    Engine(loaded).run(together)
    for sequence in alone:
        Engine(loaded).run([sequence])
    assert texts(together) == texts(alone)


def test_bfloat16_stays_near_the_float32_reference(tmp_path: Path) -> None:
    """Teacher-forced: each greedy token's reference logit is within 0.02 of the largest magnitude of the best."""
    loaded = make_engine(DEMO, tmp_path, "cuda", max_seq_len=512)
    assert loaded.manifest.model.dtype == "bfloat16"
    run = sequences(Sampling(0.0))
    Engine(loaded).run(run)
    model = reference(torch.float32)
    for sequence in run:
        with torch.inference_mode():
            logits = model(torch.tensor([sequence.token_ids], device="cuda")).logits[0, sequence.prompt_len - 1 : -1]
        chosen = torch.tensor(sequence.token_ids[sequence.prompt_len :], device="cuda")
        best, magnitude = logits.max(-1).values, logits.abs().max(-1).values
        assert (logits.gather(1, chosen[:, None])[:, 0] >= best - 0.02 * magnitude).all()
