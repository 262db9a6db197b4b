"""The seeded generator of everything that the demo model is trained and judged on."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from random import Random

from jax_engine.models.demo import tasks_chat, tasks_numbers, tasks_tools, tasks_words
from jax_engine.models.demo.lexicon import NAMES
from jax_engine.models.demo.samples import PLAIN_TEXT, Message, Sample, StoryAnswer, final_answer
from jax_engine.models.demo.tasks_chat import HEROES


@dataclass(frozen=True)
class Task:
    """One kind of sample; `weight` is its share of the training samples, relative to the others'."""

    name: str
    weight: float
    draw: Callable[[Random], Sample]


TASKS = (
    Task("addition", 3.0, tasks_numbers.addition),
    Task("subtraction", 3.0, tasks_numbers.subtraction),
    Task("multiplication", 2.5, tasks_numbers.multiplication),
    Task("comparison", 1.5, tasks_numbers.comparison),
    Task("sorting", 2.0, tasks_numbers.sorting),
    Task("parity", 0.5, tasks_numbers.parity),
    Task("neighbours", 0.7, tasks_numbers.neighbours),
    Task("reversing", 2.5, tasks_words.reversing),
    Task("spelling", 1.0, tasks_words.spelling),
    Task("counting letters", 1.5, tasks_words.counting_letters),
    Task("counting one letter", 2.0, tasks_words.counting_one_letter),
    Task("upper-casing", 1.2, tasks_words.upper_casing),
    Task("counting words", 1.0, tasks_words.counting_words),
    Task("word lists", 1.5, tasks_words.word_lists),
    Task("days and months", 1.5, tasks_words.dates),
    Task("month lengths", 0.3, tasks_words.month_lengths),
    Task("opposites", 1.2, tasks_words.opposites),
    Task("facts", 2.0, tasks_chat.facts),
    Task("small talk", 1.2, tasks_chat.small_talk),
    Task("memory", 2.0, tasks_chat.memory),
    Task("JSON", 1.8, tasks_chat.as_json),
    Task("stories", 0.7, tasks_chat.stories),
    Task("tool calls", 1.2, tasks_tools.tool_calls),
    Task("tool results", 0.9, tasks_tools.tool_results),
)

SYSTEM_PROMPTS = (
    "You are a helpful assistant.", "You are a friendly assistant.", "Answer briefly.",
    "You are a helpful AI assistant. Be brief.", "You are the demo model of jax-engine.",
    "Be polite and answer the question.",
)  # fmt: skip

EARLIER_EXCHANGES = 0.12
"""Share of chats that come after one or two unrelated exchanges, as in a longer chat."""

SYSTEM_MESSAGES = 0.15
"""Share of chats that begin with one of `SYSTEM_PROMPTS`."""

PLAIN_TEXTS = 0.03
"""Share of training samples that are no chat but plain text, for completions."""


def task_named(name: str) -> Task:
    """The task called `name`; ValueError with the names that exist otherwise."""
    for task in TASKS:
        if task.name == name:
            return task
    raise ValueError(f"task {name!r} does not exist; choose one of: {', '.join(task.name for task in TASKS)}")


def held_out_samples(task: Task, *, seed: int, count: int) -> list[Sample]:
    """`count` samples of problems that `training_samples` never draws. Deterministic."""
    rng = Random(f"held out {seed} {task.name}")
    samples: list[Sample] = []
    while len(samples) < count:
        sample = task.draw(rng)
        if sample.held_out:
            samples.append(sample)
    return samples


def boosted(factors: Mapping[str, float]) -> tuple[Task, ...]:
    """All tasks, with the weights of those named in `factors` multiplied."""
    for name in factors:
        task_named(name)
    return tuple(replace(task, weight=task.weight * factors.get(task.name, 1.0)) for task in TASKS)


def training_samples(*, seed: int, tasks: Sequence[Task] = TASKS) -> Iterator[Sample]:
    """An endless stream of training samples of all `tasks`; equal arguments give equal streams."""
    rng = Random(f"train {seed}")
    weights = [task.weight for task in tasks]
    while True:
        if rng.random() < PLAIN_TEXTS:
            yield plain_text(rng)
            continue
        sample = _draw_trainable(rng, rng.choices(tasks, weights)[0])
        if rng.random() < EARLIER_EXCHANGES and _is_plain(sample):
            earlier = [_draw_trainable(rng, rng.choice(tasks)) for _ in range(rng.randint(1, 2))]
            history = tuple(message for other in earlier if _is_plain(other) for message in _as_history(other))
            sample = replace(sample, messages=history + sample.messages, num_history=len(history))
        if rng.random() < SYSTEM_MESSAGES and sample.messages[0]["role"] == "user":
            system = {"role": "system", "content": rng.choice(SYSTEM_PROMPTS)}
            sample = replace(sample, messages=(system, *sample.messages), num_history=sample.num_history + 1)
        yield sample


def plain_text(rng: Random) -> Sample:
    """A story or a fact as a text of its own."""
    if rng.random() < 0.7:
        text = tasks_chat.tell_story(rng, rng.choice(HEROES), rng.choice(NAMES))
    else:
        text = final_answer(_draw_trainable(rng, task_named("facts")).messages[-1]["content"])
    return Sample("plain text", text, ({"role": PLAIN_TEXT, "content": text},), StoryAnswer(()))


def _draw_trainable(rng: Random, task: Task) -> Sample:
    while True:
        sample = task.draw(rng)
        if not sample.held_out:
            return sample


def _is_plain(sample: Sample) -> bool:
    return not sample.tools and sample.messages[0]["role"] == "user"


def _as_history(sample: Sample) -> tuple[Message, ...]:
    """Earlier answers as clients send them back: without the reasoning part."""
    *before, last = sample.messages
    return (*before, {**last, "content": final_answer(last["content"])})
