"""The listening sockets, taken before anything slow begins, and what TLS needs."""

import errno
import logging
import os
import socket
import ssl
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from jax_engine.server.settings import ServerSettings

logger = logging.getLogger(__name__)

BACKLOG = 2048
# What the system keeps for a client that has stopped reading, instead of up to 4 MB; a stream of tokens needs far less.
SEND_BUFFER_BYTES = 256 * 2**10


@contextmanager
def listening_sockets(settings: ServerSettings) -> Iterator[list[socket.socket]]:
    """Take the port, or the path of a Unix socket, for good: from here on no other server can have it. Connections wait
    until they are accepted. The path is removed at the end.

    Of several sockets, one for each front end, the system gives every connection to one.

    Raises:
        ValueError: the port is in use or not allowed, the host is not one of this machine's, or the path cannot be had.
    """
    count = settings.api_server_count
    if settings.uds is None:
        yield _port_sockets(settings.host, settings.port, count)
        return
    first = _listen_at_path(settings.uds)
    identity = _identity(settings.uds)
    try:
        # Processes that accept from one socket share it evenly enough.
        yield [first, *(first.dup() for _ in range(1, count))]
    finally:
        with suppress(FileNotFoundError):
            if _identity(settings.uds) == identity:  # not that of a server started meanwhile
                os.unlink(settings.uds)


def _port_sockets(host: str, port: int, count: int) -> list[socket.socket]:
    first = _listen(host, port, shared=False)
    if count == 1:
        return [first]
    # A port can be shared (SO_REUSEPORT) only by sockets that all say so when they take it, and whoever says so may
    # join. The first one, which did not, has made sure that nobody is there.
    port = first.getsockname()[1]
    first.close()
    return [_listen(host, port, shared=True) for _ in range(count)]


def _listen_at_path(path: str) -> socket.socket:
    """A Unix socket that listens at `path`, in place of one that a server which is gone has left there."""
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        if _is_left_over(path):
            os.unlink(path)
        listening.bind(path)  # who may connect, the umask says
        listening.listen(BACKLOG)
    except OSError as error:
        listening.close()
        if error.errno == errno.EADDRINUSE:
            problem = f"uds={path!r} is in use; choose another, or end the server or remove the file that is there"
            raise ValueError(problem) from error
        raise ValueError(f"uds={path!r} cannot be listened on: {error.strerror}") from error
    listening.setblocking(False)
    return listening


def _is_left_over(path: str) -> bool:
    """Whether a socket is at `path` that nobody listens on."""
    try:
        if not stat.S_ISSOCK(os.stat(path).st_mode):
            return False
    except FileNotFoundError:
        return False
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            return True
    return False


def _identity(path: str) -> tuple[int, int]:
    status = os.stat(path)
    return status.st_dev, status.st_ino


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
    if settings.uds is not None:
        logger.info("listening on unix:%s", settings.uds)
        return
    host, port = listening.getsockname()[:2]
    scheme = "http" if settings.ssl_certfile is None else "https"
    logger.info("listening on %s://%s:%d%s", scheme, f"[{host}]" if ":" in host else host, port, settings.root_path)
    if not settings.api_keys and not settings.ssl_cert_reqs and host not in ("127.0.0.1", "::1"):
        logger.info("any machine that reaches this one may use it; --api-key KEY or --host 127.0.0.1 prevents that")


def tls_context(settings: ServerSettings) -> ssl.SSLContext | None:
    """What HTTPS is spoken with, or None for HTTP; ValueError when a file of it cannot be used."""
    if settings.ssl_certfile is None:
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)  # TLS 1.2 at least
    context.set_alpn_protocols(["http/1.1"])
    try:
        # Without the password, an encrypted key would be asked for on the terminal.
        context.load_cert_chain(settings.ssl_certfile, settings.ssl_keyfile, password="")
    except OSError as error:  # SSLError is one
        given = f"ssl_certfile={settings.ssl_certfile!r} with ssl_keyfile={settings.ssl_keyfile!r}"
        hint = "they must be PEM files, the key unencrypted and that of the certificate"
        raise ValueError(f"{given} cannot be used: {error.strerror or error}; {hint}") from error
    if settings.ssl_ca_certs is not None:
        try:
            context.load_verify_locations(settings.ssl_ca_certs)
        except OSError as error:
            problem = f"ssl_ca_certs={settings.ssl_ca_certs!r} cannot be used: {error.strerror or error}"
            raise ValueError(f"{problem}; it must be a PEM file of certificates") from error
    context.verify_mode = ssl.VerifyMode(settings.ssl_cert_reqs)
    return context
