"""What a client may send, how slowly, and over what: the app without an engine, behind real sockets."""

import asyncio
import json
import ssl
from contextlib import asynccontextmanager

import httpx
import pytest
import trustme
import uvicorn

from jax_engine.config import EngineConfig
from jax_engine.server.app import build_app
from jax_engine.server.listening import listening_sockets, tls_context
from jax_engine.server.serve import http_config
from jax_engine.server.service import Service
from jax_engine.server.settings import ServerSettings

GET = b"GET /version HTTP/1.1\r\nhost: test\r\n"
POST = b"POST /v1/completions HTTP/1.1\r\nhost: test\r\ncontent-length: 100\r\n\r\n"


@asynccontextmanager
async def serving(**settings):
    """A server without an engine; yields the address that it listens on."""
    checked = ServerSettings(host="127.0.0.1", port=0, **settings)
    service = Service(EngineConfig(), checked, on_failure=lambda: None)
    with listening_sockets(checked) as sockets:
        address = sockets[0].getsockname()
        server = uvicorn.Server(http_config(build_app(service), checked, lifespan="off"))
        task = asyncio.create_task(server.serve(sockets))
        while not server.started:
            await asyncio.sleep(0.01)
        try:
            yield address
        finally:
            server.should_exit = True
            await task


async def converse(address, *pieces, pause=0.0):
    """Send `pieces` with a pause after each, until the server has closed; returns all that it said."""
    reader, writer = await asyncio.open_connection(*address)

    async def send():
        for piece in pieces:
            writer.write(piece)
            await asyncio.sleep(pause)

    sending = asyncio.create_task(send())
    said = b""
    try:
        async with asyncio.timeout(20):
            while piece := await reader.read(65536):
                said += piece
    except ConnectionResetError:  # it closed while more was coming
        pass
    finally:
        sending.cancel()
        writer.close()
    return said


def status_and_code(answer):
    head, _, body = answer.partition(b"\r\n\r\n")
    assert b"connection: close" in head
    return int(head.split()[1]), json.loads(body)["error"]["code"]


TOO_MUCH = {
    "too many headers": [GET + b"a: b\r\n" * 300],
    "headers that are too long": [GET, *[b"a: " + b"b" * 1000 + b"\r\n"] * 80],
    "a header without an end": [GET + b"a: ", *[b"b" * 10_000] * 20],
    "a path without an end": [b"GET /", *[b"b" * 10_000] * 20],
}


@pytest.mark.parametrize("pieces", TOO_MUCH.values(), ids=TOO_MUCH)
async def test_a_request_with_too_much_of_a_head_is_a_431(pieces):
    async with serving() as address:
        assert status_and_code(await converse(address, *pieces)) == (431, "headers_too_large")


async def test_what_is_no_body_of_a_chunked_body_has_a_limit_too():
    head = b"POST /v1/completions HTTP/1.1\r\nhost: test\r\ntransfer-encoding: chunked\r\n\r\n"
    async with serving() as address:
        trailer = await converse(address, head + b"1\r\nx\r\n0\r\n", b"a: ", *[b"b" * 10_000] * 20)
    assert status_and_code(trailer) == (431, "headers_too_large")


async def test_what_is_no_http_is_a_400():
    async with serving() as address:
        for junk in (
            b"\x16\x03\x01\x02\x00",
            b"GET /version HTTP/1.1\r\nno colon\r\n\r\n",
            b"GET \xff HTTP/1.1\r\n\r\n",
        ):
            assert status_and_code(await converse(address, junk)) == (400, "invalid_http")


async def test_a_client_that_is_slow_to_send_is_cut_off():
    drip = [b"x"] * 1000
    async with serving(receive_timeout=0.3) as address:
        head, body, silence, refused = await asyncio.gather(
            converse(address, GET + b"a: ", *drip, pause=0.02),
            converse(address, POST, *drip, pause=0.02),
            converse(address),
            # Answered before its body: the rest of that is not waited for any longer.
            converse(address, POST.replace(b"v1/completions", b"nothing-here"), *drip, pause=0.02),
        )
    assert status_and_code(head) == (408, "receive_timeout")
    assert status_and_code(body) == (408, "receive_timeout")
    assert silence == b""
    assert refused.startswith(b"HTTP/1.1 404")


async def test_a_client_that_sends_in_time_is_not_cut_off():
    """The clock starts anew with every request of a connection, and stops while the connection waits."""
    async with serving(receive_timeout=0.3, timeout_keep_alive=1.0) as address:
        answers = await converse(address, *[GET + b"\r\n"] * 4, pause=0.2)
    assert answers.count(b"HTTP/1.1 200 OK") == 4


async def test_a_connection_that_waits_too_long_for_its_next_request_is_closed():
    async with serving(timeout_keep_alive=0.1) as address:
        answers = await converse(address, *[GET + b"\r\n"] * 2, pause=0.5)
    assert answers.count(b"HTTP/1.1 200 OK") == 1


async def test_one_connection_too_many_is_a_503_but_not_for_probes():
    async with serving(limit_concurrency=2) as address, httpx.AsyncClient() as http:
        base = f"http://{address[0]}:{address[1]}"
        assert (await http.get(f"{base}/openapi.json")).status_code == 200
        idle = [await asyncio.open_connection(*address) for _ in range(2)]
        refused = await http.get(f"{base}/openapi.json")
        assert refused.status_code == 503
        assert refused.json()["error"]["code"] == "too_many_connections"
        assert refused.headers["retry-after"] == "1"
        assert (await http.get(f"{base}/version")).status_code == 200
        for _, writer in idle:
            writer.close()
            await writer.wait_closed()
        await asyncio.sleep(0.05)
        assert (await http.get(f"{base}/openapi.json")).status_code == 200


@pytest.fixture(scope="module")
def certificates(tmp_path_factory):
    """An authority, the server's files, and a client's."""
    folder = tmp_path_factory.mktemp("certificates")
    authority = trustme.CA()
    names = {name: str(folder / name) for name in ("authority", "certificate", "key", "client")}
    authority.cert_pem.write_to_path(names["authority"])
    own = authority.issue_cert("127.0.0.1")
    own.private_key_pem.write_to_path(names["key"])
    own.cert_chain_pems[0].write_to_path(names["certificate"])
    authority.issue_cert("client@example.com").private_key_and_cert_chain_pem.write_to_path(names["client"])
    return names


async def test_https_and_certificates_of_clients(certificates):
    files = {"ssl_certfile": certificates["certificate"], "ssl_keyfile": certificates["key"]}
    anyone = ssl.create_default_context(cafile=certificates["authority"])
    known = ssl.create_default_context(cafile=certificates["authority"])
    known.load_cert_chain(certificates["client"])
    async with serving(**files) as (host, port), httpx.AsyncClient(verify=anyone) as http:
        assert (await http.get(f"https://{host}:{port}/version")).status_code == 200
        with pytest.raises(httpx.TransportError):
            await http.get(f"http://{host}:{port}/version")
    async with serving(**files, ssl_ca_certs=certificates["authority"], ssl_cert_reqs=2) as (host, port):
        async with httpx.AsyncClient(verify=known) as http:
            assert (await http.get(f"https://{host}:{port}/version")).status_code == 200
        async with httpx.AsyncClient(verify=anyone) as http:
            with pytest.raises(httpx.TransportError):
                await http.get(f"https://{host}:{port}/version")


def test_certificate_files_that_cannot_be_used_are_told_before_anything_starts(certificates, tmp_path):
    with pytest.raises(ValueError, match="No such file"):
        tls_context(ServerSettings(ssl_certfile=str(tmp_path / "none.pem")))
    with pytest.raises(ValueError, match="must be PEM files"):
        tls_context(ServerSettings(ssl_certfile=certificates["certificate"], ssl_keyfile=certificates["client"]))
    with pytest.raises(ValueError, match="needs ssl_certfile"):
        ServerSettings(ssl_keyfile=certificates["key"])
    with pytest.raises(ValueError, match="needs ssl_ca_certs"):
        ServerSettings(ssl_certfile=certificates["certificate"], ssl_cert_reqs=2)


async def test_a_unix_socket_replaces_one_that_is_left_over_and_is_removed_at_the_end(tmp_path):
    path = tmp_path / "server.sock"
    for _ in range(2):
        async with serving(uds=str(path)) as address:
            assert address == str(path)
            transport = httpx.AsyncHTTPTransport(uds=str(path))
            async with httpx.AsyncClient(transport=transport, base_url="http://test") as http:
                assert (await http.get("/version")).status_code == 200
            with pytest.raises(ValueError, match="is in use"), listening_sockets(ServerSettings(uds=str(path))):
                pass
            assert path.exists(), "it is the first server's"
        assert not path.exists()
        with listening_sockets(ServerSettings(uds=str(path))) as sockets:
            path.rename(tmp_path / "left-over")
            sockets[0].close()
        (tmp_path / "left-over").rename(path)  # as a server that was killed leaves it


def test_a_file_where_the_unix_socket_is_to_be_is_left_alone(tmp_path):
    path = tmp_path / "notes.txt"
    path.write_text("dear diary")
    with pytest.raises(ValueError, match="remove the file"), listening_sockets(ServerSettings(uds=str(path))):
        pass
    assert path.read_text() == "dear diary"
