"""POST /v1/load_lora_adapter and /v1/unload_lora_adapter: adapters that come and go while the server runs."""

import msgspec
from fastapi import APIRouter, Request
from starlette.responses import PlainTextResponse, Response

from jax_engine.async_llm import AsyncLLM
from jax_engine.core.core_client import EngineDeadError
from jax_engine.server.body import read_body
from jax_engine.server.errors import ApiError, bad_request, unavailable
from jax_engine.server.schemas import body_schema
from jax_engine.server.service import Service
from jax_engine.server.validation import decode


class LoadLoRAAdapterRequest(msgspec.Struct, forbid_unknown_fields=True):
    """An adapter to load: the name that requests will give as `model`, and its folder on the server's machine."""

    lora_name: str
    lora_path: str


class UnloadLoRAAdapterRequest(msgspec.Struct, forbid_unknown_fields=True):
    """The name of an adapter that is to go; vLLM's `lora_int_id` must be the adapter's own if it is given."""

    lora_name: str
    lora_int_id: int | None = None


def lora_router(service: Service) -> APIRouter:
    """vLLM's routes for adapters; without `--allow-runtime-lora-updating` they refuse."""
    router = APIRouter(tags=["adapters"])
    limit = service.settings.max_request_body_bytes

    def engine() -> AsyncLLM:
        for setting, is_on in (
            ("enable-lora", service.engine_config.enable_lora),
            ("allow-runtime-lora-updating", service.settings.allow_runtime_lora_updating),
        ):
            if not is_on:
                message = f"adapters cannot be changed on this server; start it with --{setting}"
                raise ApiError(403, message, code="adapters_are_fixed")
        return service.engine()

    @router.post("/v1/load_lora_adapter", openapi_extra=body_schema(LoadLoRAAdapterRequest))
    async def load(request: Request) -> Response:
        """Load an adapter; from then on it is a model of this server."""
        adapters = engine().adapters
        asked = decode(LoadLoRAAdapterRequest, await read_body(request, limit=limit))
        if asked.lora_name in service.settings.served_model_names:
            raise bad_request(ValueError(f"lora_name={asked.lora_name!r} is the model's own name; give another"))
        try:
            await adapters.serve(asked.lora_name, asked.lora_path)
        except ValueError as error:
            raise bad_request(error) from None
        except EngineDeadError as error:
            raise unavailable(f"the engine has died: {error}", code="engine_dead") from None
        return PlainTextResponse(f"Success: LoRA adapter '{asked.lora_name}' added successfully.")

    @router.post("/v1/unload_lora_adapter", openapi_extra=body_schema(UnloadLoRAAdapterRequest))
    async def unload(request: Request) -> Response:
        """Unload an adapter; requests that run with it end as they would."""
        adapters = engine().adapters
        asked = decode(UnloadLoRAAdapterRequest, await read_body(request, limit=limit))
        found = [lora for lora in adapters.served if lora.lora_name == asked.lora_name]
        if not found or asked.lora_int_id not in (None, found[0].lora_int_id):
            loaded = ", ".join(f"{lora.lora_name} ({lora.lora_int_id})" for lora in adapters.served) or "none"
            message = f"there is no adapter {asked.lora_name!r} of that number; loaded are {loaded}"
            raise ApiError(404, message, param="lora_name", code="adapter_not_found")
        try:
            await adapters.remove(found[0].lora_int_id)
        except ValueError:  # another front end's client was faster: it is gone, as asked
            pass
        except EngineDeadError as error:
            raise unavailable(f"the engine has died: {error}", code="engine_dead") from None
        return PlainTextResponse(f"Success: LoRA adapter '{asked.lora_name}' removed successfully.")

    return router
