"""What the routes share: the engine and its state, the settings, the metrics, the requests in flight."""

import asyncio
import gc
import hashlib
import logging
import time
from collections.abc import Awaitable, Callable
from enum import Enum
from functools import partial
from typing import Protocol

import jax_engine
from jax_engine.async_llm import AsyncLLM
from jax_engine.config import EngineConfig
from jax_engine.core.core_client import EngineDeadError, OnProgress
from jax_engine.core.messages import Starting
from jax_engine.core.stats import EngineStats
from jax_engine.frontend.progress import CompileBar
from jax_engine.lora_request import LoRARequest
from jax_engine.server.errors import ApiError, unavailable
from jax_engine.server.in_flight import InFlight
from jax_engine.server.metrics.cells import CellMemory
from jax_engine.server.metrics.metrics import Metrics
from jax_engine.server.metrics.throughput_log import log_throughput
from jax_engine.server.openai.chat_format import ChatFormat, chat_format
from jax_engine.server.settings import ServerSettings
from jax_engine.server.tracing import make_tracer

logger = logging.getLogger(__name__)

# uvicorn's own limit on the grace period is only there for what our end of it does not reach, such as a slow upload.
BACKSTOP_SECONDS = 5
EXIT_OK, EXIT_ENGINE_DEAD, EXIT_USER_ERROR = 0, 1, 2


class StartEngine(Protocol):
    """How a front end gets its engine, with the errors of `AsyncLLM.start`."""

    def __call__(self, *, on_progress: OnProgress) -> Awaitable[AsyncLLM]: ...


class State(Enum):
    """Where a server is in its life; requests are served in READY alone."""

    STARTING = "starting"
    READY = "ready"
    DEAD = "dead"


class Service:
    """One server's engine and what goes with it. Mutable; owned by the app, in one event loop."""

    def __init__(
        self,
        engine_config: EngineConfig,
        settings: ServerSettings,
        *,
        on_failure: Callable[[], None],
        start_engine: StartEngine | None = None,
        memory: CellMemory | None = None,
        created: int | None = None,
    ) -> None:
        """`on_failure` is called once when the engine cannot start or has died; the process should then end.

        A front end that is one of several says how it gets its engine (`start_engine`; left out, it starts one of its
        own), counts in `memory`, and has the others' `created`, in seconds since 1970.
        """
        self.engine_config = engine_config
        self.settings = settings
        memory = memory or CellMemory.alone(engines=engine_config.data_parallel_size)
        self._logs_stats = memory.is_first and not settings.disable_log_stats
        self.tracer = make_tracer(settings)
        self._background: list[asyncio.Task[None]] = []  # ends with the service
        self.metrics = Metrics(settings.model_name, memory, engine_config=engine_config)
        self.in_flight = InFlight(self.metrics.server_load, settings.request_timeout)
        # Changes with what may change answers to the same request.
        known = f"{jax_engine.__version__} {engine_config!r}"
        self.system_fingerprint = f"fp_{hashlib.sha256(known.encode()).hexdigest()[:10]}"
        self.created = int(time.time()) if created is None else created
        self.state = State.STARTING
        self.is_draining = False  # a signal has come: what runs is finished, and nobody should send anything new
        self.exit_code = EXIT_OK
        self.reason = "the engine is starting: the model loads and its step programs compile"
        self._on_failure = on_failure
        self._start_engine: StartEngine = start_engine or partial(AsyncLLM.start, engine_config)
        self._bar, self._shows_progress = CompileBar(), start_engine is None
        self._progress = Starting()  # of an engine that is not up yet
        self.chat_format = ChatFormat()  # the model's, once the engine is up
        self._engine: AsyncLLM | None = None
        self._starting: asyncio.Task[None] | None = None

    def begin(self) -> None:
        """Start the engine; the server answers meanwhile that it is not ready."""
        self._starting = asyncio.create_task(self._start(), name="engine start")

    async def end(self) -> None:
        """Stop the engine, also one that is still starting."""
        for task in self._background:
            task.cancel()
        if self._starting is not None:
            self._starting.cancel()
            await asyncio.wait({self._starting})
        if self._engine is not None:
            await self._engine.shutdown()
        if self.tracer is not None:
            await asyncio.to_thread(self.tracer.shutdown)

    def engine(self) -> AsyncLLM:
        """The engine, ready to serve; ApiError 503 when it is not."""
        if self._engine is None or self.state is not State.READY:
            retry_after = 1 if self.state is State.STARTING else None
            raise unavailable(self.reason, code=f"engine_{self.state.value}", retry_after=retry_after)
        return self._engine

    def stats(self) -> EngineStats:
        """The engine's latest counters; before it is up, those of its compiling alone."""
        if self._engine is not None:
            return self._engine.stats()
        done = self._progress
        return EngineStats(
            programs_compiled=done.programs_compiled,
            programs_planned=done.programs_planned,
            compile_eta_seconds=done.compile_eta_seconds,
        )

    def stats_by_engine(self) -> list[EngineStats]:
        """Those of each replica; before they are up, of the first one for all."""
        if self._engine is not None:
            return self._engine.stats_by_replica()
        return [self.stats(), *[EngineStats()] * (self.engine_config.data_parallel_size - 1)]

    def check_ready(self) -> None:
        """ApiError 503 unless new requests should be sent here: not while starting or shutting down."""
        self.engine()
        if self.is_draining:
            raise unavailable("the server is shutting down", code="shutting_down")

    def adapters(self) -> tuple[LoRARequest, ...]:
        """The adapters that clients may name as a model; none before the engine is up."""
        return self._engine.adapters.served if self._engine is not None else ()

    def adapter_of(self, name: str | None) -> LoRARequest | None:
        """The adapter that a request for the model `name` uses; None for the names of the model itself, and for None.

        ApiError 404 for a name that is neither.
        """
        names = self.settings.served_model_names
        if name is None or name in names:
            return None
        adapters = {lora.lora_name: lora for lora in self.adapters()}
        if name not in adapters:
            served = ", ".join([*names, *adapters])
            message = f"the model {name!r} does not exist; this server has: {served}"
            raise ApiError(404, message, param="model", code="model_not_found")
        return adapters[name]

    def fail(self, reason: str, exit_code: int) -> None:
        """The engine is gone for good; only the first reason counts."""
        if self.state is State.DEAD:
            return
        self.state, self.reason, self.exit_code = State.DEAD, reason, exit_code
        self._on_failure()

    def _note_progress(self, progress: Starting) -> None:
        self._progress = progress
        if self._shows_progress:
            self._bar.update(progress.programs_compiled, progress.programs_planned, progress.compile_eta_seconds)
        if self.state is State.STARTING and progress.programs_planned:
            done, planned = progress.programs_compiled, progress.programs_planned
            left = f", about {progress.compile_eta_seconds:.0f} s to go" if progress.compile_eta_seconds else ""
            self.reason = f"the engine is starting: {done} of {planned} step programs are compiled{left}"

    async def _start(self) -> None:
        try:
            with self._bar:
                engine = await self._start_engine(on_progress=self._note_progress)
        except ValueError as error:
            self.fail(str(error), EXIT_USER_ERROR)
        except EngineDeadError as error:
            self.fail(str(error), EXIT_ENGINE_DEAD)
        except Exception as error:  # nothing waits for this task: say what went wrong, and end
            logger.exception("the engine cannot start")
            self.fail(f"the engine cannot start: {type(error).__name__}", EXIT_ENGINE_DEAD)
        else:
            # Neither the libraries nor the tokenizer are garbage to look for, for a tenth of a second, between tokens.
            gc.collect()
            gc.freeze()
            self.chat_format = chat_format(self.settings, engine.tokenizer)
            self._engine, self.state = engine, State.READY
            info = engine.info
            logger.info(
                "ready: model %s, context %d tokens, %s KV pages of %d tokens",
                ", ".join(self.settings.served_model_names),
                info.max_model_len,
                " + ".join(str(stats.num_pages) for stats in engine.stats_by_replica()),
                info.page_size,
            )
            if self._logs_stats:
                self._background.append(asyncio.create_task(log_throughput(self.stats), name="throughput log"))
            engine.on_dead(lambda reason: self.fail(f"the engine has died: {reason}", EXIT_ENGINE_DEAD))
