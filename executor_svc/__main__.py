"""The executor service: python -m executor_svc --store URL --engine NAME."""

import argparse
import sys

from engine.trust import Trust
from executor_svc.server import ExecutorServicer
from protos import rpc
from protos.calls import Calls
from protos.metrics import Metrics


async def run(arguments: argparse.Namespace) -> None:
    """Loads the engines that were asked for, then serves."""
    Trust.of_files(arguments.trusted_keys)  # a bad key file is told now, not when the first engine is loaded
    options = [option for path in arguments.trusted_keys for option in ("--trusted-keys", path)]
    options += ["--trust-native"] if arguments.trust_native else []
    options += ["--kv-memory", str(arguments.kv_memory)] if arguments.kv_memory else []
    options += ["--max-waiting", str(arguments.max_waiting)] if arguments.max_waiting is not None else []
    options += ["--log-format", arguments.log_format, "--log-level", arguments.log_level]
    metrics = Metrics()
    calls, servicer = Calls(metrics), ExecutorServicer(arguments.store, arguments.device, options, metrics)
    with metrics.served("executor", arguments.host, arguments.metrics_port):  # while engines are loaded, too
        try:
            for engine in arguments.engine:
                await servicer.open(engine)
        except BaseException:
            await servicer.close()
            raise
        await rpc.serve(
            "executor", servicer.register, arguments.host, arguments.port, on_stop=servicer.close, calls=calls
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
        "--kv-memory", type=int, help="bytes of KV cache an engine; default: what it can use, up to half of free memory"
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
    rpc.add_options(parser)
    arguments = parser.parse_args()
    return rpc.main("executor", run(arguments), arguments)


if __name__ == "__main__":
    sys.exit(main())
