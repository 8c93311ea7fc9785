"""One gateway process: tokens a second to many streaming clients, their gaps, and what it adds to the first token.

python bench/gateway.py [--tls] [--clients 128] [--rate 63000] [--seconds 10] [--idle 2000] [--out FILE.json]
Status 1 if a bound does not hold.

The gateway is the real one, started by its own command, with the demo model's tokenizer. Before it stands an executor that
computes nothing: it serves Executor.Run and gives every request the next token of a text at each step, in columns. Clients are
streams of separate processes, a connection each. The second phase has half of the clients, with as many tokens a second each.
Beside both, single requests are sent in turn through the gateway and to the executor itself. At last connections are opened that
do nothing. The gateway has its metrics on; with --tls it speaks TLS with all clients.
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
from enginehouse.certificates import generate
from tests import tokenizer_engine
from tests.integration.services import Service, service

ROOT = Path(__file__).parents[1]
CHECKPOINT = ROOT / "examples" / "demo-model"
LEAST_RATE, LEAST_TLS_RATE = 60_000, 45_000  # tokens/s
MOST_GAP, MOST_ADDED, MOST_ADDED_P99 = 20.0, 2.0, 10.0  # ms between a stream's responses, ms to the first token
MOST_MEMORY = 200  # MB of a gateway with all idle connections
MAX_SEQ_LEN = 8192
WARM_UP = 5.0  # seconds
CLIENT_PROCESSES = 2


def publish(store: DirectoryStore) -> str:
    """An engine with a real tokenizer, whose weights nobody will ask for; its id."""
    config = json.loads((CHECKPOINT / "tokenizer_config.json").read_text())
    texts = {name: value for name, value in config.items() if isinstance(value, str)}  # as a builder writes it
    files = {
        "tokenizer.json": (CHECKPOINT / "tokenizer.json").read_bytes(),
        "tokenizer_config.json": json.dumps(texts).encode(),
    }
    vocab_size = json.loads((CHECKPOINT / "config.json").read_text())["vocab_size"]
    return tokenizer_engine.publish(store, "demo", files, {"bench": "gateway"}, vocab_size, MAX_SEQ_LEN)


@contextmanager
def role(name: str, *arguments: object, ca: Path | None = None) -> Iterator["subprocess.Popen[str]"]:
    """A process that plays one part; with `ca` it speaks TLS."""
    command = [sys.executable, "-m", "bench.gateway_roles", name, *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONSAFEPATH": "1"}
    environment |= {"ENGINEHOUSE_TLS_CA": str(ca)} if ca else {}
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


def resident(pid: int) -> float:
    """MB of memory of a process."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


def line(process: "subprocess.Popen[str]") -> str:
    if process.stdout is None or not (said := process.stdout.readline().strip()):
        raise SystemExit(f"{process.args} said nothing")
    return said


@contextmanager
def gateway(directory: Path, executor: str, tls: bool) -> Iterator[tuple[Service, Path | None]]:
    """A gateway of one executor, and the authority of its certificate."""
    arguments = ["--store", str(directory / "store"), "--executor", executor, "--metrics-port", "0"]
    certs = directory / "certs"
    if tls:
        generate(certs, ["127.0.0.1"])
        arguments += ["--tls-cert", f"{certs}/gateway.pem", "--tls-key", f"{certs}/gateway-key.pem"]
    with service("gateway", directory / "gateway.log", *arguments) as started:
        yield started, certs / "ca.pem" if tls else None


def measure_idle(directory: Path, count: int, tls: bool) -> dict[str, float]:
    """What connections cost that do nothing."""
    publish(DirectoryStore(directory / "store"))
    with gateway(directory, "127.0.0.1:1", tls) as (started, ca):
        before = resident(started.process.pid)
        with role("idle", started.address, count, ca=ca) as idle:
            stand = int(line(idle))
            time.sleep(1)
            after = resident(started.process.pid)
    return {
        "connections": stand,
        "gateway_mb_without": round(before, 1),
        "gateway_mb": round(after, 1),
        "kb_per_connection": round(1000 * (after - before) / stand, 1),
    }


def measure(directory: Path, clients: int, rate: float, seconds: float, tls: bool) -> dict[str, float]:
    """One phase, with probes beside the clients."""
    engine_id = publish(DirectoryStore(directory / "store"))
    with ExitStack() as stack:
        executor = line(stack.enter_context(role("executor", engine_id, rate / clients)))
        started, ca = stack.enter_context(gateway(directory, executor, tls))
        time.sleep(1)  # until it is connected
        begin = time.monotonic() + WARM_UP
        end = begin + seconds
        counts = [len(range(number, clients, CLIENT_PROCESSES)) for number in range(CLIENT_PROCESSES)]
        streams = [stack.enter_context(role("clients", started.address, count, begin, end, ca=ca)) for count in counts]
        probe = stack.enter_context(role("probe", started.address, executor, engine_id, begin, end, ca=ca))
        time.sleep(begin - time.monotonic())
        before = cpu_seconds(started.process.pid)
        time.sleep(end - time.monotonic())
        used = cpu_seconds(started.process.pid) - before
        told = [json.loads(line(process)) for process in streams]
        first = json.loads(line(probe))
    tokens, messages = (sum(part[name] for part in told) for name in ("tokens", "messages"))
    gaps = sorted(gap for part in told for gap in part["gaps"])
    if not (gaps and first["through"] and first["direct"]):
        raise SystemExit("nothing was delivered in the time of the measurement: is the machine busy?")
    through, direct = sorted(first["through"]), statistics.median(first["direct"])
    return {
        "tokens_per_second": round(tokens / seconds),
        "messages_per_second": round(messages / seconds),
        "gateway_cpu_share": round(used / seconds, 3),
        "gateway_cpu_seconds_per_1000_tokens": round(1000 * used / tokens, 5),
        "gateway_cpu_us_per_message": round(1e6 * used / messages, 1),
        "gap_ms_median": gaps[len(gaps) // 2],
        "gap_ms_p99": gaps[len(gaps) * 99 // 100],
        "first_token_ms_through_gateway": round(statistics.median(through), 3),
        "first_token_ms_direct": round(direct, 3),
        "first_token_ms_added": round(statistics.median(through) - direct, 3),
        "first_token_ms_added_p99": round(through[len(through) * 99 // 100] - direct, 3),
        "first_token_samples": len(through),
    }


def show(title: str, values: dict[str, float]) -> None:
    print(title)
    for key, value in values.items():
        print(f"  {key:38s} {value:10g}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=128)
    parser.add_argument("--rate", type=float, default=63_000, help="tokens a second that the executor makes")
    parser.add_argument("--seconds", type=float, default=10)
    parser.add_argument("--tls", action="store_true", help="between clients and the gateway")
    parser.add_argument("--idle", type=int, default=2000, help="connections that do nothing; 0 leaves them out")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    results: dict[str, Any] = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": subprocess.run(
            ["git", "describe", "--always", "--abbrev=40", "--dirty"], cwd=ROOT, capture_output=True, text=True
        ).stdout.strip(),
        "device": f"{platform.machine()}, {os.cpu_count()} cores",
        "clients": arguments.clients,
        "tls": arguments.tls,
        "offered_tokens_per_second": arguments.rate,
    }
    for name, part in (("full", 1), ("half", 2)):
        with tempfile.TemporaryDirectory() as directory:
            clients, rate = arguments.clients // part, arguments.rate / part
            results[name] = measure(Path(directory), clients, rate, arguments.seconds, arguments.tls)
        show(f"{name} load", results[name])
    if arguments.idle:
        with tempfile.TemporaryDirectory() as directory:
            results["idle"] = measure_idle(Path(directory), arguments.idle, arguments.tls)
        show("idle connections", results["idle"])
    if arguments.out:
        arguments.out.write_text(json.dumps(results, indent=1) + "\n")
    full, half, idle = results["full"], results["half"], results.get("idle", {"gateway_mb": 0})
    least = LEAST_TLS_RATE if arguments.tls else LEAST_RATE
    failed = [
        said
        for holds, said in (
            (full["tokens_per_second"] >= least, f"fewer than {least} tokens/s"),
            (full["gap_ms_median"] <= MOST_GAP, f"a median of more than {MOST_GAP:g} ms between responses of a stream"),
            (half["first_token_ms_added"] <= MOST_ADDED, f"more than {MOST_ADDED:g} ms added to the first token"),
            (
                half["first_token_ms_added_p99"] <= MOST_ADDED_P99,
                f"more than {MOST_ADDED_P99:g} ms added to one first token in a hundred",
            ),
            (idle["gateway_mb"] <= MOST_MEMORY, f"more than {MOST_MEMORY} MB with idle connections"),
        )
        if not holds
    ]
    if failed:
        raise SystemExit("; ".join(failed))


if __name__ == "__main__":
    main()
