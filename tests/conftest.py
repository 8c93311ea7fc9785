"""Checkpoints that transformers makes, small and odd; engines built of them."""

import contextlib
import copy
import os
import random
import signal
import subprocess
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from tests.interpreted import patch_once

if not Path("/dev/nvidiactl").exists():
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports Triton, which decides then
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a background job's children would, too
    signal.signal(signal.SIGINT, signal.default_int_handler)
os.environ["OMP_NUM_THREADS"] = "1"  # these models are small: a second thread costs more than it gives


LONGEST = (
    "test_endurance_drill.py", "test_tensorrt_families.py", "test_cuda_integers.py", "test_cuda_families.py", "test_fuzz.py",
    "test_compile.py",
)  # fmt: skip
"""Files that take longest behind the integration tests, or as a drill."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long files first, then those of the services: what is left at the end is short, and no core waits for the other."""
    items.sort(key=lambda item: item.path.name not in LONGEST)


def pytest_collection_finish() -> None:
    """Triton imports its interpreter with the first kernel."""
    if interpreter := sys.modules.get("triton.runtime.interpreter"):
        patch_once(interpreter)


VOCAB_SIZE = 320
TEXT = "In the beginning God created the heaven and the earth. And the earth was without form, and void; 你好 🙂"


def save_tokenizer(directory: Path) -> None:
    """A byte-level BPE tokenizer of at most VOCAB_SIZE ids: <s>, </s>, 256 bytes, a few merges."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    tokenizer.save(str(directory / "tokenizer.json"))
    # some families' own tokenizer classes would add tokens of theirs
    (directory / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')


def save_checkpoint(directory: Path, family: str = "llama", **changes: Any) -> Path:
    """A random model in Hugging Face layout, float32.

    Args:
        family: a model_type of transformers.
        changes: of its config.
    """
    import torch
    import transformers

    settings = {
        "vocab_size": VOCAB_SIZE, "hidden_size": 48, "intermediate_size": 72, "num_hidden_layers": 3, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 256, "bos_token_id": 0, "eos_token_id": 1, "initializer_range": 0.2,
        **copy.deepcopy(changes),  # in which configs write their defaults
    }  # fmt: skip
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(family, **settings)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:  # biases begin as zeros and norms as ones, which would hide one that is left out
                parameter += torch.randn_like(parameter) * 0.2
    model.save_pretrained(directory)
    save_tokenizer(directory)
    return directory


@pytest.fixture(autouse=True)
def own_numbers(request: pytest.FixtureRequest) -> None:
    """What a test draws does not depend on what this process has run before it, and is another's only by chance: such as ids."""
    seed = zlib.crc32(request.node.nodeid.encode())
    random.seed(seed)
    if torch := sys.modules.get("torch"):
        torch.manual_seed(seed)
    if numpy := sys.modules.get("numpy"):
        numpy.random.seed(seed)


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """The person's own cache is left alone."""
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LLaMA with an odd head_dim and grouped queries."""
    return save_checkpoint(tmp_path_factory.mktemp("llama"), head_dim=20, num_attention_heads=6, num_key_value_heads=2)


@contextlib.contextmanager
def small_file_system(mount: Path, size: str) -> Iterator[Path]:
    """A file system of `size`, such as "1m", at a new directory; skips the test where none can be mounted."""
    mount.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", mount]
    made = subprocess.run(command, capture_output=True, text=True)
    if made.returncode:
        pytest.skip(f"cannot mount a small tmpfs: {made.stderr.strip()}")
    yield mount
    subprocess.run(["umount", "--lazy", mount], check=True)
