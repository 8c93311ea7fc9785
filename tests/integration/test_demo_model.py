"""The bundled checkpoint: what transformers says, token for token, in every situation; and that its text is English."""

import gzip
import json
import random
import re
from pathlib import Path

import pytest
import torch
import transformers
from tokenizers import Tokenizer

from executor_svc.core import Sampling, Sequence
from executor_svc.loader import LoadedEngine
from tests.running import Engine, make_engine

DEMO = Path(__file__).parents[2] / "examples" / "demo-model"
COUNT, LENGTH = 32, 64  # requests at once, tokens each
TEXT = (
    "In the beginning God created the heaven and the earth. And the earth was without form, and void; and darkness was upon "
    "the face of the deep. And the Spirit of God moved upon the face of the waters. And God said, Let there be light: "
)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(DEMO / "tokenizer.json"))


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> LoadedEngine:
    """In float32, with chunks that are shorter than most prompts."""
    return make_engine(DEMO, tmp_path_factory.mktemp("store"), dtype="float32", max_seq_len=512, max_num_tokens=96)


@pytest.fixture(scope="module")
def prompts(tokenizer: Tokenizer) -> list[list[int]]:
    """Of 1 to about 300 tokens; some begin alike."""
    numbers, ids = random.Random(0), tokenizer.encode(TEXT * 4, add_special_tokens=False).ids
    starts = [numbers.choice([0, 0, numbers.randrange(len(ids) // 2)]) for _ in range(COUNT)]
    return [ids[start : start + numbers.choice([1, 7, 40, 150, 300])] for start in starts]


@pytest.fixture(scope="module")
def greedy(prompts: list[list[int]]) -> list[list[int]]:
    """What transformers generates of each prompt; prompts of one length are one batch, so that none is padded."""
    model = transformers.AutoModelForCausalLM.from_pretrained(DEMO, dtype=torch.float32).eval()
    found: dict[int, list[int]] = {}
    for length in {len(prompt) for prompt in prompts}:
        rows = [row for row, prompt in enumerate(prompts) if len(prompt) == length]
        ids = torch.tensor([prompts[row] for row in rows])
        settings = {"max_new_tokens": LENGTH, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        for row, text in zip(
            rows, model.generate(ids, attention_mask=torch.ones_like(ids), **settings).tolist(), strict=True
        ):
            found[row] = text[length:]
    return [found[row] for row in range(len(prompts))]


def sequences(prompts: list[list[int]], sampling: Sampling = Sampling(0.0)) -> list[Sequence]:  # noqa: B008
    return [Sequence(0, row, list(prompt), len(prompt), LENGTH, sampling) for row, prompt in enumerate(prompts)]


def texts(run: list[Sequence]) -> list[list[int]]:
    return [sequence.token_ids[sequence.prompt_len :] for sequence in run]


def test_greedy_alone(loaded: LoadedEngine, prompts: list[list[int]], greedy: list[list[int]]) -> None:
    for sequence, text in list(zip(sequences(prompts), greedy, strict=True))[::4]:
        Engine(loaded).run([sequence])
        assert texts([sequence]) == [text]


def test_greedy_among_others_and_with_cached_prefixes(
    loaded: LoadedEngine, prompts: list[list[int]], greedy: list[list[int]]
) -> None:
    engine = Engine(loaded)
    first, again = sequences(prompts), sequences(prompts)
    engine.run(first)
    engine.run(again)
    assert texts(first) == texts(again) == greedy
    assert sum(sequence.num_cached or 0 for sequence in again) > 0.7 * sum(len(prompt) for prompt in prompts)


def test_greedy_across_preemption(loaded: LoadedEngine, prompts: list[list[int]], greedy: list[list[int]]) -> None:
    engine, run = Engine(loaded, kv_blocks=40), sequences(prompts)
    engine.run(run)
    assert engine.scheduler.num_preemptions > 0
    assert texts(run) == greedy


def test_a_seed_gives_one_text_in_any_batch(loaded: LoadedEngine, prompts: list[list[int]]) -> None:
    sampling = Sampling(0.9, top_k=50, top_p=0.95, seed=12345)
    together, tight = sequences(prompts[::2], sampling), sequences(prompts[::2], sampling)
    Engine(loaded).run(together)
    preempting = Engine(loaded, kv_blocks=40)
    preempting.run(tight)
    assert preempting.scheduler.num_preemptions > 0
    alone = sequences(prompts[::2], sampling)[::5]
    for sequence in alone:
        Engine(loaded).run([sequence])
    assert texts(together) == texts(tight)
    assert texts(together)[::5] == texts(alone)
    other = sequences(prompts[:4], Sampling(0.9, top_k=50, top_p=0.95, seed=54321))
    Engine(loaded).run(other)
    assert texts(other) != texts(together)[:4]


def test_sampled_words_are_words(loaded: LoadedEngine, tokenizer: Tokenizer) -> None:
    """At least 95% of the words in 1,000 sampled tokens occur in the corpus; the first and last of a text may be cut."""
    corpus = set(gzip.decompress((DEMO / "words.txt.gz").read_bytes()).decode().split())
    eos = json.loads((DEMO / "config.json").read_text())["eos_token_id"]
    run = [Sequence(0, row, [eos], 1, 250, Sampling(0.8, top_p=0.95, seed=row)) for row in range(4)]
    Engine(loaded).run(run)
    words = []
    for text in texts(run):
        assert len(text) == 250
        found = re.findall(r"[A-Za-z']+", tokenizer.decode(text))
        words += [word.strip("'").lower() for word in found[1:-1]]
    known = [word for word in words if word in corpus or not word]
    assert len(words) > 400
    assert len(known) >= 0.95 * len(words), sorted(set(words) - corpus)
