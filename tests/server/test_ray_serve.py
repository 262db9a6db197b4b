"""The application for Ray Serve: its arguments, and, slowly, a local Ray that runs it."""

import json

import httpx
import pytest
from starlette.types import Message

from counting_model import CountingModel
from jax_engine.config import EngineConfig
from jax_engine.server.ray_serve import RayOptions, ReadyApp, parse
from jax_engine.server.settings import ServerSettings


def test_arguments_are_those_of_serve_and_rays():
    """As text, from the command line, or as they stand in a configuration file."""
    config, settings, options = parse(
        {"model": "m", "max_model_len": "8K", "enable_lora": True, "override_generation_config": {"top_k": 4}}
        | {"served_model_name": ["a", "b"], "num_gpus": "0.5", "max_replicas": 3}
    )
    assert (config.model, config.max_model_len, config.enable_lora) == ("m", 8192, True)
    assert config.override_generation_config == {"top_k": 4}
    assert settings.served_model_names == ("a", "b")
    assert options == RayOptions(num_gpus=0.5, max_replicas=3)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"max_model_length": 5}, "max_model_length=5 is no argument: it must be a flag of jax-engine serve"),
        ({"port": 5}, "port=5 is no argument"),
        ({"nnodes": 2, "master_addr": "x"}, "nnodes=2 must be 1 under Ray"),
        ({"max_num_seqs": "many"}, "max_num_seqs: 'many' is not a number"),
        ({"min_replicas": 3, "max_replicas": 2}, "max_replicas=2 must be a whole number, between 3"),
        ({"num_gpus": "all"}, "num_gpus='all' must be a number"),
        ({"target_ongoing_requests": 0}, "target_ongoing_requests=0 must be a whole number, between 1"),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused(args, message):
    with pytest.raises(ValueError, match=message):
        parse(args)


def test_as_many_replicas_as_keep_what_is_in_flight_at_what_runs_at_once():
    config = EngineConfig(max_num_seqs=32, data_parallel_size=2)
    told = RayOptions(max_replicas=4, num_gpus=2, resources='{"slice": 1}').deployment(config)
    assert told["autoscaling_config"] == {"min_replicas": 1, "max_replicas": 4, "target_ongoing_requests": 64}
    assert told["max_ongoing_requests"] > 64, "or nothing would ever wait where it is counted"
    assert told["ray_actor_options"] == {"num_cpus": 1.0, "num_gpus": 2, "resources": {"slice": 1}}


async def test_a_replica_that_cannot_start_says_why(tmp_path):
    app = ReadyApp(EngineConfig(model=str(tmp_path / "none")), ServerSettings())
    sent: list[Message] = []
    asked: list[Message] = [{"type": "lifespan.startup"}, {"type": "lifespan.shutdown"}]

    async def receive() -> Message:
        return asked.pop(0)

    async def send(message: Message) -> None:
        sent.append(message)

    await app({"type": "lifespan", "asgi": {"version": "3.0"}, "state": {}}, receive, send)
    assert sent[0]["type"] == "lifespan.startup.failed"
    assert "does not exist" in sent[0]["message"]
    with pytest.raises(RuntimeError, match="does not exist"):
        app.check_alive()


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # Ray has some of its own
def test_a_local_ray_serves_and_streams(tmp_path):
    ray = pytest.importorskip("ray")
    from ray import serve

    from jax_engine.server.ray_serve import build

    model = CountingModel.write(tmp_path, max_model_len=512)
    small = {"max_num_seqs": 8, "max_num_batched_tokens": 8, "kv_cache_memory_bytes": "8M", "num_cpus": 0.5}
    ray.init(num_cpus=2, include_dashboard=False, _node_ip_address="127.0.0.1")
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": 8917})
        serve.run(build({"model": str(model.folder), **small}), route_prefix="/")
        url, body = "http://127.0.0.1:8917/v1/completions", {"prompt": model.prompt(5), "temperature": 0}
        # At once: an engine that still compiles would be a 503.
        answer = httpx.post(url, json={**body, "max_tokens": 20}, timeout=60)
        assert answer.json()["choices"][0]["text"] == model.answer(5, 20)
        pieces = []
        with httpx.stream("POST", url, json={**body, "max_tokens": 100, "stream": True}, timeout=60) as response:
            pieces = [line for line in response.iter_lines() if line.startswith("data: {")]
        assert len(pieces) > 20
        texts = [json.loads(piece.removeprefix("data: "))["choices"][0]["text"] for piece in pieces]
        assert "".join(texts) == model.answer(5, 100)
    finally:
        serve.shutdown()
        ray.shutdown()
