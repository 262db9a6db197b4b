"""Operators' routes: sleep, aborts and profiles on a real server, and their refusal where they are off."""

import json
import threading

import httpx
import pytest

from jax_engine.config import EngineConfig
from jax_engine.server.app import build_app
from jax_engine.server.service import Service
from jax_engine.server.settings import ServerSettings

LONG = {"prompt": "Once upon a time", "max_tokens": 1900, "ignore_eos": True, "stream": True}
SHORT = {"prompt": "Once upon a time", "max_tokens": 8, "temperature": 0}


def post(server, route, **options):
    return httpx.post(f"{server.url}{route}", timeout=60, **options)


def is_sleeping(server):
    return httpx.get(f"{server.url}/is_sleeping", timeout=60).json() == {"is_sleeping": True}


@pytest.mark.parametrize(
    ("route", "flag"),
    [
        *((route, "--enable-admin-routes") for route in ("/sleep", "/wake_up", "/abort_requests")),
        *((route, "--profile-dir") for route in ("/start_profile", "/stop_profile")),
    ],
)
async def test_they_are_off_unless_switched_on_and_need_the_key(route, flag):
    for keys, status in (((), 403), (("secret",), 401)):
        service = Service(EngineConfig(), ServerSettings(api_keys=keys), on_failure=lambda: None)
        transport = httpx.ASGITransport(build_app(service))
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as http:
            refused = await http.post(route)
            assert refused.status_code == status
            if status == 403:
                assert f"start it with {flag}" in refused.json()["error"]["message"]


def test_a_busy_engine_does_not_go_to_sleep_and_a_sleeping_one_says_so(server):
    before = post(server, "/v1/completions", json=SHORT).json()["choices"][0]["text"]
    with httpx.stream("POST", f"{server.url}/v1/completions", json=LONG, timeout=60) as stream:
        lines = stream.iter_lines()
        next(lines)
        refused = post(server, "/sleep")
        assert (refused.status_code, refused.json()["error"]["code"]) == (409, "engine_busy")
        assert post(server, "/abort_requests").status_code == 200
        *_, last, done = filter(None, lines)
        assert json.loads(last.removeprefix("data: "))["choices"][0]["finish_reason"] == "abort"
        assert done == "data: [DONE]"
    for level in (1, 2):
        server.wait_for(lambda: server.metric("vllm:num_requests_running") == 0, what="nothing to run")
        assert post(server, f"/sleep?level={level}").json() == {"is_sleeping": True}
        assert is_sleeping(server)
        for body in (SHORT, {**SHORT, "stream": True}, {**SHORT, "use_beam_search": True, "n": 2}):
            asleep = post(server, "/v1/completions", json=body)
            assert asleep.status_code == 503
            assert asleep.json()["error"]["code"] == "engine_asleep"
            assert "asleep" in asleep.json()["error"]["message"]
            assert int(asleep.headers["retry-after"]) > 0
        assert post(server, "/wake_up?tags=weights").json() == {"is_sleeping": True}
        assert post(server, "/wake_up?tags=kv_cache&tags=weights").json() == {"is_sleeping": False}
        assert not is_sleeping(server)
        assert post(server, "/v1/completions", json=SHORT).json()["choices"][0]["text"] == before


def test_one_of_several_requests_is_aborted_by_its_id(server):
    reasons = {}

    def run(name, max_tokens):
        headers = {"x-request-id": name}
        body = {**LONG, "max_tokens": max_tokens, "stream": False}
        answer = post(server, "/v1/completions", json=body, headers=headers).json()
        reasons[name] = answer["choices"][0]["finish_reason"]

    # The one that is to go on is short enough to end, and long enough to be there still.
    threads = [threading.Thread(target=run, args=case) for case in (("mine", 1900), ("mine-too", 100))]
    for thread in threads:
        thread.start()
    server.wait_for(lambda: server.metric("vllm:num_requests_running") >= 1, what="a request")
    while "mine" not in reasons:
        assert post(server, "/abort_requests", json={"request_ids": ["cmpl-mine", "nobody"]}).status_code == 200
    for thread in threads:
        thread.join()
    assert reasons == {"mine": "abort", "mine-too": "length"}


def test_a_beam_search_that_is_aborted_says_so(server):
    answers = []
    body = {"prompt": "Once", "use_beam_search": True, "n": 2, "max_tokens": 500, "ignore_eos": True}
    thread = threading.Thread(target=lambda: answers.append(post(server, "/v1/completions", json=body)))
    thread.start()
    while not answers:
        post(server, "/abort_requests")
    thread.join()
    assert (answers[0].status_code, answers[0].json()["error"]["message"]) == (500, "the search was aborted")


@pytest.mark.parametrize(
    ("route", "message"),
    [
        ("/sleep?level=3", "must be 1"),
        ("/sleep?level=-1", "must be 1"),
        ("/sleep?level=1&level=2", "level is given 2 times"),
        ("/sleep?levels=1", "unknown parameter 'levels'; did you mean 'level'?"),
        ("/wake_up?tags=all", "must be of weights and kv_cache"),
    ],
)
def test_what_is_wrong_is_a_400_that_names_it(server, route, message):
    refused = post(server, route)
    assert refused.status_code == 400
    assert message in refused.json()["error"]["message"]


def test_a_profile_is_taken_of_the_engine(server):
    assert post(server, "/stop_profile").status_code == 409
    assert post(server, "/start_profile").status_code == 200
    assert post(server, "/start_profile").status_code == 409
    assert post(server, "/v1/completions", json=SHORT).status_code == 200
    assert post(server, "/stop_profile").status_code == 200
    assert list(server.log_file.parent.glob("plugins/profile/*/*.xplane.pb"))
