"""The executor service: python -m executor_svc --store URL --engine NAME."""

import argparse
import os
import re
import sys
from typing import TYPE_CHECKING

from engine.errors import InvalidArgument
from executor_svc.group_options import Place, add_group_options, find_place
from executor_svc.launch import Spares
from protos import tracing
from protos.options import add_drain, add_options

if TYPE_CHECKING:
    from protos.access import Access


def worker_arguments(arguments: argparse.Namespace) -> list[str]:
    """The command line of the workers."""
    command = ["--store", arguments.store, "--device", arguments.device]
    command += [option for path in arguments.trusted_keys for option in ("--trusted-keys", path)]
    command += ["--trust-native"] if arguments.trust_native else []
    command += ["--kv-memory", str(arguments.kv_memory)] if arguments.kv_memory else []
    command += ["--kv-share", str(arguments.kv_share)] if arguments.kv_share else []
    command += ["--max-waiting", str(arguments.max_waiting)] if arguments.max_waiting is not None else []
    command += ["--traces"] if arguments.traces else []
    command += ["--log-format", arguments.log_format, "--log-level", arguments.log_level]
    return command


async def run(arguments: argparse.Namespace, spares: Spares, place: Place) -> None:
    """Loads the engines that were asked for, then serves; on a machine that joins another one, lends it to that one."""
    from engine.trust import Trust
    from executor_svc.machines import Machines
    from executor_svc.server import ExecutorServicer
    from protos import rpc
    from protos.access import Access
    from protos.calls import Calls
    from protos.metrics import Metrics

    Trust.of_files(arguments.trusted_keys)  # a bad key file is told now, not when the first engine is loaded
    tracing.configure("executor", arguments.traces)
    access = Access.of("executor", arguments)
    if place.leader:
        await lend(arguments, spares, place.leader, place.index, access)
        return
    metrics = Metrics()
    access.watch(metrics)
    machines = Machines()  # this one alone, whose ranks listen for nobody else
    if place.machines > 1:
        machines = Machines(place.machines, arguments.host, arguments.device, arguments.join_timeout)
    calls = Calls(metrics)
    servicer = ExecutorServicer(arguments.store, arguments.device, spares, metrics, machines, arguments.memory)
    with metrics.served("executor", arguments.host, arguments.metrics_port):  # while engines are loaded, too
        try:
            if place.machines > 1:
                await machines.listen(place.port)
            for engine in arguments.engine:
                await servicer.open(engine)
        except BaseException:
            await servicer.close()
            raise
        await rpc.serve(
            "executor",
            servicer.register,
            arguments.host,
            arguments.port,
            before_stop=lambda: servicer.drain(arguments.drain_seconds),
            on_stop=servicer.close,
            calls=calls,
            access=access,
        )


async def lend(
    arguments: argparse.Namespace, spares: Spares, leader: tuple[str, int], index: int | None, access: "Access"
) -> None:
    """Joins the machine that leads, and answers for its own health alone."""
    from executor_svc.member import Member
    from protos import rpc
    from protos.calls import Calls
    from protos.metrics import Metrics

    metrics = Metrics()
    access.watch(metrics)
    member = Member(leader, spares, arguments.device, index)
    with metrics.served("executor", arguments.host, arguments.metrics_port):
        try:
            await member.join(arguments.join_timeout)
        except BaseException:
            await member.close()
            raise
        await rpc.serve(
            "executor",
            lambda _: None,
            arguments.host,
            arguments.port,
            on_stop=member.close,
            calls=Calls(metrics),
            access=access,
        )


def _count(text: str) -> int:
    if not (text.isascii() and text.isdigit()):
        raise argparse.ArgumentTypeError(f"{text!r} is no number of requests: give 0 or more")
    return int(text)


def _size(text: str) -> int:
    match = re.fullmatch("([0-9]{1,18})([kMGT]?)", text)
    if not match or not int(match[1]):
        raise argparse.ArgumentTypeError(f"{text!r} is no size: give bytes, or a number with k, M, G or T, such as 20G")
    return int(match[1]) * 1000 ** " kMGT".index(match[2] or " ")


def _share(text: str) -> float:
    try:
        found = float(text)
    except ValueError:
        found = 0.0
    if not 0 < found <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no share: give a number above 0, at most 1")
    return found


def main() -> int:
    """The process."""
    parser = argparse.ArgumentParser(
        prog="executor_svc", description="Loads engines from a store and streams tokens over gRPC."
    )
    parser.add_argument("--store", required=True, help="where the engines are: a directory, file:// or s3://")
    parser.add_argument(
        "--engine",
        action="append",
        default=[],
        help="model name, engine id or its first digits, to load before serving; may be repeated",
    )
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument(
        "--memory",
        type=_size,
        metavar="SIZE",
        help="that weights and KV caches of all engines may take together, of each device, such as 20G; default: what is free",
    )
    parser.add_argument(
        "--kv-memory",
        type=_size,
        metavar="SIZE",
        help="of KV cache an engine, or each rank of one; default: what it can use, up to --kv-share",
    )
    parser.add_argument(
        "--kv-share",
        type=_share,
        metavar="F",
        help="of the memory that is free beside its weights, what an engine's KV cache takes at most; default: 0.5 of main "
        "memory, 0.9 of a GPU's. For several engines on a GPU give less: each takes its share of what the ones before have left",
    )
    parser.add_argument(
        "--trusted-keys",
        action="append",
        default=[],
        metavar="FILE",
        help="run only engines that one of these public keys has signed: a PEM file or a directory of *.pem; may be repeated",
    )
    parser.add_argument(
        "--trust-native", action="store_true", help="run the native code of engines that nobody trusted has signed"
    )
    parser.add_argument(
        "--max-waiting",
        type=_count,
        metavar="N",
        help="requests of an engine that may wait beside those that run, more are refused; "
        "default: 16 times its max_batch_size, at least 1024",
    )
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8411, help="0 takes a free one")
    add_drain(parser)
    tracing.add_options(parser)
    add_group_options(parser)
    add_options(parser)
    arguments = parser.parse_args()
    try:
        place = find_place(arguments, os.environ)
    except InvalidArgument as error:
        parser.error(error.message)
    spares = Spares(worker_arguments(arguments))
    try:
        # While they import torch, this process imports grpc and finds out what --engine means.
        spares.prepare(max(1, len(arguments.engine)))
    except OSError as error:
        print(f"executor: cannot start a worker process: {error}", file=sys.stderr)
        spares.close()
        return 1
    try:
        from protos import rpc

        return rpc.main("executor", run(arguments, spares, place), arguments)
    finally:
        spares.close()


if __name__ == "__main__":
    sys.exit(main())
