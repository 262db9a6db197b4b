"""The user's own logits processors: compiled into every step, each row by its own arguments."""

from random import Random

import pytest
from plans import Oracle, Untimed
from tiny_engine import core_request, run_requests

from jax_engine.config import EngineConfig
from jax_engine.core.messages import TokenControls
from jax_engine.sampling.logits_processors import argument_defaults, load_processors

PATHS = tuple(f"token_processors:{name}" for name in ("never_again", "in_turn", "from_the_prompt"))
PROMPT = [5, 9, 2, 77]


def asked(name: str, controls: TokenControls | None = None, **arguments: float):
    given = TokenControls(processor_arguments=arguments) if arguments else controls
    return core_request(name, PROMPT, 12, controls=given)


@pytest.mark.parametrize("settings", [{}, {"deterministic": True}], ids=str)
def test_each_row_by_its_own_arguments(make_core, core, settings):
    """In steps of one token each, and then behind drafts, some of them wrong: by the output up to each row's place."""
    speculation = {"method": "ngram", "num_speculative_tokens": 5}
    few = {"max_num_batched_tokens": 8, "max_num_seqs": 4, "compile_before_ready": True}
    processed = make_core(logits_processors=PATHS, speculative_config=speculation, **few, **settings)
    drafts, processed._core.scheduler.drafts = processed._core.scheduler.drafts, None
    assert processed.info.processor_arguments == {"repeats": 1.0, "first": -1.0, "prompt_only": 0.0}
    requests = [
        asked("plain"),
        asked("never again", repeats=0.0),
        asked("in turn", first=20.0),
        asked("from the prompt", prompt_only=float(len(PROMPT) + 6)),
        asked("with a penalty", TokenControls(presence_penalty=-100.0)),
    ]
    tokens = run_requests(processed, requests)
    assert len(set(tokens["never again"])) == 12
    assert tokens["in turn"] == list(range(20, 32))
    assert set(tokens["from the prompt"][:6]) <= set(PROMPT)
    assert len(set(tokens["with a penalty"])) == 1
    for request in requests:
        assert run_requests(processed, [request])[request.request_id] == tokens[request.request_id]
    if not settings:
        assert tokens["plain"] == run_requests(core, [asked("plain")])["plain"], "its arguments ask for nothing"
        assert tokens["plain"] != tokens["never again"]
    processed._core.scheduler.drafts, drafts.times = drafts, Untimed((), ())
    for seed in range(4):
        drafts.proposer = Oracle(processed, tokens, 0.7, Random(seed))
        assert run_requests(processed, requests) == tokens
    assert processed.stats().spec_accepted_tokens_total > 20
    assert processed.stats().compiles_in_request_path_total == 0


@pytest.mark.parametrize(
    ("paths", "message"),
    [
        (["no_such_module:f"], r"logits_processors='no_such_module:f' names nothing that can be imported .*PYTHONPATH"),
        (["token_processors:nothing"], "names nothing that can be imported"),
        (["token_processors"], "give module:function"),
        (["token_processors:NOT_A_FUNCTION"], "is no function; it must be one of"),
        (["token_processors:of_one"], "takes 1 positional parameters; it must take two"),
        (["token_processors:without_default"], "the default of 'strength' must be a number"),
        ([PATHS[0], "token_processors:other_default"], "has the default 7 for 'repeats', and another 1; give both"),
    ],
    ids=str,
)
def test_what_cannot_be_registered_is_refused_with_a_reason(paths, message):
    with pytest.raises(ValueError, match=message):
        load_processors(paths)


def test_arguments_are_keyword_only_parameters_with_their_defaults():
    assert argument_defaults(load_processors(PATHS[:1] * 2)) == {"repeats": 1.0}


def test_the_setting_is_checked():
    assert EngineConfig(logits_processors=["a:b"]).logits_processors == ("a:b",)
    with pytest.raises(ValueError, match=r"logits_processors='a:b' must be a list of module:function"):
        EngineConfig(logits_processors="a:b")
    with pytest.raises(ValueError, match=r"num_scheduler_steps=4 must be 1 with logits_processors"):
        EngineConfig(logits_processors=["a:b"], num_scheduler_steps=4)
