"""The demo model's training text: repeatable, apart from what it is judged on, and judged rightly."""

from functools import cache
from itertools import islice

import pytest

from jax_engine.models.demo.chat_template import answer_text
from jax_engine.models.demo.generator import TASKS, Task, held_out_samples, task_named, training_samples
from jax_engine.models.demo.samples import (
    PLAIN_TEXT,
    ExactAnswer,
    JsonAnswer,
    Sample,
    StoryAnswer,
    ToolCallAnswer,
    final_answer,
)

ALL_TASKS = [pytest.param(task, id=task.name) for task in TASKS]


def prompt_text(sample: Sample) -> str:
    """The conversation up to the answer, without what the generator puts around a problem."""
    return repr(sample.messages[sample.num_history : -1])


@cache
def training_chats() -> list[Sample]:
    chats = (sample for sample in training_samples(seed=0) if sample.messages[0]["role"] != PLAIN_TEXT)
    return list(islice(chats, 4000))


def test_equal_seeds_give_equal_training_text():
    first, second, other = (list(islice(training_samples(seed=seed), 200)) for seed in (3, 3, 4))
    assert first == second
    assert first != other


@pytest.mark.parametrize("task", ALL_TASKS)
def test_equal_seeds_give_equal_held_out_samples(task: Task):
    assert held_out_samples(task, seed=0, count=5) == held_out_samples(task, seed=0, count=5)


def test_training_never_draws_a_held_out_problem():
    assert not any(sample.held_out for sample in training_chats())


@pytest.mark.parametrize("task", ALL_TASKS)
def test_held_out_prompts_never_occur_in_training(task: Task):
    trained = {prompt_text(sample) for sample in training_chats() if sample.task == task.name}
    held_out = {prompt_text(sample) for sample in held_out_samples(task, seed=0, count=40)}
    assert trained
    assert not trained & held_out


@pytest.mark.parametrize("task", ALL_TASKS)
def test_judges_accept_the_reference_answer_and_reject_another(task: Task):
    for sample in held_out_samples(task, seed=1, count=20):
        reference = answer_text(sample.messages[-1])
        assert sample.check(reference)
        assert not sample.check(reference + final_answer(reference))
        assert not sample.check("")


def test_a_problem_stays_held_out_in_every_wording():
    additions = training_chats() + held_out_samples(task_named("addition"), seed=0, count=50)
    sides: dict[str, set[bool]] = {}
    for sample in additions:
        sides.setdefault(f"{sample.task} {sample.instance}", set()).add(sample.held_out)
    assert all(len(side) == 1 for side in sides.values())


def test_about_a_tenth_of_all_problems_is_held_out():
    rng_free = [Sample("addition", f"{a}+{b}", (), ExactAnswer("")) for a in range(100) for b in range(100)]
    assert 0.08 < sum(sample.held_out for sample in rng_free) / len(rng_free) < 0.12


def test_the_final_answer_is_what_follows_the_reasoning():
    assert final_answer("<think>\n7+5+0=12\n</think>\n\n7 + 5 = 12") == "7 + 5 = 12"
    assert final_answer(" Hello! ") == "Hello!"


def test_json_is_judged_by_value():
    check = JsonAnswer('{"name": "Anna", "age": 31}')
    assert check('{"age":31,"name":"Anna"}')
    assert not check('{"name": "Anna", "age": "31"}')
    assert not check('{"name": "Anna", "age": 31')


def test_tool_calls_are_judged_by_name_and_arguments():
    check = ToolCallAnswer('{"name": "get_time", "arguments": {"city": "Oslo"}}')
    call = '<tool_call>\n{"name": "get_time", "arguments": {"city": "Oslo"}}\n</tool_call>'
    assert check(call)
    assert not check(call + call)
    assert not check(call.replace("Oslo", "Rome"))
    assert not check('{"name": "get_time", "arguments": {"city": "Oslo"}}')


def test_a_story_must_be_whole_and_mention_what_was_asked():
    check = StoryAnswer(("fox", "Ida"))
    story = "In a cave there lived a fox called Ida. One day Ida lost a key. Ida went home."
    assert check(story)
    assert not check(story.replace("fox", "cat"))
    assert not check(story + " And then Ida")
    assert not check("A fox met Ida. A fox met Ida. A fox met Ida.")


def test_an_unknown_task_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="task 'cooking' does not exist; choose one of: addition"):
        task_named("cooking")
