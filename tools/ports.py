"""TCP ports of this machine; apart from `tools.processes`, so that the launcher need not load torch."""

from __future__ import annotations

import errno
import socket

from common.errors import UserError


def port_problem(port: int) -> str | None:
    """Why no server can listen on `port` of this machine (all interfaces, IPv4 and IPv6), or None if one can."""
    families = [(socket.AF_INET, "0.0.0.0")] + ([(socket.AF_INET6, "::")] if socket.has_ipv6 else [])
    for family, address in families:
        try:
            with socket.socket(family, socket.SOCK_STREAM) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                if family == socket.AF_INET6:
                    probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                probe.bind((address, port))
                probe.listen(1)
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                return "already in use on this machine"
            if error.errno == errno.EACCES:
                return "not allowed for this user"
            # anything else: the kernel lacks this family, and the other one decides
    return None


def require_free_port(port: int) -> None:
    """Raise a `UserError` if no server can listen on `port` of this machine."""
    problem = port_problem(port)
    if problem:
        raise UserError(f"port {port}: {problem}; choose another port")


def free_port() -> int:
    """A TCP port that is free on this machine now."""
    with socket.create_server(("", 0)) as server:
        return int(server.getsockname()[1])
