"""The executor service: python -m executor_svc --store URL --engine NAME."""

import argparse
import sys

from executor_svc.launch import Spares
from protos.options import add_options


def worker_arguments(arguments: argparse.Namespace) -> list[str]:
    """The command line of the workers."""
    command = ["--store", arguments.store, "--device", arguments.device]
    command += [option for path in arguments.trusted_keys for option in ("--trusted-keys", path)]
    command += ["--trust-native"] if arguments.trust_native else []
    command += ["--kv-memory", str(arguments.kv_memory)] if arguments.kv_memory else []
    command += ["--max-waiting", str(arguments.max_waiting)] if arguments.max_waiting is not None else []
    command += ["--log-format", arguments.log_format, "--log-level", arguments.log_level]
    return command


async def run(arguments: argparse.Namespace, spares: Spares) -> None:
    """Loads the engines that were asked for, then serves."""
    from engine.trust import Trust
    from executor_svc.server import ExecutorServicer
    from protos import rpc
    from protos.access import Access
    from protos.calls import Calls
    from protos.metrics import Metrics

    Trust.of_files(arguments.trusted_keys)  # a bad key file is told now, not when the first engine is loaded
    access = Access.of("executor", arguments)
    metrics = Metrics()
    access.watch(metrics)
    calls, servicer = Calls(metrics), ExecutorServicer(arguments.store, arguments.device, spares, metrics)
    with metrics.served("executor", arguments.host, arguments.metrics_port):  # while engines are loaded, too
        try:
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
            on_stop=servicer.close,
            calls=calls,
            access=access,
        )


def _count(text: str) -> int:
    if not (text.isascii() and text.isdigit()):
        raise argparse.ArgumentTypeError(f"{text!r} is no number of requests: give 0 or more")
    return int(text)


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
        "--kv-memory",
        type=int,
        help="bytes of KV cache an engine, or each rank of one; default: what it can use, up to half of free memory",
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
    add_options(parser)
    arguments = parser.parse_args()
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

        return rpc.main("executor", run(arguments, spares), arguments)
    finally:
        spares.close()


if __name__ == "__main__":
    sys.exit(main())
