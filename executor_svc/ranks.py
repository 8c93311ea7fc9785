"""One rank of several: what they compute with each other, and how rank 0 leads.

Tensors go through torch.distributed: NCCL between GPUs, gloo between CPUs. Plans (`plans.py`) go over a socket from rank 0 to
each other rank, which may wait for the next one as long as nobody asks anything, and sees at once when rank 0 has ended.
"""

import logging
import os
import secrets
import select
import socket
import time
from collections import deque
from collections.abc import Mapping
from datetime import timedelta
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor

from engine.errors import FailedPrecondition, Unavailable
from engine.manifest import Parallelism
from engine.program import Program
from executor_svc.frames import FrameSocket
from executor_svc.group import Follower, Group
from executor_svc.network import interface_towards, listen
from executor_svc.peer_memory import PeerMemory, most_bytes, peer_memory
from executor_svc.plans import pack

log = logging.getLogger(__name__)

_PATIENCE = timedelta(minutes=30)  # that one waits for another which computes or loads; of one that has ended it hears
_CONNECT = 30.0  # seconds for the sockets of the plans
_INTRODUCTION = 2.0  # seconds in which who has connected must say who it is
_SENDS = 8  # that may be on the way: more than a place of a pipeline begins before it waits for something
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # its older name


class Ranks(Group):
    """One rank of several, each a process; `meet` makes it.

    Args:
        store: where all of them have met. address: of rank 0.
        device: "cpu" or "cuda", of which each rank has its own.
        here: ranks on this machine. host: the interface where rank 0 listens.
    """

    _leader: FrameSocket  # the way from rank 0, on the others

    def __init__(
        self, rank: int, mapping: Parallelism, store: dist.TCPStore, address: str, device: str, *, here: int, host: str
    ) -> None:
        super().__init__(rank, mapping)
        self.here = here
        self._store, self._on_gpu = store, device == "cuda"
        self._device = torch.device("cuda", torch.cuda.current_device()) if self._on_gpu else torch.device(device)
        store.set_timeout(_PATIENCE)
        if interface := interface_towards(address):  # gloo would look for its own host's name, and take that address
            os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
        self._backend = "nccl" if self._on_gpu else "gloo"
        dist.init_process_group(self._backend, store=store, rank=rank, world_size=self.size, timeout=_PATIENCE)
        # Every rank makes every group, in the same order, as torch wants it.
        firsts = range(0, self.size, self.tp_size)
        groups = [dist.new_group(list(range(first, first + self.tp_size)), timeout=_PATIENCE) for first in firsts]
        self._tp = groups[rank // self.tp_size]
        self._first = rank // self.tp_size * self.tp_size  # of its tensor-parallel group
        self._end = self.size - self.tp_size  # the first rank of the last place, which has logits for rank 0
        # Logits and tokens have connections of their own, so that they wait for no activations that are on their way.
        ends = range(self.tp_size if self.pp_size > 1 else 0)
        homes = [dist.new_group([first, self._end + first], timeout=_PATIENCE) for first in ends]
        self._home = homes[rank % self.tp_size] if homes and (rank < self.tp_size or rank >= self._end) else None
        self._sent: deque[tuple[Any, Tensor]] = deque()  # on the way, the oldest first
        self._vocab_size = 0
        self._shared: list[PeerMemory | None] = []  # kept
        self.least(0)  # connects, which takes memory of a GPU's
        self.all_reduce(torch.zeros(1, device=self._device))
        if self._home is not None:
            self._bring(torch.zeros(1, device=self._device) if rank >= self._end else None, (1,), torch.float32)
        self._followers: list[FrameSocket] = []
        if rank == 0:
            self._followers = _gather(store, host, self.size)
        else:
            port, secret = store.get("plans").decode().split()
            self._leader = FrameSocket(socket.create_connection((address, int(port)), _CONNECT))
            self._leader.send(f"{secret} {rank}".encode())

    def least(self, number: int) -> int:
        found = torch.tensor([number], dtype=torch.int64, device=self._device)
        dist.all_reduce(found, dist.ReduceOp.MIN)
        return int(found.item())

    def tell(self, plan: Mapping[str, Any]) -> None:
        if self.rank:
            return
        data = pack(plan)
        for rank, follower in enumerate(self._followers, 1):
            try:
                follower.send(data)
            except ConnectionError:
                raise Unavailable(f"rank {rank} of {self.size} has ended", reason="RANK_LOST") from None

    def follow(self, front: FrameSocket, runner: Follower) -> NoReturn:
        while True:
            ready, _, _ = select.select([front, self._leader], [], [])
            if front in ready:
                front.receive(0)  # nothing but its end
            if self._leader not in ready:
                continue
            try:
                plans = self._leader.receive(0)
            except ConnectionError:
                raise Unavailable("rank 0 has ended", reason="RANK_LOST") from None
            for plan in plans:
                runner.follow(plan)

    def agree_on_logits(self, program: Program) -> int:
        if self.pp_size == 1:
            return 0
        if self.rank == self._end:
            types = {value.name: value.type for op in program.ops for value in op.outputs}
            self._store.set("vocab_size", str(types[program.outputs[0]].shape[1]))
        if self.rank == 0:
            self._vocab_size = int(self._store.get("vocab_size"))
        return self._vocab_size

    def bring_home(self, logits: Tensor | None, rows: int) -> Tensor | None:
        if self.rank not in (0, self._end):
            return None
        logits = logits if logits is None else logits[:rows].float()
        return self._bring(logits, (rows, self._vocab_size), torch.float32)

    def bring_tokens(self, tokens: Tensor | None, rows: int) -> Tensor | None:
        return self._bring(tokens, (rows,), torch.int32)

    def _bring(self, values: Tensor | None, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor | None:
        if self.pp_size == 1:
            return values
        if self.rank >= self._end and values is not None and shape[0]:
            self._send(values, self.rank - self._end, self._home)
        if self.rank >= self.tp_size:
            return None
        brought = torch.empty(shape, dtype=dtype, device=self._device)
        if shape[0]:
            dist.recv(brought, self._end + self.rank, self._home)
        return brought

    def communicator(self) -> int:
        if not self._on_gpu:
            raise FailedPrecondition("ranks on CPUs have no NCCL communicator", reason="RANKS_UNSUPPORTED")
        return int(self._tp._get_backend(self._device)._comm_ptr())

    def most_shared(self) -> int:
        """Raises InvalidArgument: the environment's variable is no number, or too large."""
        if self.tp_size == 1 or self.here % self.tp_size:  # a group has ranks on other machines
            return 0
        return self.least(most_bytes(self.tp_size))

    def share(self, size: int, fill: int) -> list[int] | None:
        failure = "another rank has none"
        memory, handle, addresses = None, b"", list[int]()
        try:
            memory = peer_memory(self._on_gpu, size, fill)
            handle = memory.handle
        except Exception as error:  # whatever it is: NCCL serves
            failure = str(error)
        handles = [b""] * self.tp_size
        dist.all_gather_object(handles, handle, self._tp)  # by then the memory is filled
        try:
            if memory and all(handles):
                own = self.rank - self._first
                addresses = [
                    memory.address if place == own else memory.reach(other) for place, other in enumerate(handles)
                ]
        except Exception as error:
            failure = str(error)
        if self.least(len(addresses)):
            self._shared.append(memory)
            return addresses
        log.warning("ranks have no memory in common, and sum by %s: %s", self._backend, failure)
        return None

    def from_leader(self, values: Tensor) -> Tensor:
        dist.broadcast(values, self._first, self._tp)
        return values

    def all_reduce(self, x: Tensor) -> Tensor:
        x = x.contiguous()
        dist.all_reduce(x, group=self._tp)
        return x

    def all_gather(self, x: Tensor) -> Tensor:
        rows, columns = x.shape
        parts = x.new_empty(self.tp_size * rows, columns)
        if rows:
            _all_gather(parts, x.contiguous(), self._tp)
        return parts.view(self.tp_size, rows, columns).transpose(0, 1).reshape(rows, self.tp_size * columns)

    def send(self, x: Tensor) -> None:
        self._send(x, self.rank + self.tp_size, None)

    def recv(self, columns: int, dtype: torch.dtype) -> Tensor:
        x = torch.empty(self.rows, columns, dtype=dtype, device=self._device)
        dist.recv(x, self.rank - self.tp_size)
        return x

    def _send(self, x: Tensor, to: int, group: Any) -> None:
        """On a CPU without waiting until it is taken: this rank may first have to take what the other one sends."""
        x = x.contiguous()
        if self._on_gpu:
            dist.send(x, to, group)  # in the stream
            return
        self._sent.append((dist.isend(x, to, group), x))
        if len(self._sent) > _SENDS:
            self._sent.popleft()[0].wait()


def _gather(store: dist.TCPStore, host: str, size: int) -> list[FrameSocket]:
    """Connections to the other ranks, by rank; strangers are sent away. Raises Unavailable: one has not come."""
    found: dict[int, FrameSocket] = {}
    secret, until = secrets.token_hex(16), time.monotonic() + _CONNECT
    with listen(host) as server:
        store.set("plans", f"{server.getsockname()[1]} {secret}")
        while missing := [rank for rank in range(1, size) if rank not in found]:
            server.settimeout(max(until - time.monotonic(), 0.001))
            try:
                connection, _ = server.accept()
            except TimeoutError:
                raise Unavailable(f"ranks {missing} do not connect to rank 0", reason="RANK_MISSING") from None
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            rank = _introduced(FrameSocket(connection), secret)
            if rank in missing:
                found[rank] = FrameSocket(connection)
            else:
                connection.close()
    return [found[rank] for rank in range(1, size)]


def _introduced(connection: FrameSocket, secret: str) -> int | None:
    """The rank that has connected; None for anybody else."""
    try:
        words = b"".join(connection.receive(_INTRODUCTION)).decode().split()
    except (ConnectionError, UnicodeDecodeError):
        return None
    if len(words) != 2 or not secrets.compare_digest(words[0], secret):
        return None
    return int(words[1])
