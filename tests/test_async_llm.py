"""`AsyncLLM` on a tiny random model in its own process: streams, aborts of every kind, the death of the core."""

import asyncio
import json
import os
import random
import shutil
import signal
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from dataclasses import replace
from typing import Any

import pytest
import pytest_asyncio
from tiny_engine import TINY

from jax_engine import AsyncLLM, EngineConfig, EngineDeadError, RequestOutput, RequestOutputKind, SamplingParams
from jax_engine.loading.model_files import resolve_model_path

pytestmark = pytest.mark.asyncio(loop_scope="module")

MAX_MODEL_LEN = 96
DELTA, CUMULATIVE, FINAL_ONLY = RequestOutputKind.DELTA, RequestOutputKind.CUMULATIVE, RequestOutputKind.FINAL_ONLY


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> EngineConfig:
    """A small engine over random weights, with the built-in tokenizer."""
    folder = tmp_path_factory.mktemp("model")
    (folder / "config.json").write_text(json.dumps(TINY | {"vocab_size": 1024, "num_hidden_layers": 1}))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(resolve_model_path("demo") / name, folder)
    return EngineConfig(
        model=str(folder),
        load_format="dummy",
        max_model_len=MAX_MODEL_LEN,
        max_num_seqs=8,
        max_num_batched_tokens=8,
        compilation_cache_dir=str(tmp_path_factory.mktemp("compilation_cache")),
    )


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shared_engine(config: EngineConfig) -> AsyncIterator[AsyncLLM]:
    engine = await AsyncLLM.start(config)
    yield engine
    await engine.shutdown()


@pytest_asyncio.fixture(loop_scope="module")
async def engine(shared_engine: AsyncLLM) -> AsyncIterator[AsyncLLM]:
    """The shared engine; whatever a test does with it, nothing may stay in it."""
    yield shared_engine
    await idle(shared_engine)
    assert shared_engine._streams == {}


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.005)


async def idle(engine: AsyncLLM) -> None:
    """Until the core, after all that it was sent before, holds no request and no page."""
    before = engine.stats().prompt_tokens_total
    await outputs_of(
        engine, "probe", "abc", endless(max_tokens=1)
    )  # counters come with steps, and may be old without one

    def is_idle() -> bool:
        stats = engine.stats()
        held = (stats.num_running, stats.num_waiting, stats.num_pages_in_use, stats.num_tokens_in_pages)
        return stats.prompt_tokens_total > before and held == (0, 0, 0, 0)

    await until(is_idle)


def num_ended(engine: AsyncLLM) -> int:
    """How many sequences the core has let go of, for whatever reason."""
    return sum(engine.stats().finished_requests_total.values())


def endless(**params: Any) -> SamplingParams:
    return SamplingParams(**{"seed": 3, "max_tokens": 80, "ignore_eos": True, "output_kind": DELTA, **params})


async def outputs_of(engine: AsyncLLM, request_id: str, prompt: Any, params: SamplingParams) -> list[RequestOutput]:
    return [output async for output in engine.generate(prompt, params, request_id)]


async def test_every_kind_of_output_tells_the_same_story(engine: AsyncLLM) -> None:
    deltas, growing, final = await asyncio.gather(
        *(outputs_of(engine, kind.name, "abc", endless(output_kind=kind)) for kind in (DELTA, CUMULATIVE, FINAL_ONLY))
    )
    (last,) = final
    completion = last.outputs[0]
    assert last.finished and len(completion.token_ids) == 80
    assert growing[-1].outputs == last.outputs
    assert len(deltas) > 1 and len(growing) > 1
    assert "".join(output.outputs[0].text for output in deltas) == completion.text
    assert [token for output in deltas for token in output.outputs[0].token_ids] == completion.token_ids
    assert all(completion.text.startswith(output.outputs[0].text) for output in growing)
    assert [output.finished for output in deltas] == [False] * (len(deltas) - 1) + [True]
    metrics = last.metrics
    assert metrics is not None and metrics.first_scheduled_time and metrics.first_token_time and metrics.last_token_time
    assert metrics.arrival_time <= metrics.first_scheduled_time <= metrics.first_token_time <= metrics.last_token_time


async def test_a_slow_reader_gets_what_came_meanwhile_in_one_output(engine: AsyncLLM) -> None:
    stream = await engine.add_request("slow", "abc", endless())
    first = await anext(stream)
    await until(lambda: engine._outputs.num_requests == 0)
    rest = await anext(stream)
    assert rest.finished and len(first.outputs[0].token_ids) + len(rest.outputs[0].token_ids) == 80
    with pytest.raises(StopAsyncIteration):
        await anext(stream)


async def test_a_stop_string_frees_the_request_in_the_core(engine: AsyncLLM) -> None:
    (plain,) = await outputs_of(engine, "plain", "abc", endless(output_kind=FINAL_ONLY))
    text = plain.outputs[0].text
    stop = text[len(text) // 3 :][:3]
    outputs = await outputs_of(engine, "stopped", "abc", endless(stop=stop))
    assert "".join(output.outputs[0].text for output in outputs) == text[: text.index(stop)]
    assert (outputs[-1].outputs[0].finish_reason, outputs[-1].outputs[0].stop_reason) == ("stop", stop)
    await idle(engine)


async def test_leaving_in_any_way_frees_the_pages(engine: AsyncLLM) -> None:
    """Sixty streams in an engine for eight, each dropped in one of four ways at a random moment, or read to its end."""
    choose = random.Random(0)

    async def visit(index: int) -> str:
        request_id = f"visit {index}"
        patience = choose.randrange(12)
        way = choose.choice(["stream.abort", "engine.abort", "leave the loop", "stay"])
        if way == "leave the loop":
            async with aclosing(engine.generate("abc", endless(), request_id)) as generated:
                async for _ in generated:
                    patience -= 1
                    if patience <= 0:
                        break
            return way
        stream = await engine.add_request(request_id, "abc", endless())
        outputs = []
        async for output in stream:
            outputs.append(output)
            if len(outputs) == patience and way == "stream.abort":
                stream.abort()
            if len(outputs) == patience and way == "engine.abort":
                await engine.abort(request_id)
        assert outputs[-1].finished
        return str(outputs[-1].outputs[0].finish_reason)

    await idle(engine)
    before = num_ended(engine)
    tasks = [asyncio.create_task(visit(index)) for index in range(60)]
    for task in tasks[::7]:
        await until(lambda: engine.stats().num_running > 0)
        task.cancel()
    results = await asyncio.gather(*tasks, return_exceptions=True)
    kinds = {"cancelled" if isinstance(result, asyncio.CancelledError) else result for result in results}
    assert kinds == {"abort", "length", "leave the loop", "cancelled"}
    for index in range(0, 60, 7):  # a stream that nobody reads any more is its owner's to abort
        await engine.abort(f"visit {index}")
    await idle(engine)
    await until(lambda: num_ended(engine) == before + 60 + 1)  # and the probe


async def test_a_bad_request_is_refused_before_it_streams_and_harms_no_other(engine: AsyncLLM) -> None:
    running = await engine.add_request("running", "abc", endless())
    for prompt, message in [("", "prompt is empty"), ([1024], "holds 1024"), ("a b " * 1000, "at most 95 fit")]:
        with pytest.raises(ValueError, match=message):
            await engine.add_request("bad", prompt, SamplingParams())
    with pytest.raises(ValueError, match="request_id='running' is in use"):
        await engine.add_request("running", "abc", endless())
    assert sum([len(output.outputs[0].token_ids) async for output in running]) == 80


async def test_a_long_text_is_accepted_too(engine: AsyncLLM) -> None:
    """It is tokenized in a thread. One token of the built-in tokenizer is a run of spaces."""
    text = " " * 3000
    count = len(engine.tokenizer.encode(text))
    if count >= MAX_MODEL_LEN:
        with pytest.raises(ValueError, match=f"prompt has {count} tokens"):
            await engine.add_request("long", text, endless(max_tokens=2))
    else:
        (output,) = await outputs_of(engine, "long", text, endless(max_tokens=2, output_kind=FINAL_ONLY))
        assert len(output.prompt_token_ids) == count


async def test_a_chat_is_rendered_and_tokenized_once(engine: AsyncLLM) -> None:
    conversation = [{"role": "user", "content": "Hi"}]
    expected = engine.get_tokenizer().apply_chat_template(conversation, add_generation_prompt=True, return_dict=False)
    prompt = engine.render_chat(conversation)
    (output,) = await outputs_of(engine, "chat", prompt, endless(max_tokens=2, output_kind=FINAL_ONLY))
    assert output.prompt_token_ids == expected
    with pytest.raises(ValueError, match="must be a list of at least one message"):
        engine.render_chat([])


async def test_what_an_engine_says_of_itself(engine: AsyncLLM, config: EngineConfig) -> None:
    await engine.check_health()
    assert not engine.is_dead and engine.dead_reason is None
    assert engine.config is config and str(engine.model_path) == config.model
    assert engine.info.max_model_len == MAX_MODEL_LEN
    assert engine.stats().num_pages == engine.info.num_pages > 0
    assert engine.get_default_sampling_params() == SamplingParams()


async def test_when_the_core_dies_everyone_learns_it(config: EngineConfig) -> None:
    engine = await AsyncLLM.start(config)
    reasons: list[str] = []
    engine.on_dead(reasons.append)
    waiting = [asyncio.create_task(outputs_of(engine, str(i), "abc", endless(max_tokens=90))) for i in range(12)]
    await until(lambda: engine.stats().num_running > 0)
    os.kill(engine._replicas._cores[0].process.pid, signal.SIGKILL)
    results = await asyncio.gather(*waiting, return_exceptions=True)
    assert {type(result) for result in results} <= {EngineDeadError, list}
    assert isinstance(results[-1], EngineDeadError), "there are more requests than slots"
    assert "SIGKILL" in str(results[-1])
    assert engine.is_dead and engine.dead_reason is not None
    assert reasons == [engine.dead_reason]
    engine.on_dead(reasons.append)
    assert len(reasons) == 2, "whoever asks later is told at once"
    with pytest.raises(EngineDeadError, match="SIGKILL"):
        await engine.add_request("late", "abc", endless())
    with pytest.raises(EngineDeadError, match="SIGKILL"):
        await engine.check_health()
    await engine.abort("0")
    await engine.shutdown()


async def test_shutdown_ends_the_streams_and_the_process(config: EngineConfig) -> None:
    engine = await AsyncLLM.start(config)
    reasons: list[str] = []
    engine.on_dead(reasons.append)
    stream = await engine.add_request("r", "abc", endless())
    await anext(stream)
    await engine.shutdown()
    with pytest.raises(EngineDeadError, match="shut down"):
        async for _ in stream:
            pass
    assert engine._replicas._cores[0].process.returncode is not None
    assert reasons == [], "whoever shuts it down knows"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "/nowhere/at/all"}, "does not exist"),
        ({"tokenizer": "/nowhere/at/all"}, "no tokenizer could be loaded"),
    ],
    ids=["model", "tokenizer"],
)
async def test_a_mistake_in_the_settings_is_a_value_error_and_no_process_stays(
    config: EngineConfig, changes: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    started = []
    start_process = asyncio.create_subprocess_exec

    async def remember(*args: Any, **settings: Any) -> asyncio.subprocess.Process:
        started.append(await start_process(*args, **settings))
        return started[-1]

    monkeypatch.setattr(asyncio, "create_subprocess_exec", remember)
    with pytest.raises(ValueError, match=message):
        await AsyncLLM.start(replace(config, **changes))
    assert all(process.returncode is not None for process in started)
