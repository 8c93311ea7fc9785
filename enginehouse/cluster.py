"""The local cluster: a store, a builder, executors and a gateway as processes of this machine."""

import asyncio
import errno
import os
import socket
from collections.abc import Coroutine, Sequence
from types import TracebackType
from typing import Any, Self, TypeVar

import msgspec

from engine.backends import open_store
from engine.errors import Unavailable
from enginehouse.cluster_security import ClusterSecurity, without_credentials
from enginehouse.home import ClusterState, Home
from enginehouse.process import ServiceProcess, service_environment
from enginehouse.warden import Warden

_LOOPBACK = "127.0.0.1"
_DRAIN = ("--drain-seconds", "5")  # somebody waits at the terminal
_START_TIMEOUT = 60.0  # seconds until every service must listen; loading of engines comes later and takes its time

_OPEN = ClusterSecurity()

_Result = TypeVar("_Result")


class LocalCluster:
    """Starts its services together on `async with`, and leaves none of them running behind it.

    The builder and the executors listen on 127.0.0.1 only: they trust whoever reaches them, and the builder is started
    with `--checkpoint-root /`, since a person's checkpoints may be in any folder that this person can read. `host` is the
    gateway's alone.

    Attributes:
        count: how many executors.
        gateway: host:port as a client on this machine reaches it.
        builder: the same.
        executors: one host:port each.
        metrics: URLs by service, if they were asked for.
        http: URL of the gateway's HTTP API and page, if it was asked for.
        security: certificates and keys.

    Example:
        >>> import asyncio
        >>> from enginehouse import GatewayClient, Home, LocalCluster
        >>> async def served():
        ...     async with LocalCluster(Home.find("data")) as cluster, GatewayClient(cluster.gateway) as gateway:
        ...         return await gateway.models()
        >>> asyncio.run(served())
        []
    """

    def __init__(
        self,
        home: Home,
        *,
        store: str | None = None,
        executors: int = 1,
        host: str = _LOOPBACK,
        port: int = 0,
        metrics: bool = False,
        security: ClusterSecurity = _OPEN,
        http_port: int | None = None,
    ) -> None:
        """`port` is the gateway's; 0 takes a free one, as all other services do. With `metrics` each has a port for them; with
        `http_port` the gateway answers HTTP, too."""
        self.home = home
        self.store = open_store(store or home.store).url
        self.gateway = self.builder = ""
        self.executors: list[str] = []
        self.count = executors
        self.security = security
        self._host = host
        self._port, self._http_port = port, http_port
        self.http = ""
        self.metrics: dict[str, str] = {}
        self._options = ["--metrics-port", "0"] if metrics else []
        self._stages: list[list[ServiceProcess]] = []  # in the order in which they are stopped

    async def __aenter__(self) -> Self:
        """Returns when all services listen.

        Raises:
            FailedPrecondition: another cluster runs on the data folder.
            Unavailable: the gateway's port is taken, or a service has died.
        """
        self._lock = self.home.lock()
        try:
            check_port(self._host, self._port)
            if self._http_port is not None:
                check_port(self._host, self._http_port, "--http-port")
            self._warden = Warden(keep_open=self._lock.fileno())
        except BaseException:
            self._lock.close()
            raise
        try:
            await self._start()
        except BaseException:
            await self._stop()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self._stop()

    async def guard(self, work: Coroutine[Any, Any, _Result]) -> _Result:
        """The result of `work`, which is cancelled when a service ends meanwhile.

        Raises:
            Unavailable: the service that ended, and the last lines of its log.
        """
        task = asyncio.create_task(work)
        services = [service for stage in self._stages for service in stage]
        ends = {asyncio.create_task(service.ended()): service for service in services}
        try:
            done, _ = await asyncio.wait((task, *ends), return_when=asyncio.FIRST_COMPLETED)
            if task in done and not isinstance(task.exception(), Unavailable):
                return task.result()
            if task in done:  # a call failed, for which the reason may be a service that is just ending
                done, _ = await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED, timeout=1)
            for ended, service in ends.items():
                if ended in done:
                    raise service.death()
            return task.result()
        finally:
            for one in (task, *ends):
                one.cancel()
            await asyncio.gather(task, *ends, return_exceptions=True)

    @property
    def warden(self) -> Warden:
        """Ends what it is told to watch when this process is killed."""
        return self._warden

    def kill(self) -> None:
        """Ends all services at once, for a person who does not want to wait for an orderly end."""
        for stage in self._stages:
            for service in stage:
                service.kill()

    async def _start(self) -> None:
        """All services at once: the others' ports are chosen here, so that the gateway need not wait for them."""
        held = hold_ports(self.count + 1)
        try:
            await self._start_on([port.getsockname()[1] for port in held])
        finally:
            for port in held:
                port.close()

    async def _start_on(self, ports: list[int]) -> None:
        """`ports`: of the executors and the builder."""
        *ports, builder_port = ports
        self.executors = [f"{_LOOPBACK}:{port}" for port in ports]
        builder_address = f"{_LOOPBACK}:{builder_port}"
        builder = self._service(
            "builder",
            "builder_svc",
            [
                "--checkpoint-root",
                "/",
                "--work-dir",
                str(self.home.work),
                "--host",
                _LOOPBACK,
                "--port",
                str(builder_port),
            ],
        )
        executors = [
            self._service(
                f"executor-{number}",
                "executor_svc",
                [*_DRAIN, "--host", _LOOPBACK, "--port", address.rpartition(":")[2]],
            )
            for number, address in enumerate(self.executors, 1)
        ]
        known = [part for address in self.executors for part in ("--executor", address)]
        http = [] if self._http_port is None else ["--http-port", str(self._http_port)]
        if http and not self.security.certs:  # else the builder obeys clients alone
            http += ["--builder", builder_address]
        gateway = self._service(
            "gateway", "gateway", [*known, *_DRAIN, "--host", self._host, "--port", str(self._port), *http]
        )
        environment = without_credentials(service_environment())
        self._stages = [[gateway], executors, [builder]]
        services = (builder, *executors, gateway)
        for service in services:
            await service.start(environment, self._warden)
        await self.guard(self._listening(services))
        self.builder, self.gateway = builder.address, gateway.address.replace("0.0.0.0:", f"{_LOOPBACK}:")
        self.http = gateway.http.replace("//0.0.0.0:", f"//{_LOOPBACK}:")
        self.metrics = {service.name: service.metrics for service in services if service.metrics}
        state = ClusterState(
            pid=os.getpid(),
            gateway=self.gateway,
            builder=self.builder,
            executors=self.executors,
            store=self.store,
            pids={service.name: service.pid for service in services},
            metrics=self.metrics,
            http=self.http,
        )
        self.home.state_file.write_bytes(msgspec.json.format(msgspec.json.encode(state)))

    def _service(self, name: str, module: str, arguments: list[str]) -> ServiceProcess:
        return ServiceProcess(
            name,
            module,
            ["--store", self.store, *self._options, *self.security.options(module.removesuffix("_svc")), *arguments],
            self.home.logs / f"{name}.log",
        )

    async def _listening(self, services: Sequence[ServiceProcess]) -> None:
        try:
            async with asyncio.timeout(_START_TIMEOUT):
                await asyncio.gather(*(service.listening() for service in services))
        except TimeoutError:
            late = ", ".join(service.name for service in services if not service.address)
            raise Unavailable(
                f"{late} did not start within {_START_TIMEOUT:.0f} s; see the logs in {self.home.logs}",
                reason="SERVICE_SILENT",
            ) from None

    async def _stop(self) -> None:
        try:
            for stage in self._stages:
                await asyncio.gather(*(service.stop() for service in stage))
            self.home.state_file.unlink(missing_ok=True)
        finally:
            self._warden.close()  # ends what an interrupted stop has left
            self._lock.close()


def check_port(host: str, port: int, option: str = "--port") -> None:
    """Raises Unavailable when the port cannot be listened on; sooner and in better words than the gateway's log would."""
    try:
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host.strip("[]"), port))
    except OSError as error:
        what = "it is taken" if error.errno == errno.EADDRINUSE else error.strerror
        raise Unavailable(
            f"cannot listen on {host} port {port}: {what}; choose another port with {option} (0 for any that is free)",
            reason="PORT_TAKEN",
        ) from None


def hold_ports(count: int) -> list[socket.socket]:
    """Free ports of 127.0.0.1, all different: sockets that are bound to them and do not listen.

    Until a socket is closed, nobody is given its port who asks for any, neither to listen nor to connect from. A server that
    is told the port and sets SO_REUSEADDR, as servers do, can listen there nevertheless: so Linux has it.
    """
    held = [socket.socket() for _ in range(count)]
    for one in held:
        one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        one.bind((_LOOPBACK, 0))
    return held
