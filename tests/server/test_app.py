"""The app without an engine: what it answers before one is there, and what needs none."""

import httpx
import pytest

from jax_engine.config import EngineConfig
from jax_engine.core.messages import Starting
from jax_engine.server.app import build_app
from jax_engine.server.service import EXIT_ENGINE_DEAD, EXIT_OK, Service
from jax_engine.server.settings import ServerSettings


def service(**settings):
    return Service(EngineConfig(), ServerSettings(**settings), on_failure=lambda: None)


def client(of, **options):
    transport = httpx.ASGITransport(build_app(of), raise_app_exceptions=True)
    return httpx.AsyncClient(transport=transport, base_url="http://test", **options)


def error_of(response):
    (name,) = response.json()
    assert name == "error"
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error


async def test_not_ready_is_a_503_that_says_why():
    async with client(service()) as http:
        for route in ("/health", "/ping", "/v1/models"):
            response = await http.get(route)
            assert response.status_code == 503
            assert response.json()["error"]["code"] == "engine_starting"
            assert response.headers["retry-after"] == "1"
        assert (await http.get("/metrics")).status_code == 200
        assert (await http.get("/version")).json()["version"]


async def test_health_says_how_far_a_start_is():
    starting = service(api_keys=("key",))
    starting._note_progress(Starting(3, 40, 12.34))
    async with client(starting) as http:
        for _ in range(2):
            response = await http.get("/health")
            assert response.status_code == 503
            how_far = {name: response.json()[name] for name in ("status", "programs_compiled", "programs_planned")}
            assert how_far == {"status": "starting", "programs_compiled": 3, "programs_planned": 40}
            assert response.json()["compile_eta_seconds"] == 12.3
            assert "3 of 40 step programs are compiled, about 12 s to go" in response.json()["error"]["message"]
        metrics = (await http.get("/metrics")).text
        assert 'jax_engine:programs_compiled{engine="0",model_name="demo"} 3.0' in metrics
        assert (await http.get("/live")).json() == {"status": "starting"}
        starting.fail("the engine has died: out of memory", EXIT_ENGINE_DEAD)
        assert (await http.get("/live")).status_code == 503


async def test_a_dead_engine_is_a_503_with_its_reason():
    dead = service()
    dead.fail("the engine has died: out of memory", EXIT_ENGINE_DEAD)
    async with client(dead) as http:
        response = await http.post("/v1/completions", json={"prompt": "a"})
    assert response.status_code == 503
    assert error_of(response)["message"] == "the engine has died: out of memory"
    assert error_of(response)["code"] == "engine_dead"
    assert dead.exit_code != EXIT_OK


async def test_only_the_first_reason_of_a_failure_counts():
    reasons = []
    failing = Service(EngineConfig(), ServerSettings(), on_failure=lambda: reasons.append(1))
    failing.fail("first", EXIT_ENGINE_DEAD)
    failing.fail("second", EXIT_OK)
    assert (failing.reason, failing.exit_code, reasons) == ("first", EXIT_ENGINE_DEAD, [1])


async def test_api_key_guards_all_but_probes_and_metrics():
    guarded = service(api_keys=("first-key", "second-key"))
    async with client(guarded) as http:
        assert (await http.get("/version")).status_code == 200
        assert (await http.get("/metrics")).status_code == 200
        assert (await http.get("/health")).status_code == 503
        for path in ("/v1/models", "/generate", "/no-such-route", "/openapi.json"):
            refused = await http.get(path)
            assert refused.status_code == 401
            assert error_of(refused)["code"] == "invalid_api_key"
            assert refused.headers["www-authenticate"] == "Bearer"
        assert (await http.post("/reset_prefix_cache")).status_code == 401
        for key in ("first-key", "second-key"):
            assert (await http.get("/openapi.json", headers={"authorization": f"Bearer {key}"})).status_code == 200
            assert (await http.get("/openapi.json", headers={"x-api-key": key})).status_code == 200
        for key in ("wrong", "", "Bearer first-key"):
            assert (await http.get("/v1/models", headers={"x-api-key": key})).status_code == 401
        for header in ("Bearer wrong", "Bearer ", "Basic first-key", "first-key", "Bearer first-key second-key"):
            assert (await http.get("/v1/models", headers={"authorization": header})).status_code == 401


async def test_anthropics_clients_get_errors_in_their_own_shape():
    async with client(service(api_keys=("key",))) as http:
        refused = await http.post("/v1/messages/count_tokens", headers={"x-request-id": "mine"})
        absent = await http.get("/v1/messages/batches", headers={"x-api-key": "key"})
        other = await http.get("/v1/messages-of-ours", headers={"x-api-key": "key"})
    assert refused.status_code == 401
    assert refused.json()["type"] == "error"
    assert refused.json()["error"].keys() == {"type", "message"}
    assert refused.json()["error"]["type"] == "authentication_error"
    assert refused.headers["request-id"] == refused.headers["x-request-id"] == "mine"
    assert (absent.status_code, absent.json()["error"]["type"]) == (404, "not_found_error")
    assert "request-id" not in other.headers
    assert error_of(other)["code"] == "route_not_found"


async def test_what_changes_the_server_needs_a_key_or_is_off():
    async with client(service()) as http:
        refused = await http.post("/reset_prefix_cache")
        assert (refused.status_code, error_of(refused)["code"]) == (403, "route_is_off")
    async with client(service(api_keys=("key",))) as http:
        allowed = await http.post("/reset_prefix_cache", headers={"authorization": "Bearer key"})
        assert allowed.status_code == 503  # as far as the engine, which is not there
    async with client(service(enable_admin_routes=True)) as http:
        assert (await http.post("/reset_prefix_cache")).status_code == 503


async def test_a_key_never_appears_in_the_log(caplog):
    caplog.set_level("DEBUG")
    async with client(service(api_keys=("s3cret",))) as http:
        await http.get("/v1/models", headers={"authorization": "Bearer s3cret"})
        await http.get("/v1/models", headers={"authorization": "Bearer s3cret-but-wrong"})
    assert "s3cret" not in caplog.text


async def test_unknown_route_names_the_nearest():
    async with client(service()) as http:
        response = await http.post("/v1/chat/completion", json={})
    assert response.status_code == 404
    assert error_of(response)["message"].endswith("did you mean /v1/chat/completions?")


async def test_wrong_method_names_the_right_one():
    async with client(service()) as http:
        response = await http.get("/v1/completions")
    assert response.status_code == 405
    assert response.headers["allow"] == "POST"
    assert error_of(response)["code"] == "method_not_allowed"


@pytest.mark.parametrize(("given", "taken"), [("abc-1", True), ("", False), ("a b", False), ("x" * 129, False)])
async def test_request_id_is_kept_only_if_it_is_harmless(given, taken):
    async with client(service()) as http:
        response = await http.get("/version", headers={"x-request-id": given})
    assert (response.headers["x-request-id"] == given) is taken
    assert response.headers["x-request-id"]


async def test_a_bug_is_a_500_that_shows_only_the_request_id(caplog):
    broken = service()
    broken.stats = None  # calling it fails
    async with client(broken) as http:
        response = await http.get("/metrics", headers={"x-request-id": "find-me"})
    assert response.status_code == 500
    assert "find-me" in error_of(response)["message"]
    assert "NoneType" not in response.text
    assert "request find-me failed" in caplog.text
    assert "TypeError" in caplog.text


async def test_a_compressed_body_is_refused():
    async with client(service()) as http:
        response = await http.post("/v1/completions", content=b"x", headers={"content-encoding": "gzip"})
    assert response.status_code == 415


async def test_one_line_in_the_log_for_each_request(caplog):
    caplog.set_level("INFO", logger="jax_engine")
    async with client(service()) as http:
        await http.get("/v1/models?key=value", headers={"x-request-id": "one"})
        await http.get("/version")  # probes and scrapes are not worth a line
    (line,) = [record.message for record in caplog.records if record.name == "jax_engine.server.gate"]
    assert line.startswith("GET /v1/models 503 id=one time=")
    assert line.endswith("(engine_starting)")


async def test_a_path_cannot_forge_a_line_of_the_log(caplog):
    caplog.set_level("INFO", logger="jax_engine")
    async with client(service()) as http:
        await http.get("/%0AGET%20/forged")
    (line,) = [record.message for record in caplog.records if record.name == "jax_engine.server.gate"]
    assert "\n" not in line


async def test_requests_need_not_be_logged(caplog):
    caplog.set_level("INFO", logger="jax_engine")
    async with client(service(enable_log_requests=False)) as http:
        await http.get("/v1/models")
    assert not [record for record in caplog.records if record.name == "jax_engine.server.gate"]


async def test_openapi_document_tells_what_every_route_answers():
    async with client(service()) as http:
        paths = (await http.get("/openapi.json")).json()["paths"]
    answers = {path: set(operation["responses"]) for path, way in paths.items() for operation in way.values()}
    assert set(map(frozenset, answers.values())) == {frozenset({"200", "4XX", "5XX"})}, "response_schemas.py has them"


async def test_openapi_document_has_the_schema_of_every_body():
    async with client(service()) as http:
        document = (await http.get("/openapi.json")).json()
    for route in ("/v1/completions", "/v1/chat/completions", "/generate"):
        reference = document["paths"][route]["post"]["requestBody"]["content"]["application/json"]["schema"]["$ref"]
        schema = document["components"]["schemas"][reference.rpartition("/")[2]]
        assert "temperature" in schema["properties"]
