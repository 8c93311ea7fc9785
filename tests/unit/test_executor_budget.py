"""How much memory there is, and the sizes and shares that an executor is given."""

import argparse
from pathlib import Path

import pytest

from builder_svc.build_config import BuildConfig
from builder_svc.pipeline import build
from engine import blobs
from engine.directory import DirectoryStore
from engine.errors import ResourceExhausted
from engine.program import Program
from executor_svc import __main__ as executor
from executor_svc import budget
from protos import options
from tests.conftest import save_checkpoint


def test_a_control_group_leaves_what_it_does_not_use_and_files_that_can_be_read_again(tmp_path: Path) -> None:
    second, first, free = tmp_path / "second", tmp_path / "first", tmp_path / "free"
    for folder in (second, first, free):
        folder.mkdir()
    (second / "memory.max").write_text("1000\n")
    (second / "memory.current").write_text("700\n")
    (second / "memory.stat").write_text("anon 500\ninactive_file 150\n")
    assert budget._left(second) == 450
    (first / "memory.limit_in_bytes").write_text("2000\n")
    (first / "memory.usage_in_bytes").write_text("2500\n")
    (first / "memory.stat").write_text("inactive_file 1\ntotal_inactive_file 100\n")
    assert budget._left(first) == 0
    (free / "memory.max").write_text("max\n")
    (free / "memory.current").write_text("700\n")
    (free / "memory.stat").write_text("anon 500\n")
    assert budget._left(free) == budget._left(tmp_path) == float("inf")


def test_a_limit_counts_as_the_machines_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = budget.available()
    assert 1 << 20 < whole < 1 << 50
    (tmp_path / "memory.max").write_text(f"{5 << 20}")
    (tmp_path / "memory.current").write_text(f"{1 << 20}")
    (tmp_path / "memory.stat").write_text("inactive_file 0\n")
    monkeypatch.setattr(budget, "_groups", lambda: [tmp_path, tmp_path.parent])
    assert budget.available() == 4 << 20


def test_random_weights_count_and_those_of_other_machines_do_not(tmp_path: Path) -> None:
    store = DirectoryStore(tmp_path / "store")
    checkpoint = save_checkpoint(tmp_path / "model", num_hidden_layers=1)
    ranks = [
        build(checkpoint, BuildConfig(tp_size=2, dummy_weights=dummy), store=store).manifest for dummy in (True, False)
    ]
    for manifest in ranks:
        programs = [Program.from_json(blobs.read(store, rank.program)) for rank in manifest.ranks]
        sizes = [sum(declared.nbytes for declared in program.weights.values()) for program in programs]
        found = budget.weights(store, manifest, "cpu")
        assert all(
            size <= each <= size + 20_000 for size, each in zip(sizes, found, strict=True)
        )  # with files' headers
        for device, machines in (("cpu", 2), ("cuda", 1)):
            assert [budget.weights(store, manifest, device, rank, machines) for rank in (0, 1)] == [
                found[:1],
                found[1:],
            ]
        cache = manifest.limits.max_seq_len * manifest.model.kv_bytes_per_token
        for here in (found, found[1:]):
            need = sum(here) + cache * len(here) // 2
            budget.Budget("cpu", need).check(manifest, here, None)
            with pytest.raises(ResourceExhausted, match="needs"):
                budget.Budget("cpu", need - 1).check(manifest, here, None)


@pytest.mark.parametrize(("text", "size"), [("1", 1), ("64000000", 64_000_000), ("2k", 2000), ("20G", 20_000_000_000)])
def test_sizes(text: str, size: int) -> None:
    assert executor._size(text) == size


@pytest.mark.parametrize("text", ["", "0", "-1", "1.5G", "G", "1g", "1GB", "٣", "1" * 30])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="such as 20G"):
        executor._size(text)


@pytest.mark.parametrize("text", ["0", "1.1", "-0.5", "nan", "half"])
def test_what_is_no_share_is_refused(text: str) -> None:
    assert executor._share("0.4") == 0.4 and executor._share("1") == 1
    with pytest.raises(argparse.ArgumentTypeError, match="at most 1"):
        executor._share(text)


@pytest.mark.parametrize("text", ["-1", "inf", "nan", "soon"])
def test_what_is_no_time_is_refused(text: str) -> None:
    assert options._seconds("0") == 0 and options._seconds("2.5") == 2.5
    with pytest.raises(argparse.ArgumentTypeError, match="give 0 or more"):
        options._seconds(text)


def test_bytes_for_people() -> None:
    assert [budget.size(count) for count in (0, 999, 1000, 1_234_000, 15_200_000_000)] == [
        "0 B", "999 B", "1 kB", "1.23 MB", "15.2 GB",
    ]  # fmt: skip
