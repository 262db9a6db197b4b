"""The scheduler in virtual time: requests are conserved, times add up by hand, loads are what they say they are."""

import json
import math
import random
import sys
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path

import pytest

import simulate
import simulate_plot
from jax_engine.config import SCHEDULING_POLICIES
from jax_engine.scheduling.step_plan import SchedulerLimits
from simulate_cost import PRESETS, StepCost, find_cost
from simulate_engine import Outcome, Simulation
from simulate_fit import TimedStep, fit
from simulate_load import Conversation, Lengths, Synthetic, Turn, read_recorded
from simulate_report import Objectives, Report, report, table

# A step costs 1 s, a row 0.125 s, a cached token 1/64 s, a query-key pair 1/1024 s: exact in binary.
COST = StepCost("hand", "made up", 1.0, 0.0, 0.125, 1 / 64, 1 / 1024, kv_tokens=1024)
LIMITS = SchedulerLimits(num_pages=64, page_size=16, max_num_seqs=8, token_budget=32)
LOAD = Synthetic(
    num_requests=200, rate=0.2, prompt=Lengths(20, 0.7), output=Lengths(6, 0.5), max_model_len=256, think_seconds=5
)


def single(number: int, prompt: int, output: int, arrival: float = 0.0) -> Conversation:
    return Conversation(number, (Turn(prompt, output, arrival),))


def run(conversations: list[Conversation], limits: SchedulerLimits = LIMITS, **options: float) -> Outcome:
    return Simulation(conversations, limits, COST, max_model_len=256, **options).run()


def reported(outcome: Outcome, ttft_ms: float = math.inf) -> Report:
    return report(outcome, Objectives(ttft_ms=ttft_ms), policy="fcfs", load="", offered=1.0, core_seconds=0.0)


def test_one_requests_times_are_sums_of_its_steps() -> None:
    """A prompt of 10 in a program of 12 rows, then two steps of one row: each waits for the one before it."""
    (life,) = run([single(0, prompt=10, output=3, arrival=5.0)]).lives
    prompt_step = 1 + 12 * 0.125 + 10 / 64 + 55 / 1024
    decode_steps = [1 + 0.125 + length / 64 + length / 1024 for length in (11, 12)]
    assert life.scheduled == 5.0
    assert life.timing.time_to_first_token == prompt_step
    assert life.timing.time_per_output_token == sum(decode_steps) / 2


def test_a_step_costs_its_padded_rows_but_no_less_than_reading_the_weights() -> None:
    floor = replace(COST, weights_seconds=4.0)
    assert COST.seconds((), rows=8) == 2.0
    assert floor.seconds((), rows=8) == 5.0
    assert floor.seconds((), rows=64) == COST.seconds((), rows=64)


def test_a_request_that_comes_during_a_step_waits_for_the_one_after_the_next() -> None:
    """Step 2 is launched while step 1 runs; who arrives in between is in step 3."""
    outcome = run([single(0, prompt=8, output=4), single(1, prompt=8, output=1, arrival=0.5)])
    first, second = outcome.lives
    one = 1 + 1 + 8 / 64 + 36 / 1024
    two = 1 + 0.125 + 9 / 64 + 9 / 1024
    three = 1 + 12 * 0.125 + (8 + 10) / 64 + (36 + 10) / 1024
    assert second.scheduled == first.first_token == one
    assert second.first_token == one + two + three


@pytest.mark.parametrize("policy", SCHEDULING_POLICIES)
@pytest.mark.parametrize("max_tokens", [None, 60])
def test_every_request_ends_once_with_its_length(policy: str, max_tokens: int | None) -> None:
    """Also where pages run out, and where the scheduler cannot know when an answer ends."""
    few_pages = replace(LIMITS, num_pages=20, policy=policy)
    conversations = replace(LOAD, rate=2.0, mean_turns=2.0, priorities=((0, 1), (5, 1))).conversations()
    outcome = run(conversations, few_pages, max_tokens=max_tokens)
    asked = Counter((c.number, turn) for c in conversations for turn in range(len(c.turns)))
    assert Counter((life.conversation.number, life.turn) for life in outcome.lives) == asked
    assert asked.total() == 200
    for life in outcome.lives:
        assert life.num_tokens == life.conversation.turns[life.turn].output_tokens
        assert life.prompt_tokens == life.conversation.prompt_length(life.turn)
        assert life.arrival <= life.scheduled < life.first_token <= life.finished
    assert outcome.scheduler.num_preemptions > 0
    assert outcome.scheduler.cache.pool.num_in_use == 0
    assert outcome.scheduler.finished == {"stop": 200}


def test_equal_seeds_give_equal_outcomes() -> None:
    def figures(seed: int) -> dict[str, object]:
        measured = reported(run(replace(LOAD, seed=seed).conversations())).as_dict()
        return {name: value for name, value in measured.items() if name not in ("schedule_us", "commit_us")}

    assert figures(1) == figures(1)
    assert figures(1) != figures(2)


def test_a_load_twice_as_heavy_raises_the_wait_for_first_tokens() -> None:
    light, heavy = (reported(run(replace(LOAD, rate=rate).conversations())) for rate in (0.15, 0.3))
    assert heavy.ttft_ms.percentiles.p99 > 1.5 * light.ttft_ms.percentiles.p99
    assert heavy.mean_queue > light.mean_queue


def test_bursts_raise_the_wait_at_the_same_rate() -> None:
    steady, bursty = (reported(run(replace(LOAD, burstiness=shape).conversations())) for shape in (1.0, 0.05))
    assert bursty.ttft_ms.percentiles.p90 > steady.ttft_ms.percentiles.p90


def test_arrivals_come_at_the_rate() -> None:
    for burstiness in (1.0, 0.3):
        load = replace(LOAD, num_requests=20_000, rate=4.0, burstiness=burstiness, prompt=Lengths(20, 0))
        last = load.conversations()[-1].turns[0].delay
        assert last == pytest.approx(5000, rel=0.05)


def test_lengths_have_their_mean() -> None:
    load = replace(LOAD, num_requests=20_000, prompt=Lengths(50, 0.8), max_model_len=10_000)
    lengths = [turn.new_tokens for conversation in load.conversations() for turn in conversation.turns]
    assert sum(lengths) / len(lengths) == pytest.approx(50, rel=0.03)


def test_shared_beginnings_are_found_and_nothing_else_is() -> None:
    alone = reported(run(LOAD.conversations()))
    prefixes = reported(run(replace(LOAD, num_prefixes=3, prefix_tokens=64).conversations()))
    turns = reported(run(replace(LOAD, mean_turns=4.0).conversations()))
    assert alone.hit_rate == 0
    assert prefixes.hit_rate > 0.5
    assert turns.hit_rate > 0.1
    off = run(replace(LOAD, mean_turns=4.0).conversations(), replace(LIMITS, enable_prefix_caching=False))
    assert reported(off).hit_rate == 0


def test_a_later_turn_begins_with_the_earlier_prompt_and_its_answer() -> None:
    """49 of the first turn's 50 tokens were computed, its last one only drawn: three full pages of 16."""
    conversation = Conversation(7, (Turn(30, 20, 0.0), Turn(10, 2, 100.0)))
    first, second = run([conversation]).lives
    assert second.arrival == first.finished + 100.0
    assert second.prompt_tokens == 30 + 20 + 10
    assert second.num_cached_tokens == 48


def test_clients_without_a_token_give_up_and_are_not_served() -> None:
    conversations = replace(LOAD, rate=1.0).conversations()
    outcome = run(conversations, patience=40.0)
    gone = [life for life in outcome.lives if life.gave_up]
    assert gone and len(gone) == outcome.scheduler.finished["abort"]
    measured = reported(outcome)
    assert measured.rates.requests + measured.gave_up == 200
    assert measured.ttft_ms.quantiles[-1] <= 40e3 + 1e4  # a step that runs as time is up still delivers


def test_a_report_counts_by_hand() -> None:
    """Two requests in one step, one in the next: nine rows of twelve, then one of one."""
    outcome = run([single(0, prompt=8, output=2), single(1, prompt=1, output=1)])
    measured = reported(outcome, ttft_ms=1.0)
    step = 1 + 1.5 + 9 / 64 + 37 / 1024
    assert measured.rates.seconds == step + 1.125 + 9 / 64 + 9 / 1024
    assert measured.ttft_ms.percentiles.p99 == 1e3 * step
    assert measured.good_requests == 0
    assert measured.padding_share == 3 / 13
    assert measured.busy_share == 1
    assert (measured.steps, measured.preemptions, measured.mean_queue) == (2, 0, 0.0)
    assert reported(outcome, ttft_ms=4000).goodput == 2 / measured.rates.seconds
    assert measured.page_waste == 1 - 9 / 32


def test_presets_are_the_data_sheets_arithmetic() -> None:
    """16 GB of weights at 80% of 1,640 GB/s, and twice the parameters' operations a row at 60% of 918 TFLOP/s."""
    cost = find_cost("llama-3-8b-v6e")
    assert cost.weights_seconds == pytest.approx(15.01e9 / 1.312e12)
    assert cost.row_seconds == pytest.approx(15.01e9 / 550.8e12)
    assert all(preset.kv_tokens > 50_000 for preset in PRESETS.values())


def test_coefficients_are_read_back_from_their_file(tmp_path: Path) -> None:
    path = tmp_path / "cost.json"
    COST.write(path)
    assert find_cost(str(path)) == COST


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"row_seconds": -1}, "row_seconds=-1 must be a number, 0 or more"),
        ({"kv_tokens": 0.5}, "kv_tokens=0.5 must be a whole number"),
        ({"step_seconds": 0, "row_seconds": 0}, "a step would take no time"),
        ({"warp": 9}, "exactly the fields"),
    ],
)
def test_coefficients_that_make_no_sense_are_refused(tmp_path: Path, change: dict[str, float], message: str) -> None:
    path = tmp_path / "cost.json"
    path.write_text(json.dumps({**asdict(COST), **change}))
    with pytest.raises(ValueError, match=message):
        StepCost.read(path)


BURSTGPT = "Timestamp,Model,Request tokens,Response tokens,Total tokens\n45,ChatGPT,20,9,29\n41,GPT-4,7,3,10\n"
AZURE = (
    "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:42.5000000,7,3\n2024-05-10 00:00:00.009930+00:00,20,9\n"
)
OURS = (
    '{"timestamp": 1, "prompt_tokens": 7, "output_tokens": 3}\n'
    '{"timestamp": 5, "prompt_tokens": 20, "output_tokens": 9}\n'
)


@pytest.mark.parametrize(("name", "text"), [("a.csv", BURSTGPT), ("b.csv", AZURE), ("c.jsonl", OURS)])
def test_recorded_requests_are_read_in_order_of_arrival(tmp_path: Path, name: str, text: str) -> None:
    path = tmp_path / name
    path.write_text(text)
    first, second = (conversation.turns[0] for conversation in read_recorded(path, max_model_len=64))
    assert (first.delay, first.new_tokens, first.output_tokens) == (0, 7, 3)
    assert (second.new_tokens, second.output_tokens) == (20, 9)
    if name != "b.csv":
        assert second.delay == 4
        assert read_recorded(path, max_model_len=64, speed=8)[1].turns[0].delay == 0.5
    assert len(read_recorded(path, max_model_len=64, num_requests=1)) == 1


def test_recorded_groups_share_their_beginning(tmp_path: Path) -> None:
    header = "timestamp,prompt_tokens,output_tokens,priority,prefix_group,prefix_tokens\n"
    path = tmp_path / "groups.csv"
    path.write_text(header + "0,50,2,1,a,40\n100,60,2,,b,40\n200,45,2,,a,40\n300,33,1,,,\n400,33,1,,,\n")
    lives = run(read_recorded(path, max_model_len=64)).lives
    assert [life.num_cached_tokens for life in lives] == [0, 0, 32, 0, 0]
    assert [life.conversation.priority for life in lives] == [1, 0, 0, 0, 0]
    path.write_text("timestamp,prompt_tokens,output_tokens,prefix_group\n0,40,2,a\n100,60,2,a\n")
    assert [life.num_cached_tokens for life in run(read_recorded(path, max_model_len=64)).lives] == [0, 32]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("x,3,4,", r"trace\.csv, line 3: timestamp is 'x' and must be seconds, or a date and time"),
        ("1,3.5,4,", r"line 3: prompt_tokens is '3\.5' and must be a whole number of at least 1"),
        ("1,3,0,", "line 3: output_tokens is '0' and must be .* leave it out if its request failed"),
        ("1,3,,", "line 3: no output_tokens; it may be called output_tokens or Response tokens or GeneratedTokens"),
        ("1,60,5,", "line 3: 60 prompt and 5 output tokens are more than max_model_len=64; raise it"),
        ("1,3,4,9", "line 3: prefix_tokens without prefix_group"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, row: str, message: str) -> None:
    path = tmp_path / "trace.csv"
    path.write_text("timestamp,prompt_tokens,output_tokens,prefix_tokens\n0,3,4,\n" + row + "\n")
    with pytest.raises(ValueError, match=message):
        read_recorded(path, max_model_len=64)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("t.jsonl", "{\n", "line 1 is not JSON"),
        ("t.jsonl", "[1]\n", "line 1 must be an object"),
        ("t.csv", "timestamp,prompt_tokens,output_tokens\n", "has no requests"),
        ("t.txt", "1 2 3\n", r"must end in \.jsonl"),
    ],
)
def test_a_file_of_no_requests_is_refused(tmp_path: Path, name: str, text: str, message: str) -> None:
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_recorded(path, max_model_len=64)


TINY_RUN = [
    "--num-requests",
    "30",
    "--output-tokens",
    "8",
    "0.5",
    "--request-rate",
    "20",
    "40",
    "--goodput",
    "ttft:500",
]


def test_the_command_prints_a_table_a_load(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "report.json"
    monkeypatch.setattr(sys, "argv", ["simulate.py", *TINY_RUN, "--json", str(out)])
    simulate.main()
    printed = capsys.readouterr().out
    assert "computed: Llama-3-8B in bfloat16 on v6e-1" in printed
    assert printed.count("goodput, requests/s") == 2
    runs = json.loads(out.read_text())["runs"]
    assert [r["policy"] for r in runs] == 2 * list(SCHEDULING_POLICIES)
    assert all(r["rates"]["requests"] == 30 for r in runs)


def test_the_command_takes_a_trace_at_several_speeds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    trace = tmp_path / "trace.csv"
    trace.write_text(BURSTGPT)
    monkeypatch.setattr(sys, "argv", ["simulate.py", "--trace", str(trace), "--speed", "1", "8", "--cost", "cpu-demo"])
    simulate.main()
    printed = capsys.readouterr().out
    assert "\n0.5 requests/s\n" in printed
    assert "\n4 requests/s\n" in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--goodput", "itl:5"], "goodput='itl:5' must be ttft:MS or tpot:MS"),
        (["--priorities", "high:1"], "priorities='high:1' must be PRIORITY:SHARE"),
        (["--cost", "abacus"], "'abacus' is neither a file nor one of llama-3-8b-v6e"),
        (["--num-prefixes", "3"], "num_prefixes=3 and prefix_tokens=0: give both or neither"),
        (["--request-rate", "0"], "request_rate=[0.0] must be above 0"),
        (["--num-gpu-blocks-override", "9"], "9 pages of 64 tokens cannot hold one request of max_model_len=8192"),
        (["--trace", "t.csv", "--seed", "3"], "seed describe synthetic requests, and --trace gives its own"),
        (["--speed", "3"], "speed is of a trace, and there is none; set --request-rate"),
        (["--plot", "policies.txt"], "must end in .svg, .png, .pdf"),
    ],
)
def test_bad_flags_are_refused(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        simulate.parse_arguments(arguments)
    assert message in capsys.readouterr().err


def test_a_plot_without_matplotlib_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(simulate_plot, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r'needs matplotlib: pip install "jax-engine\[bench\]"'):
        simulate_plot.check_plot(Path("policies.svg"))


@pytest.mark.parametrize("rates", [(0.2,), (0.1, 0.2)])
def test_a_plot_is_drawn(tmp_path: Path, rates: tuple[float, ...]) -> None:
    pytest.importorskip("matplotlib")
    reports = [
        replace(
            reported(run(replace(LOAD, rate=rate, num_requests=20).conversations())), offered=rate, load=f"{rate}/s"
        )
        for rate in rates
    ]
    simulate_plot.draw(tmp_path / "plot.svg", reports, Objectives(ttft_ms=9e3), "a title")
    drawn = (tmp_path / "plot.svg").read_text()
    assert drawn.count('id="axes_') == 2 * len(rates)


def test_priorities_have_rows_of_their_own() -> None:
    load = replace(LOAD, priorities=((0, 0.5), (3, 0.5)))
    assert "TTFT p99 of priority 3, ms" in table([reported(run(load.conversations()))])


def test_fitted_coefficients_are_those_that_made_the_times() -> None:
    """Under a floor of 32 rows, with noise of a few percent."""
    truth = StepCost("", "", 1e-3, 32 * 5e-5, 5e-5, 2e-6, 1e-8, kv_tokens=1000)
    rng = random.Random(0)
    steps = []
    for _ in range(400):
        rows, kv_tokens = 2 ** rng.randrange(10), rng.randrange(20_000)
        pairs = kv_tokens * rng.choice((1, 300))
        exact = 1e-3 + max(rows, 32) * 5e-5 + kv_tokens * 2e-6 + pairs * 1e-8
        steps.append(TimedStep(rows, kv_tokens, pairs, exact * rng.uniform(0.97, 1.03)))
    fitted = fit(steps, "name", "source", kv_tokens=1000)
    for name in ("row_seconds", "kv_token_seconds", "pair_seconds"):
        assert getattr(fitted, name) == pytest.approx(getattr(truth, name), rel=0.03)
    # A step of few rows takes both, and no time tells them apart better than the floor's place does.
    assert fitted.step_seconds + fitted.weights_seconds == pytest.approx(2.6e-3, rel=0.03)
    assert "off by 1%" in fitted.source or "off by 2%" in fitted.source
