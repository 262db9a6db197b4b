"""One engine core process before several front ends: everybody gets what is theirs."""

import asyncio

from tiny_engine import core_request

from jax_engine.config import EngineConfig
from jax_engine.core.core_client import CoreConnection, CoreProcess
from jax_engine.core.messages import Abort, Add, PrefixCacheReset, ResetPrefixCache, StepOutputs


async def tokens_of(core: CoreConnection, count: int) -> dict[str, list[int]]:
    """What comes by a connection until it has brought `count` tokens and every page is free."""
    tokens: dict[str, list[int]] = {}
    stats = None
    while stats is None or stats.num_pages_in_use or sum(map(len, tokens.values())) < count:
        step = await core.receive()
        assert isinstance(step, StepOutputs)
        stats = step.stats or stats
        for output in step.outputs:
            tokens.setdefault(output.request_id, []).extend(output.new_token_ids)
    return tokens


async def test_outputs_go_to_the_front_end_that_asked(tiny_settings):
    owner = await CoreProcess.spawn(EngineConfig(**tiny_settings), num_channels=3)
    never: asyncio.Future[str] = asyncio.get_running_loop().create_future()
    first, second = (CoreConnection(owner.folder, channel, never) for channel in (1, 2))
    try:
        await asyncio.gather(*(core.wait_until_ready() for core in (owner, first, second)))
        assert owner.info == first.info == second.info
        first.send(Add([core_request("a", [1, 2], 30), core_request("b", [3], 20)]))
        second.send(Add([core_request("c", [1, 2], 30), core_request("gone", [4], 200)]))
        second.send(Abort(["gone"]))
        tokens = await asyncio.gather(tokens_of(first, 50), tokens_of(second, 30), tokens_of(owner, 0))
        assert {name: len(ids) for name, ids in tokens[0].items()} == {"a": 30, "b": 20}
        assert len(tokens[1]["c"]) == 30
        assert set(tokens[1]) <= {"c", "gone"}
        assert tokens[1]["c"] == tokens[0]["a"], "equal greedy requests"
        assert tokens[2] == {}, "statistics go to all, outputs do not"
        second.send(ResetPrefixCache())
        while not isinstance(answer := await second.receive(), PrefixCacheReset):
            pass
        assert answer.done
    finally:
        await asyncio.gather(first.shutdown(), second.shutdown())
        await owner.shutdown()
