"""The listening sockets, taken before anything slow begins."""

import errno
import logging
import socket

from jax_engine.server.settings import ServerSettings

logger = logging.getLogger(__name__)

BACKLOG = 2048
# What the system keeps for a client that has stopped reading, instead of up to 4 MB; a stream of tokens needs far less.
SEND_BUFFER_BYTES = 256 * 2**10


def listening_sockets(host: str, port: int, count: int = 1) -> list[socket.socket]:
    """Take the port, for good: from here on no other server can have it. Connections wait until they are accepted.

    Of several sockets, one for each front end, the system gives every connection to one (SO_REUSEPORT).

    Raises:
        ValueError: the port is in use or not allowed, or the host is not one of this machine's.
    """
    first = _listen(host, port, shared=False)
    if count == 1:
        return [first]
    # A port can be shared only by sockets that all say so when they take it, and whoever says so may join. The first
    # one, which did not, has made sure that nobody is there.
    port = first.getsockname()[1]
    first.close()
    return [_listen(host, port, shared=True) for _ in range(count)]


def _listen(host: str, port: int, *, shared: bool) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listening = socket.socket(family, socket.SOCK_STREAM)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if shared:
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)  # connections inherit it
        listening.bind((host, port))
        listening.listen(BACKLOG)
    except OSError as error:
        listening.close()
        reasons = {
            errno.EADDRINUSE: f"port={port} is in use on {host}; choose another, or end the process that has it",
            errno.EACCES: f"port={port} needs special rights; choose one above 1023",
        }
        problem = reasons.get(error.errno or 0, f"host={host!r} port={port} cannot be listened on: {error.strerror}")
        raise ValueError(problem) from error
    listening.setblocking(False)
    return listening


def log_address(settings: ServerSettings, listening: socket.socket) -> None:
    """Say where the server is, and who may use it."""
    host, port = listening.getsockname()[:2]
    logger.info("listening on http://%s:%d", f"[{host}]" if ":" in host else host, port)
    if not settings.api_keys and host not in ("127.0.0.1", "::1"):
        logger.info("any machine that reaches this one may use it; --api-key KEY or --host 127.0.0.1 prevents that")
