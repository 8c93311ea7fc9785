"""One gateway process: tokens a second to many streaming clients, their gaps, and what it adds to the first token.

python bench/gateway.py [--clients 128] [--rate 63000] [--seconds 10] [--out FILE.json]; status 1 if a bound does not hold.

The gateway is the real one, started by its own command, with the demo model's tokenizer. Before it stands an executor that
computes nothing: it serves Executor.Run and gives every request the next token of a text at each step, in columns. Clients are
streams of separate processes, a connection each. The second phase has half of the clients, with as many tokens a second each.
Beside both, single requests are sent in turn through the gateway and to the executor itself.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from engine.directory import DirectoryStore
from tests import tokenizer_engine
from tests.integration.services import service

ROOT = Path(__file__).parents[1]
CHECKPOINT = ROOT / "examples" / "demo-model"
LEAST_RATE, MOST_GAP, MOST_ADDED = 60_000, 20.0, 2.0  # tokens/s, ms between a stream's responses, ms to the first token
MAX_SEQ_LEN = 8192
WARM_UP = 5.0  # seconds
CLIENT_PROCESSES = 2


def publish(store: DirectoryStore) -> str:
    """An engine with a real tokenizer, whose weights nobody will ask for; its id."""
    files = {name: (CHECKPOINT / name).read_bytes() for name in ("tokenizer.json", "tokenizer_config.json")}
    vocab_size = json.loads((CHECKPOINT / "config.json").read_text())["vocab_size"]
    return tokenizer_engine.publish(store, "demo", files, {"bench": "gateway"}, vocab_size, MAX_SEQ_LEN)


@contextmanager
def role(name: str, *arguments: object) -> Iterator["subprocess.Popen[str]"]:
    """A process that plays one part."""
    command = [sys.executable, "-m", "bench.gateway_roles", name, *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONSAFEPATH": "1"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    try:
        yield process
    finally:
        process.terminate()
        process.wait()


def cpu_seconds(pid: int) -> float:
    """That a process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def line(process: "subprocess.Popen[str]") -> str:
    if process.stdout is None or not (said := process.stdout.readline().strip()):
        raise SystemExit(f"{process.args} said nothing")
    return said


def measure(directory: Path, clients: int, rate: float, seconds: float) -> dict[str, float]:
    """One phase, with probes beside the clients."""
    store = str(directory / "store")
    engine_id = publish(DirectoryStore(Path(store)))
    with ExitStack() as stack:
        executor = line(stack.enter_context(role("executor", engine_id, rate / clients)))
        gateway = stack.enter_context(
            service("gateway", directory / "gateway.log", "--store", store, "--executor", executor)
        )
        time.sleep(1)  # until it is connected
        begin = time.monotonic() + WARM_UP
        end = begin + seconds
        counts = [len(range(number, clients, CLIENT_PROCESSES)) for number in range(CLIENT_PROCESSES)]
        streams = [stack.enter_context(role("clients", gateway.address, count, begin, end)) for count in counts]
        probe = stack.enter_context(role("probe", gateway.address, executor, engine_id, begin, end))
        time.sleep(begin - time.monotonic())
        before = cpu_seconds(gateway.process.pid)
        time.sleep(end - time.monotonic())
        used = cpu_seconds(gateway.process.pid) - before
        told = [json.loads(line(process)) for process in streams]
        first = json.loads(line(probe))
    tokens, messages = (sum(part[name] for part in told) for name in ("tokens", "messages"))
    gaps = sorted(gap for part in told for gap in part["gaps"])
    if not (gaps and first["through"] and first["direct"]):
        raise SystemExit("nothing was delivered in the time of the measurement: is the machine busy?")
    return {
        "tokens_per_second": round(tokens / seconds),
        "messages_per_second": round(messages / seconds),
        "gateway_cpu_share": round(used / seconds, 3),
        "gateway_cpu_seconds_per_1000_tokens": round(1000 * used / tokens, 5),
        "gateway_cpu_us_per_message": round(1e6 * used / messages, 1),
        "gap_ms_median": gaps[len(gaps) // 2],
        "gap_ms_p99": gaps[len(gaps) * 99 // 100],
        "first_token_ms_through_gateway": round(statistics.median(first["through"]), 3),
        "first_token_ms_direct": round(statistics.median(first["direct"]), 3),
        "first_token_ms_added": round(statistics.median(first["through"]) - statistics.median(first["direct"]), 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=128)
    parser.add_argument("--rate", type=float, default=63_000, help="tokens a second that the executor makes")
    parser.add_argument("--seconds", type=float, default=10)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    results: dict[str, Any] = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": subprocess.run(
            ["git", "describe", "--always", "--abbrev=40", "--dirty"], cwd=ROOT, capture_output=True, text=True
        ).stdout.strip(),
        "device": f"{platform.machine()}, {os.cpu_count()} cores",
        "clients": arguments.clients,
        "offered_tokens_per_second": arguments.rate,
    }
    for name, part in (("full", 1), ("half", 2)):
        with tempfile.TemporaryDirectory() as directory:
            clients, rate = arguments.clients // part, arguments.rate / part
            results[name] = measure(Path(directory), clients, rate, arguments.seconds)
        print(f"{name} load")
        for key, value in results[name].items():
            print(f"  {key:38s} {value:10g}", flush=True)
    if arguments.out:
        arguments.out.write_text(json.dumps(results, indent=1) + "\n")
    full, half = results["full"], results["half"]
    failed = [
        said
        for holds, said in (
            (full["tokens_per_second"] >= LEAST_RATE, f"fewer than {LEAST_RATE} tokens/s"),
            (full["gap_ms_median"] <= MOST_GAP, f"a median of more than {MOST_GAP:g} ms between responses of a stream"),
            (half["first_token_ms_added"] <= MOST_ADDED, f"more than {MOST_ADDED:g} ms added to the first token"),
        )
        if not holds
    ]
    if failed:
        raise SystemExit("; ".join(failed))


if __name__ == "__main__":
    main()
