"""A family against transformers: the same logits through the program, the same tokens through scheduler and runner."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import torch
import transformers
from torch import Tensor

from executor_svc.core import Batch, Sampling, Sequence
from executor_svc.loader import LoadedEngine
from tests.conftest import VOCAB_SIZE
from tests.running import Engine, make_engine

NEW_TOKENS = 64


class Reference(Protocol):
    """A model as transformers has it."""

    def __call__(self, input_ids: Tensor) -> Any: ...

    def generate(self, input_ids: Tensor, **settings: Any) -> Tensor: ...


def torch_engine(checkpoint: Path, store: Path, **options: Any) -> Engine:
    """Built, loaded and run by TorchRunner."""
    return Engine(make_engine(checkpoint, store, **options))


def check_family(
    checkpoint: Path,
    reference: Reference,
    tmp_path: Path,
    lengths: tuple[int, ...] = (1, 70, 33),
    *,
    make: Callable[..., Engine] = torch_engine,
    new_tokens: int = NEW_TOKENS,
    **options: Any,
) -> None:
    """Ragged prompts in chunks of at most 64 tokens: every row's logits within 1e-4 of the reference's, then its greedy tokens.

    Args:
        lengths: of the prompts.
        make: makes what runs a checkpoint, as `torch_engine` does.
        new_tokens: of each continuation.
        options: of the build; the reference lies on its device.
    """
    engine = make(checkpoint, tmp_path / "store", **{"max_num_tokens": 64, **options})
    device = engine.device
    torch.manual_seed(3)
    prompts = [torch.randint(2, VOCAB_SIZE, (length,)).tolist() for length in lengths]
    sequences = [
        Sequence(0, row, list(prompt), len(prompt), new_tokens, Sampling(0.0)) for row, prompt in enumerate(prompts)
    ]
    rows = watch(engine)
    engine.run(sequences)
    for sequence, prompt in zip(sequences, prompts, strict=True):
        with torch.inference_mode():
            wanted = reference(torch.tensor([prompt], device=device)).logits[0].float()
        found = torch.stack([rows[sequence.handle, position] for position in range(len(prompt))])
        assert (found - wanted).abs().max() < 1e-4, f"{len(prompt)} tokens: {(found - wanted).abs().max():.2e}"
        assert sequence.token_ids == continuation(reference, prompt, device, new_tokens)


def reference_of(checkpoint: Path, attention: str = "eager") -> Reference:
    """The model as transformers reads it."""
    model = transformers.AutoModelForCausalLM.from_pretrained(
        checkpoint, dtype=torch.float32, attn_implementation=attention
    )
    return model.eval()


def check_half_precision(checkpoint: Path, tmp_path: Path) -> LoadedEngine:
    """Teacher-forced, in bfloat16: each greedy token's reference logit is within 0.02 of the largest magnitude of the best."""
    loaded = make_engine(checkpoint, tmp_path / "half", dtype="bfloat16")
    reference = reference_of(checkpoint)
    sequence = Sequence(0, 0, list(range(2, 30)), 28, 40, Sampling(0.0))
    Engine(loaded).run([sequence])
    with torch.inference_mode():
        logits = reference(torch.tensor([sequence.token_ids])).logits[0, 27:-1]
    for row, token in zip(logits, sequence.token_ids[28:], strict=True):
        assert row[token] >= row.max() - 0.02 * row.abs().max()
    return loaded


def watch(engine: Engine) -> dict[tuple[int, int], Tensor]:
    """Filled as the engine runs: (handle, position) -> logits [vocab_size], as they were first computed."""
    rows: dict[tuple[int, int], Tensor] = {}
    runner = engine.runner

    @torch.inference_mode()
    def start(batch: Batch) -> None:
        items = tuple(item._replace(prompt_rows=range(item.start, item.start + item.count)) for item in batch.items)
        logits = runner._logits(runner._layout.lay_out(replace(batch, items=items)))
        assert logits is not None
        at = sampled = sum(item.samples for item in items)
        for item in items:
            for position in range(item.start, item.start + item.count):
                rows.setdefault((item.sequence.handle, position), logits[at])
                at += 1
        runner._started.append((batch, sampled, logits[:sampled]))

    runner.start = start  # type: ignore[method-assign]
    return rows


def continuation(
    reference: Reference, prompt: list[int], device: str = "cpu", new_tokens: int = NEW_TOKENS
) -> list[int]:
    """The prompt and its greedy continuation by transformers."""
    ids = torch.tensor([prompt], device=device)
    text = reference.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=new_tokens,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    return text[0].tolist()
