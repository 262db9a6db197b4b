"""How a server begins and ends."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import httpx
import pytest

LONG = {"prompt": "Once upon a time", "max_tokens": 1900, "ignore_eos": True}


def run_cli(*arguments):
    command = [sys.executable, "-m", "jax_engine.server.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)


def test_port_in_use_is_one_line_before_anything_loads():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        result = run_cli("serve", "--host", "127.0.0.1", "--port", str(port))
    assert result.returncode == 2
    assert result.stderr == (
        f"jax-engine serve: error: --port {port} is in use on 127.0.0.1; "
        "choose another, or end the process that has it\n"
    )


def test_a_model_that_does_not_exist_is_one_line(tmp_path):
    result = run_cli("serve", str(tmp_path / "no-model"), "--host", "127.0.0.1", "--port", "0")
    assert result.returncode == 2
    assert "does not exist" in result.stderr.splitlines()[-1]
    assert "Traceback" not in result.stderr


def test_before_it_is_ready_the_server_says_so_and_can_be_ended(start_server):
    server = start_server("--compile-before-ready", "--compilation-cache-dir", "", ready=False)
    health = httpx.get(f"{server.url}/health")
    assert health.status_code == 503
    assert health.json()["error"]["code"] == "engine_starting"
    assert httpx.post(f"{server.url}/v1/completions", json=LONG).status_code == 503
    assert httpx.get(f"{server.url}/metrics").status_code == 200
    assert httpx.get(f"{server.url}/live").json() == {"status": "starting"}

    def how_far():
        return httpx.get(f"{server.url}/health").json()

    server.wait_for(lambda: how_far()["programs_planned"] > 0, what="telling how many programs there will be")
    assert how_far()["programs_compiled"] < how_far()["programs_planned"]
    assert server.stop() == 0
    assert "Traceback" not in server.log()


@pytest.fixture
def waiting_requests():
    """Start requests that take long; `join` gives what each of them got."""
    threads = []
    results = []

    def start(server, count):
        def post(stream):
            try:
                response = httpx.post(f"{server.url}/v1/completions", json={**LONG, "stream": stream}, timeout=120)
                results.append((response.status_code, response.text))
            except httpx.HTTPError as error:
                results.append((None, repr(error)))

        for number in range(count):
            threads.append(threading.Thread(target=post, args=(number % 2 == 0,)))
            threads[-1].start()
        server.wait_for(lambda: server.metric("vllm:num_requests_running") == count, what="running")

    def join():
        for thread in threads:
            thread.join()
        return results

    return start, join


def error_code(status, text):
    """The code of the error that a request got: as its response, or as the last event of a stream that had begun."""
    if status == 200:
        *_, text, done = [line for line in text.splitlines() if line]
        assert done == "data: [DONE]"
        text = text.removeprefix("data: ")
    else:
        assert status == 503
    return json.loads(text)["error"]["code"]


@pytest.mark.skipif(not Path("/proc").exists(), reason="finds the core by /proc")
def test_core_killed_is_an_error_to_all_who_wait(start_server, waiting_requests):
    server = start_server()
    start, join = waiting_requests
    start(server, 4)
    os.kill(server.core_pid(), signal.SIGKILL)
    assert [error_code(*result) for result in join()] == ["engine_dead"] * 4
    health = httpx.get(f"{server.url}/health")
    assert health.status_code == 503
    assert "SIGKILL" in health.json()["error"]["message"]
    assert httpx.post(f"{server.url}/v1/completions", json=LONG).status_code == 503
    assert server.process.wait(60) == 1
    assert server.log().splitlines()[-1].startswith("jax-engine serve: error: the engine has died")
    # Whoever starts it again, as a service manager does, has a server again, on the same port.
    again = start_server("--port", server.url.rpartition(":")[2])
    assert again.url == server.url
    assert httpx.post(f"{again.url}/v1/completions", json={"prompt": "Once", "max_tokens": 2}).status_code == 200


def test_sigterm_tells_requests_that_outlast_the_grace_period(start_server, waiting_requests):
    server = start_server("--shutdown-timeout", "1")
    start, join = waiting_requests
    start(server, 8)  # together far more than a second's work
    server.process.send_signal(signal.SIGTERM)
    assert [error_code(*result) for result in join()] == ["shutting_down"] * 8
    assert server.process.wait(60) == 0
    assert "Traceback" not in server.log()


def test_after_sigterm_requests_in_flight_finish_and_connections_are_refused(start_server):
    server = start_server()
    body = {**LONG, "max_tokens": 600, "stream": True}

    def refused():
        try:
            httpx.get(f"{server.url}/health", headers={"connection": "close"})
        except httpx.TransportError:
            return True
        return False

    with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=120) as response:
        lines = response.iter_lines()
        next(lines)
        server.process.send_signal(signal.SIGTERM)
        server.wait_for(refused, what="refusing connections")
        rest = [line for line in lines if line]
    assert rest[-1] == "data: [DONE]"
    assert json.loads(rest[-2].removeprefix("data: "))["choices"][0]["finish_reason"] == "length"
    assert server.process.wait(60) == 0
    assert "Traceback" not in server.log()
