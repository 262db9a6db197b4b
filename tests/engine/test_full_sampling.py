"""The FULL sampling mode in the engine: what requests ask for acts, on them alone, in every mix."""

import numpy as np
import pytest
from tiny_engine import VOCAB_SIZE, core_request, run_requests

from jax_engine.full_sampling import pack_bits, unpack_bits
from jax_engine.messages import TokenControls

PROMPTS = [[(7 * row + 3 * i) % VOCAB_SIZE for i in range(4 + 5 * row)] for row in range(6)]


def test_bits_are_packed_as_they_are_read():
    tokens = (0, 1, 31, 32, 63, 64, VOCAB_SIZE - 1)
    allowed = np.asarray(unpack_bits(pack_bits(tokens, VOCAB_SIZE)[None], VOCAB_SIZE))[0]
    assert np.flatnonzero(allowed).tolist() == list(tokens)


def controlled(name: str, prompt: list[int], **fields: object):
    controls = TokenControls(**fields.pop("controls", {}))
    return core_request(name, prompt, controls=controls, **fields)


@pytest.mark.parametrize("settings", [{}, {"deterministic": True}, {"num_scheduler_steps": 4}], ids=str)
def test_only_allowed_tokens_are_drawn_and_others_in_the_batch_stay_as_they_were(make_core, settings):
    core = make_core(compile_before_ready=True, **settings)
    plain = [core_request(f"plain {row}", prompt, 12) for row, prompt in enumerate(PROMPTS)]
    alone = run_requests(core, plain)
    allowed = (3, 40, 64, 99)
    controls = {"allowed_token_ids": allowed}
    asked = [
        controlled(f"allowed {row}", prompt, max_tokens=9, temperature=float(row % 2), controls=controls)
        for row, prompt in enumerate(PROMPTS)
    ]
    mixed = run_requests(core, [request for pair in zip(plain, asked, strict=True) for request in pair])
    assert {name: tokens for name, tokens in mixed.items() if name in alone} == alone
    for request in asked:
        assert set(mixed[request.request_id]) <= set(allowed)
        assert len(mixed[request.request_id]) == 9
    assert run_requests(core, asked) == {request.request_id: mixed[request.request_id] for request in asked}
    assert core.stats().compiles_in_request_path_total == 0
