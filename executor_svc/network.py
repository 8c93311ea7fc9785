"""Sockets between the machines of a group."""

import fcntl
import ipaddress
import socket
import struct

_SILENCE = 3  # seconds without an answer of the other machine's kernel, after which it counts as lost
_SIOCGIFADDR = 0x8915  # Linux: an interface's IPv4 address


def listen(host: str) -> socket.socket:
    """A socket that listens on a free port, which it keeps. Raises OSError."""
    return socket.create_server((host, 0), family=socket.AF_INET6 if ":" in host else socket.AF_INET)


def reachable(host: str) -> str:
    """Where this machine itself reaches what listens on an interface, or on all of them."""
    return {"": "127.0.0.1", "0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104


def watch(connection: socket.socket) -> None:
    """Lets the kernel end a connection, within 4 s, whose other machine answers no more: it has lost power or its network.

    What ends while its machine goes on is told at once, without this. The kernels answer, however busy the processes are.
    """
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 1)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 1)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, _SILENCE)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 1000 * _SILENCE)  # while something is on its way


def interface_towards(address: str) -> str | None:
    """The network interface by which this machine reaches an address; None where that cannot be found out."""
    try:
        family, _, _, _, where = socket.getaddrinfo(address, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect(where)  # sends nothing
            own = probe.getsockname()[0]
            if ipaddress.ip_address(own).is_loopback:
                return "lo"
            for _, name in socket.if_nameindex():
                if _address_of(probe, name) == own:
                    return name
    except OSError:
        pass
    return None


def _address_of(any_socket: socket.socket, interface: str) -> str | None:
    try:
        told = fcntl.ioctl(any_socket, _SIOCGIFADDR, struct.pack("256s", interface.encode()))
    except OSError:  # it has none
        return None
    return socket.inet_ntoa(told[20:24])
