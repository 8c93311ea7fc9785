"""Which place an executor has among machines that run engines together: by its command line, or by its environment."""

import argparse
from collections.abc import Mapping
from dataclasses import dataclass

from engine.errors import InvalidArgument

PORT = 8450  # where the machine that leads waits for others


@dataclass(frozen=True)
class Place:
    """Of this machine.

    Attributes:
        machines: in the group; 1 is this one alone.
        port: where it waits for the others, if it leads.
        leader: host and port of the machine to join; None leads.
        index: its number, from 0, which leads; None takes any.
    """

    machines: int = 1
    port: int = PORT
    leader: tuple[str, int] | None = None
    index: int | None = None


def add_group_options(parser: argparse.ArgumentParser) -> None:
    """What an executor's command line has for several machines."""
    group = parser.add_argument_group(
        "several machines",
        "Ranks of an engine are divided among machines that run one executor each. All of these options may come from the "
        "environment instead: LWS_LEADER_ADDRESS, LWS_GROUP_SIZE and LWS_WORKER_INDEX of Kubernetes' LeaderWorkerSet, or "
        "MASTER_ADDR, MASTER_PORT, NNODES and NODE_RANK as for torchrun (or, inside of it, GROUP_WORLD_SIZE and GROUP_RANK).",
    )
    group.add_argument("--machines", type=int, metavar="N", help="lead N machines, this one among them [1]")
    group.add_argument(
        "--machines-port", type=int, default=PORT, help=f"where the others join, on the interface of --host [{PORT}]"
    )
    group.add_argument(
        "--join", metavar="HOST[:PORT]", help="take no requests, but lend this machine to the executor that leads there"
    )
    group.add_argument("--machine", type=int, metavar="K", help="with --join: its number, from 1 [any that is free]")
    group.add_argument(
        "--join-timeout", type=float, default=20.0, metavar="SECONDS", help="wait so long for other machines [20]"
    )


def find_place(arguments: argparse.Namespace, environment: Mapping[str, str]) -> Place:
    """This machine's place. What the command line says goes before the environment.

    Raises:
        InvalidArgument: the options, or the variables, contradict each other or are no numbers.
    """
    port, machines, join = arguments.machines_port, arguments.machines, arguments.join
    if join is not None:
        if machines is not None:
            raise InvalidArgument("--join and --machines: a machine leads or joins; leave one of them out")
        return Place(port=port, leader=_address(join, "--join"), index=arguments.machine)
    if arguments.machine is not None:
        raise InvalidArgument("--machine: only a machine that joins has one; give --join, too")
    if machines is not None:
        if machines < 1:
            raise InvalidArgument(f"--machines is {machines}, expected a number from 1")
        return Place(machines, port)
    if _number(environment, "LWS_GROUP_SIZE", 1) > 1:
        return _place(environment, "LWS_GROUP_SIZE", "LWS_WORKER_INDEX", "LWS_LEADER_ADDRESS", port)
    return _of_torchrun(environment, port)


def _of_torchrun(environment: Mapping[str, str], port: int) -> Place:
    size = next((name for name in ("NNODES", "GROUP_WORLD_SIZE", "WORLD_SIZE") if name in environment), None)
    index = next((name for name in ("NODE_RANK", "GROUP_RANK", "RANK") if name in environment), None)
    if size is None or index is None or "MASTER_ADDR" not in environment or _number(environment, size, 1) < 2:
        return Place()
    if (here := _number(environment, "LOCAL_WORLD_SIZE", 1)) > 1:
        raise InvalidArgument(
            f"LOCAL_WORLD_SIZE is {here}: start one executor a machine (torchrun --nproc-per-node 1), which starts its ranks "
            "itself"
        )
    if environment.get("TORCHELASTIC_USE_AGENT_STORE") != "True":  # torchrun itself listens there
        port = _number(environment, "MASTER_PORT", port)
    return _place(environment, size, index, "MASTER_ADDR", port)


def _place(environment: Mapping[str, str], size: str, index: str, leader: str, port: int) -> Place:
    count, number = _number(environment, size, 1), _number(environment, index, -1)
    if not 0 <= number < count:
        raise InvalidArgument(
            f"{index} is {environment.get(index, 'missing')}, but {size} is {count}: expected 0 to {count - 1}"
        )
    if number == 0:
        return Place(count, port, index=0)
    if not environment.get(leader):
        raise InvalidArgument(
            f"{size} is {count} and {index} is {number}, but {leader} is missing: say which machine leads"
        )
    return Place(count, port, (environment[leader], port), number)


def _number(environment: Mapping[str, str], name: str, default: int) -> int:
    text = environment.get(name, str(default))
    try:
        return int(text)
    except ValueError:
        raise InvalidArgument(f"{name} is {text!r} in the environment, expected a number") from None


def _address(text: str, option: str) -> tuple[str, int]:
    """HOST, HOST:PORT or [HOST]:PORT."""
    host, colon, port = text.rpartition(":")
    if not colon or text.endswith("]"):
        host, port = text, str(PORT)
    if not (host and port.isascii() and port.isdigit() and 0 < int(port) < 65536):
        raise InvalidArgument(f"{option} is {text!r}, expected HOST or HOST:PORT")
    return host.strip("[]"), int(port)
