"""Parts of `twotower serve`: the address."""

from __future__ import annotations

import ipaddress
import socket

from twotower.errors import ArgumentError


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach the host."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def check_free(host: str, port: int) -> None:
    """Raises ArgumentError if the address is not available. Called before weights are read."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        with socket.socket(*found[:3]) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(found[4])
    except OSError as error:
        raise ArgumentError(
            f"cannot listen on {host} port {port} ({error.strerror}); choose another --host or --port"
        ) from None
