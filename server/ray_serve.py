"""jax-engine as an application of Ray Serve (extra `ray`): engines all over a cluster, as many as the queue needs.

    serve run jax_engine.server.ray_serve:build model=Qwen/Qwen3-8B num_gpus=1 max_replicas=4

The arguments are the flags of `jax-engine serve` by the names of their fields, and those of `RayOptions`. Every replica
is an engine with the whole server before it, in an actor that has `num_gpus` or `resources` of its machine.
"""

import asyncio
import dataclasses
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from starlette.types import Message, Receive, Scope, Send

from jax_engine.config import EngineConfig
from jax_engine.sampling_params import integer, number
from jax_engine.server.app import build_app
from jax_engine.server.cli.flags import Options, engine_config
from jax_engine.server.cli.root import HTTP_GROUPS, command_line, server_settings
from jax_engine.server.service import Service, State
from jax_engine.server.settings import ServerSettings

if TYPE_CHECKING:
    from ray.serve import Application

POLL_SECONDS = 0.2  # between two looks at an engine that starts
# What Ray's own proxies do, or what this process is not asked for.
RAYS_OWN = frozenset(flag.field for title in ("server", "encryption") for flag in HTTP_GROUPS[title]) | {"api_key"}


@dataclass(frozen=True, kw_only=True)
class RayOptions:
    """What Ray is to do with the engines.

    Raises:
        ValueError: a value outside its range.
    """

    num_cpus: float = 1.0  # of a machine, for each replica
    num_gpus: float = 0.0  # without, Ray hides the machine's GPUs from it
    resources: str = "{}"  # others, as JSON: {"TPU": 4}
    min_replicas: int = 1
    max_replicas: int = 1
    # Requests in flight, running and waiting, that a replica is to have; None: max_num_seqs, what runs at once.
    target_ongoing_requests: int | None = None

    def __post_init__(self) -> None:
        for name in ("num_cpus", "num_gpus"):
            number(name, getattr(self, name), low=0, high=1024, remedy="it is for each replica")
        integer("min_replicas", self.min_replicas, low=0, high=10_000, remedy="1 is the default")
        remedy = "it must be at least min_replicas, and 1"
        integer("max_replicas", self.max_replicas, low=max(1, self.min_replicas), high=10_000, remedy=remedy)
        if self.target_ongoing_requests is not None:
            remedy = "leave it out for max_num_seqs"
            integer("target_ongoing_requests", self.target_ongoing_requests, low=1, high=100_000, remedy=remedy)

    def deployment(self, config: EngineConfig) -> dict[str, Any]:
        """As Ray's decorator takes them. A replica is sent twice the target before Ray keeps requests back."""
        target = self.target_ongoing_requests or config.max_num_seqs * config.data_parallel_size
        return {
            "ray_actor_options": {
                "num_cpus": self.num_cpus,
                "num_gpus": self.num_gpus,
                "resources": json.loads(self.resources),
            },
            "max_ongoing_requests": 2 * target,
            "autoscaling_config": {
                "min_replicas": self.min_replicas,
                "max_replicas": self.max_replicas,
                "target_ongoing_requests": target,
            },
        }


def build(args: Mapping[str, Any]) -> "Application":
    """The application; what `serve run` and a Serve configuration file name.

    Raises:
        ValueError: an argument that is unknown, or out of range.
    """
    from ray import serve

    config, settings, options = parse(args)

    def make_app() -> "ReadyApp":
        return ReadyApp(config, settings)

    class Engine:
        """One replica: what Ray asks of it beside HTTP."""

        app: ReadyApp  # set by Ray

        async def check_health(self) -> None:
            """Raise once the engine has died, and Ray starts another replica."""
            self.app.check_alive()

    deployment = serve.deployment(name="jax-engine", **options.deployment(config))(serve.ingress(make_app)(Engine))
    return deployment.bind()


def parse(args: Mapping[str, Any]) -> tuple[EngineConfig, ServerSettings, RayOptions]:
    """The settings that arguments stand for; ValueError for one that there is not, or that cannot be used."""
    (serve_command,) = (command for command in command_line().commands if command.name == "serve")
    flags = {flag.field: flag for flag in serve_command.flags if flag.field not in RAYS_OWN}
    rays = {field.name: field for field in dataclasses.fields(RayOptions)}
    values: dict[str, Any] = {}
    given: dict[str, Any] = {}
    for name, value in args.items():
        texts = [text(one) for one in value] if isinstance(value, list) else [text(value)]
        if name in rays:
            given[name] = as_number(name, texts[0], rays[name].type)
        elif name == "model":
            values[name] = texts[0]
        elif name in flags:
            try:
                values[name] = flags[name].value(texts)
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from None
        else:
            known = ", ".join(rays)
            raise ValueError(
                f"{name}={value!r} is no argument: it must be a flag of jax-engine serve, with _, or {known}"
            )
    options = Options(values, {})
    config = engine_config(options)
    if config.nnodes != 1:
        raise ValueError(
            f"nnodes={config.nnodes} must be 1 under Ray, whose replicas are engines of one host each; "
            "server/deploy/kubernetes/leader_worker_set.yaml is for several"
        )
    return config, server_settings(options, config), RayOptions(**given)


def text(value: Any) -> str:
    """A value as the command line would have it: a Serve configuration file has numbers, switches and objects."""
    return value if isinstance(value, str) else json.dumps(value)


def as_number(name: str, given: str, kind: Any) -> Any:
    """What the text of one of `RayOptions` means."""
    if kind is str:
        return given
    make: Callable[[str], Any] = float if kind is float else int
    try:
        return make(given)
    except ValueError:
        raise ValueError(f"{name}={given!r} must be a number") from None


class ReadyApp:
    """A server's app whose start lasts until requests are served, which is when Ray sends some. Mutable; owned by its
    replica.
    """

    def __init__(self, config: EngineConfig, settings: ServerSettings) -> None:
        self._service = Service(config, settings, on_failure=lambda: None)
        self._app = build_app(self._service)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request, or the app's life."""

        async def send_when_ready(message: Message) -> None:
            if message["type"] == "lifespan.startup.complete":
                while self._service.state is State.STARTING:
                    await asyncio.sleep(POLL_SECONDS)
                if self._service.state is State.DEAD:
                    message = {"type": "lifespan.startup.failed", "message": self._service.reason}
            await send(message)

        await self._app(scope, receive, send_when_ready if scope["type"] == "lifespan" else send)

    def check_alive(self) -> None:
        """RuntimeError once the engine has died."""
        if self._service.state is State.DEAD:
            raise RuntimeError(self._service.reason)
