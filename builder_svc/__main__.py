"""`python -m builder_svc`: the builder as a process."""

import argparse
import sys
from pathlib import Path

import grpc
import msgspec

from builder_svc import work_directory
from builder_svc.checkpoint import sources
from builder_svc.jobs import Jobs
from builder_svc.process import BuildProcess, BuildRequest, Result
from builder_svc.server import BuilderServicer
from builder_svc.telemetry import Telemetry
from engine import signing
from engine.backends import TRANSFER_PATIENCE, open_store
from engine.errors import InvalidArgument
from protos import rpc
from protos.access import Access
from protos.calls import Calls
from protos.metrics import Metrics
from protos.options import add_options
from protos.v1 import builder_pb2_grpc


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m builder_svc", description="Builds engines from checkpoints.")
    parser.add_argument(
        "--store", required=True, metavar="URL", help="where engines and jobs are kept: a directory, file:// or s3://"
    )
    parser.add_argument(
        "--checkpoint-root", required=True, type=Path, metavar="DIR", help="checkpoints outside of it are refused"
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on [127.0.0.1]")
    parser.add_argument("--port", default=8401, type=int, help="0 takes a free one [8401]")
    parser.add_argument("--jobs", default=1, type=int, metavar="N", help="builds at a time [1]")
    parser.add_argument(
        "--work-dir", type=Path, metavar="DIR", help="for weights and checkpoints on their way [the system's]"
    )
    parser.add_argument(
        "--signing-key",
        type=Path,
        metavar="FILE",
        help="sign with this private key every engine that a build here has made, or has made again and found right",
    )
    add_options(parser)
    parsed = parser.parse_args(arguments)
    if parsed.jobs < 1:
        parser.error(f"--jobs is {parsed.jobs}: it must be at least 1")
    return parsed


async def run(arguments: argparse.Namespace) -> None:
    """Serves until SIGTERM or SIGINT.

    Raises:
        InvalidArgument: a directory that should be there is not, or the key is none.
        EnginehouseError: the store cannot be opened, or the port is taken.
    """
    for option, directory in (("--checkpoint-root", arguments.checkpoint_root), ("--work-dir", arguments.work_dir)):
        if directory and not directory.is_dir():
            raise InvalidArgument(f"{option} {directory} is no directory")
    store, patient = open_store(arguments.store), open_store(arguments.store, TRANSFER_PATIENCE)
    root = arguments.checkpoint_root.resolve()
    private = signing.load_private(arguments.signing_key) if arguments.signing_key else None

    def prepare(request: BuildRequest) -> BuildRequest:
        """A job that another builder has taken in must be one that this one would have."""
        checkpoint = sources.accept(request.checkpoint, root, patient)
        signer = private.public.id if private else ""
        return msgspec.structs.replace(request, store=store.url, checkpoint=checkpoint, signer=signer)

    def finish(result: Result) -> None:
        """Signs what the build has made, and nothing that others have put in its place.

        Here and not in the build's process, which reads what clients bring and gets no key.
        """
        if private and result.manifest:
            signing.sign(patient, result.engine_id, private, result.manifest)

    access = Access.of("builder", arguments)
    metrics = Metrics()
    access.watch(metrics)
    telemetry = Telemetry(metrics)
    process = BuildProcess(work_dir=arguments.work_dir, on_phase=telemetry.phase)
    work_directory.clear(arguments.work_dir)
    jobs = Jobs(store, process, arguments.jobs, patient=patient, prepare=prepare, finish=finish, ended=telemetry.ended)
    telemetry.watch(jobs)
    spool = arguments.work_dir and arguments.work_dir / "uploads"
    servicer = BuilderServicer(jobs, store, root, spool, telemetry.uploaded_bytes)

    def register(server: grpc.aio.Server) -> None:
        builder_pb2_grpc.add_BuilderServicer_to_server(servicer, server)

    async def stop() -> None:
        """Nothing is left: builds end before the calls that watch them do."""

    with metrics.served("builder", arguments.host, arguments.metrics_port):
        jobs.start()
        await rpc.serve(
            "builder",
            register,
            arguments.host,
            arguments.port,
            before_stop=jobs.close,
            on_stop=stop,
            calls=Calls(metrics),
            access=access,
        )


if __name__ == "__main__":
    given = parse()
    sys.exit(rpc.main("builder", run(given), given))
