"""The listening socket, taken before anything slow begins."""

import errno
import socket

BACKLOG = 2048


def listening_socket(host: str, port: int) -> socket.socket:
    """Take the port, for good: from here on no other process can have it. Connections wait until the server accepts.

    Raises:
        ValueError: the port is in use or not allowed, or the host is not one of this machine's.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listening = socket.socket(family, socket.SOCK_STREAM)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
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
