"""The sockets that clients reach: bound here, or handed over by a service manager that holds them (systemd's protocol,
sd_listen_fds(3) and sd_notify(3))."""

import contextlib
import os
import socket
from collections.abc import Mapping, MutableMapping
from typing import Final

FIRST_FD: Final = 3


class CannotListenError(Exception):
    """The message says why, and what to do."""


def listen(host: str, port: int, setting: str) -> socket.socket:
    """A listening socket. `setting`: where another port is chosen. Raises `CannotListenError`."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(2048)
        listener.setblocking(False)
    except OSError as error:
        listener.close()
        raise CannotListenError(
            f"cannot listen on {host}:{port}: {error.strerror or error}. "
            f"Choose another port {setting}, or stop what listens there."
        ) from None
    return listener


def url(listener: socket.socket) -> str:
    """Where it is reached."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def handed_over(env: MutableMapping[str, str]) -> list[socket.socket]:
    """The listening sockets that came with the process. Removes what told of them from `env`: they are not for its
    children."""
    count, pid = env.pop("LISTEN_FDS", ""), env.pop("LISTEN_PID", "")
    env.pop("LISTEN_FDNAMES", None)
    if pid != str(os.getpid()) or not count.isdecimal():
        return []
    found = []
    for fd in range(FIRST_FD, FIRST_FD + int(count)):
        os.set_inheritable(fd, False)
        found.append(socket.socket(fileno=fd))
        found[-1].setblocking(False)
    return found


def notify(state: str, env: Mapping[str, str]) -> None:
    """Tells the service manager ("READY=1", "STOPPING=1"), if there is one that wants to know."""
    address = env.get("NOTIFY_SOCKET", "")
    if not address:
        return
    with (
        contextlib.suppress(OSError),  # it has gone: nobody to tell
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as to,
    ):
        to.sendto(state.encode(), "\0" + address[1:] if address.startswith("@") else address)
