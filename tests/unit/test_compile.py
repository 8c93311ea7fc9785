"""Kernels that travel in an engine: compiled without a GPU, found by Triton, and code that must be trusted."""

import io
import logging
import os
import subprocess
import sys
import tarfile
import tempfile
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import msgspec
import pytest

from builder_svc.build_config import BuildConfig
from builder_svc.pipeline import build
from engine import blobs, signing
from engine.directory import DirectoryStore
from engine.errors import DataLoss, FailedPrecondition
from engine.manifest import Limits, Manifest
from engine.trust import Trust
from tests.conftest import save_checkpoint

pytest.importorskip("triton")
archives = pytest.importorskip("executor_svc.kernel_archive")
tactics = pytest.importorskip("executor_svc.kernels.tactics")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> DirectoryStore:
    return DirectoryStore(tmp_path_factory.mktemp("store"))


@pytest.fixture(scope="module")
def engine(store: DirectoryStore, tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    """For compute capability 9.0, of few shapes."""
    checkpoint = save_checkpoint(
        tmp_path_factory.mktemp("model"), num_hidden_layers=1, head_dim=64, num_attention_heads=2, num_key_value_heads=1
    )
    options = BuildConfig(
        dtype="bfloat16",
        device="cuda",
        compute_capability="9.0",
        max_batch_size=6,
        max_seq_len=256,
        max_num_tokens=192,
        dummy_weights=True,
    )
    return build(checkpoint, options, store=store).manifest


def members(archive: bytes) -> dict[str, bytes]:
    with tarfile.open(fileobj=io.BytesIO(archive)) as opened:
        return {member.name: opened.extractfile(member).read() for member in opened}  # type: ignore[union-attr]


def tar(files: dict[str, bytes], kind: bytes = tarfile.REGTYPE) -> bytes:
    output = io.BytesIO()
    with tarfile.open(fileobj=output, mode="w") as opened:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size, member.type, member.linkname = len(data), kind, "elsewhere"
            opened.addfile(member, io.BytesIO(data))
    return output.getvalue()


def test_a_second_start_compiles_nothing(store: DirectoryStore, engine: Manifest, tmp_path: Path) -> None:
    """Neither for what the builder has walked through nor for what requests want. What the archive has not is compiled."""
    (ref,) = engine.ranks[0].kernels
    assert ref.name == archives.archive_name("9.0") and ref in engine.files()
    assert engine.identity["kernels"]["triton"] in ref.name
    files = members(blobs.read(store, ref))
    kernels = [name for name in files if name.endswith(".cubin")]
    names = {name.partition("/")[2] for name in kernels}
    assert {"_prompt.cubin", "_prefill.cubin", "_decode.cubin", "_gemv.cubin", "_thin.cubin", "_put.cubin"} <= names
    assert all(files[name].startswith(b"\x7fELF") for name in kernels)
    for place in (
        str(Path(archives.__file__).parent),
        tempfile.gettempdir(),
    ):  # or they would differ from build to build
        assert not any(place.encode() in data for data in files.values())
    lost = next(name for name in kernels if "_silu_mul" in name)
    (tmp_path / "program.json").write_bytes(blobs.read(store, engine.ranks[0].program))
    limits = msgspec.json.encode(engine.limits).decode()
    compiling = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    for number, left in enumerate((files, {name: data for name, data in files.items() if name[:9] != lost[:9]})):
        (tmp_path / "kernels.tar").write_bytes(tar(left))
        arguments = [tmp_path / "program.json", limits, tmp_path / "kernels.tar", tmp_path / f"cache{number}"]
        command = [sys.executable, "-m", "tests.kernel_traffic", *arguments]
        done = subprocess.run(command, env=compiling, check=True, stdout=subprocess.PIPE)
        assert msgspec.json.decode(done.stdout) == [len(kernels) - number, ["_silu_mul"] * number, []]


def test_weights_of_a_few_numbers_may_lie_anywhere() -> None:
    """The store aligns them to a number of their own, and a kernel for multiples of 16 bytes would be another at a start."""
    program = """
from executor_svc.kernels import ends, fp8, reduce
for module in (ends, fp8, reduce):
    for kernel in vars(module).values():
        for parameter in getattr(kernel, "params", ()):
            if parameter.name in ("first", "inv_freq", "input_scale"):
                print(kernel.__name__, parameter.name, parameter.do_not_specialize_on_alignment)
"""
    compiling = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    told = subprocess.run([sys.executable, "-c", program], env=compiling, check=True, capture_output=True, text=True)
    launched = {line for line in told.stdout.splitlines() if not line.startswith("keep ")}  # a function of theirs
    assert launched == {
        f"{kernel} True"
        for kernel in (
            "_take first", "_rope_table inv_freq", "_quantize input_scale", "_norm input_scale", "_silu_mul_rounded input_scale",
            "_reduce input_scale",
        )
    }  # fmt: skip


def test_the_same_kernels_give_the_same_bytes(store: DirectoryStore, engine: Manifest, tmp_path: Path) -> None:
    archive = blobs.read(store, engine.ranks[0].kernels[0])
    count = sum(name.endswith(".cubin") for name in members(archive))
    assert archives.unpack(archive, tmp_path) == (count, {})
    (tmp_path / next(tmp_path.iterdir()).name / "__grp__kernel.json").write_text("{}")  # names paths of the cache
    assert archives.pack(tmp_path) == archive
    table = {tactics.Product(4, 96, 64, "dense"): tactics.Tactic("thin", tactics.Form(k=256, stages=3))}
    assert archives.unpack(archives.pack(tmp_path, table), tmp_path) == (count, table)


@pytest.mark.parametrize(
    "files",
    [{"../KEY/kernel.cubin": b""}, {"/KEY/kernel.cubin": b""}, {"KEY/../kernel.cubin": b""}, {"KEY/kernel.py": b""}],
)
def test_nothing_is_written_outside(files: dict[str, bytes], tmp_path: Path) -> None:
    with pytest.raises(DataLoss, match="is no file of a cache"):
        archives.unpack(tar(files), tmp_path / "inside")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE])
def test_only_files_are_unpacked(kind: bytes, tmp_path: Path) -> None:
    with pytest.raises(DataLoss, match="is no file of a cache"):
        archives.unpack(tar({"KEY/kernel.cubin": b""}, kind), tmp_path)
    assert not list(tmp_path.iterdir())


def test_what_is_no_archive_is_told(tmp_path: Path) -> None:
    with pytest.raises(DataLoss, match="no archive"):
        archives.unpack(b"kernels" * 200, tmp_path)


def test_kernels_that_nobody_trusts_are_left_alone(
    store: DirectoryStore,
    engine: Manifest,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """The engine is used all the same; one line says why it takes longer, and what to do."""
    adopted: list[bytes] = []
    monkeypatch.setattr(archives, "adopt", lambda data: adopted.append(data) or (1, {}))
    monkeypatch.setattr(archives.knobs.compilation, "listener", None)
    assert Trust().admit(store, engine.engine_id) == engine
    archives.adopt_from(store, engine, Trust(), "9.0")
    (line,) = caplog.messages
    assert "compiled again here" in line and "--trust-native" in line and not adopted
    private = signing.generate(tmp_path / "key")
    signing.sign(store, engine.engine_id, private)
    for trust in (Trust(native=True), Trust((private.public,))):
        assert trust.admit(store, engine.engine_id) == engine
        archives.adopt_from(store, engine, trust, "9.0")
    assert len(adopted) == 2 and len(caplog.messages) == 1


def test_kernels_for_another_gpu_are_left_alone(
    store: DirectoryStore, engine: Manifest, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        archives.adopt_from(store, engine, Trust(native=True), "8.9")
    (line,) = caplog.messages
    assert line.endswith(
        f"has {archives.archive_name('9.0')}, and not {archives.archive_name('8.9')}: kernels are compiled here"
    )


def test_only_an_engine_for_one_kind_of_gpu_has_kernels(store: DirectoryStore, tmp_path: Path) -> None:
    checkpoint = save_checkpoint(tmp_path / "model", num_hidden_layers=1)
    for options in (BuildConfig(), BuildConfig(device="cuda", dtype="bfloat16", dummy_weights=True)):
        built = build(checkpoint, options, store=store).manifest
        assert not built.ranks[0].kernels and "kernels" not in built.identity


def test_a_builder_without_triton_says_so(
    store: DirectoryStore, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its engine is another one than that with kernels: what comes later does not depend on who was first."""

    def version(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr("builder_svc.kernels.version", version)
    checkpoint = save_checkpoint(tmp_path / "model", num_hidden_layers=1)
    options = BuildConfig(device="cuda", compute_capability="9.0", dtype="bfloat16", dummy_weights=True)
    with caplog.at_level(logging.INFO):
        manifest = build(checkpoint, options, store=store).manifest
    assert "kernels" not in manifest.identity and not manifest.ranks[0].kernels
    assert any("Triton is not installed here" in line for line in caplog.messages)


def test_a_tool_that_would_compile_nothing_says_so(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "executor_svc.compile",
        "program.json",
        "--limits",
        "{}",
        "--compute-capability",
        "9.0",
    ]
    command += ["--out", str(tmp_path / "kernels.tar")]
    done = subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert done.returncode == 2 and "TRITON_INTERPRET is set" in done.stderr


def test_a_program_without_kernels_of_ours_has_none(store: DirectoryStore, tmp_path: Path) -> None:
    checkpoint = save_checkpoint(tmp_path / "model", num_hidden_layers=1)
    options = BuildConfig(device="cuda", compute_capability="9.0", dtype="float32", dummy_weights=True)
    assert not build(checkpoint, options, store=store).manifest.ranks[0].kernels


def test_what_a_killed_worker_has_left_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And nothing that a living one uses."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    left, used, other = (tmp_path / f"enginehouse-kernels-{name}-x" for name in (ended.pid, os.getpid(), "mine"))
    for directory in (left, used, other):
        directory.mkdir()
    archives._clear()
    assert not left.exists() and used.exists() and other.exists()


def test_too_little_memory_is_told_with_what_would_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from executor_svc import runners
    from executor_svc.group import ALONE

    def full(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(runners, "TorchRunner", full)
    settings = {"device": "cpu", "group": ALONE, "table": {}, "kv_memory": None, "kv_share": None}
    with pytest.raises(
        FailedPrecondition, match="smaller --kv-memory, .* less than max_batch_size 4 or max_num_tokens 64"
    ):
        runners.make_runner(None, {}, Limits(4, 64, 64), **settings)  # type: ignore[arg-type]
