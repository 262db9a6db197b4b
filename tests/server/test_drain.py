"""What a signal means to those who ask how the server is."""

import httpx

from jax_engine.config import EngineConfig
from jax_engine.core.stats import EngineStats
from jax_engine.server.app import build_app
from jax_engine.server.service import Service, State
from jax_engine.server.settings import ServerSettings


class ReadyEngine:
    """As much of an engine as the probes look at."""

    def stats(self):
        return EngineStats(programs_compiled=40, programs_planned=40)


async def test_a_signal_ends_readiness_at_once_and_neither_liveness_nor_requests():
    service = Service(EngineConfig(), ServerSettings(), on_failure=lambda: None)
    service._engine, service.state = ReadyEngine(), State.READY
    transport = httpx.ASGITransport(build_app(service))
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as http:
        assert (await http.get("/health")).json()["status"] == "ready"
        service.is_draining = True
        health = await http.get("/health")
        assert health.status_code == 503
        assert health.json()["status"] == "shutting_down"
        assert health.json()["error"]["code"] == "shutting_down"
        assert (await http.get("/live")).json() == {"status": "shutting_down"}
        assert service.engine() is service._engine, "a request whose body was on its way is answered"
