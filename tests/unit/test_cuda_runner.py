"""The runner of CUDA on the CPU, by Triton's interpreter and without graphs: the tokens of the plain runner, a batch ahead."""

import os

import pytest

from engine.errors import FailedPrecondition
from engine.manifest import Limits
from executor_svc.core import Sampling, Sequence
from executor_svc.loader import LoadedEngine
from executor_svc.loop import scheduler_config
from executor_svc.runner import TorchRunner
from executor_svc.scheduler import Scheduler
from tests.conftest import save_checkpoint
from tests.running import Engine, make_engine, run_ahead

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif("TRITON_INTERPRET" not in os.environ, reason="tests/gpu runs them on the device")
cuda_runner = pytest.importorskip("executor_svc.cuda_runner")
cuda_layout = pytest.importorskip("executor_svc.cuda_layout")


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> LoadedEngine:
    checkpoint = save_checkpoint(tmp_path_factory.mktemp("tiny"), num_hidden_layers=1)
    return make_engine(
        checkpoint,
        tmp_path_factory.mktemp("store"),
        prepared=False,
        max_seq_len=64,
        max_batch_size=4,
        max_num_tokens=24,
    )


def sequences(count: int, temperature: float = 0.0) -> list[Sequence]:
    made = []
    for number in range(count):
        prompt = [(7 * number + 3 * at) % 60 for at in range(5 + 12 * number)]
        sampling = Sampling(temperature if number % 2 else 0.0, seed=number)
        made.append(Sequence(0, number, prompt, len(prompt), 6 + number, sampling, salt=b"%d" % (number % 2)))
    return made


@pytest.mark.parametrize(("temperature", "blocks"), [(0.0, 40), (0.8, 6)])
def test_gives_the_plain_runners_tokens(
    engine: LoadedEngine, temperature: float, blocks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Chunked prompts, cached prefixes, and with few blocks preemption; trials before leave nothing behind."""
    monkeypatch.setattr(
        "executor_svc.kernels.decodes.SPLITS_FOR", 8
    )  # fewer programs, each of which takes its time here
    expected = sequences(4, temperature)
    Engine(engine).run(expected)
    memory = (blocks + 1) * 16 * engine.manifest.model.kv_bytes_per_token
    runner = cuda_runner.CudaRunner(
        engine.program, engine.weights, engine.manifest.limits, kv_memory=memory, device="cpu"
    )
    runner.walk(cuda_layout.largest(engine.manifest.limits))
    scheduler = Scheduler(scheduler_config(runner, engine.manifest))
    found = sequences(4, temperature)
    run_ahead(runner, scheduler, found)
    assert [one.token_ids for one in found] == [one.token_ids for one in expected]


def test_no_share_of_the_memory_is_not_the_usual_share(engine: LoadedEngine) -> None:
    """Where weights have taken all of a limit, the free memory behind it is not this engine's."""
    for kind in (cuda_runner.CudaRunner, TorchRunner):
        with pytest.raises(FailedPrecondition, match="0 MiB of KV cache hold 0 tokens"):
            kind(engine.program, engine.weights, engine.manifest.limits, kv_share=0.0, device="cpu")


def test_memory_is_kept_for_the_largest_step(engine: LoadedEngine) -> None:
    """Of a layer gate, up, what the MLP makes of them, the residual and its input are there at once."""
    from executor_svc.cuda_graphs import memory, shapes
    from executor_svc.kernels.fuse import fuse

    program = fuse(engine.program)
    small, large = (Limits(2, 4096, tokens) for tokens in (1024, 4096))
    wide = next(op for op in program.ops if op.op == "linear_silu_mul").outputs[0].type
    per_token = 3 * int(wide.shape[-1]) * 4 + 2 * engine.manifest.model.hidden_size * 4
    assert memory(program, large) - memory(program, small) >= 3072 * per_token
    logits = sum(min(64, decodes + 16 * (tokens > decodes)) for decodes, tokens in shapes(Limits(64, 4096, 2048)))
    assert memory(program, Limits(64, 4096, 2048)) >= logits * engine.manifest.model.vocab_size * 4
