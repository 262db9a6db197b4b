"""Conversation tasks: facts, small talk, what was said before, JSON on request, and short stories."""

import json
from collections.abc import Callable
from random import Random

from jax_engine.models.demo.conversations import (
    ACKNOWLEDGED,
    CAPITAL_WORDINGS,
    FACT_OPENINGS,
    MEMORIES,
    NEVER_TOLD,
    SMALL_TALK,
    UNKNOWN_ANSWER,
    UNKNOWN_REQUESTS,
    UNKNOWN_SUBJECTS,
)
from jax_engine.models.demo.lexicon import CAPITALS, CITIES, COLORS, FACTS, ITEMS, NAMES, PET_NAMES, PETS
from jax_engine.models.demo.samples import ExactAnswer, JsonAnswer, Message, Sample, StoryAnswer
from jax_engine.models.demo.tasks_numbers import ask, exact, turns


def facts(rng: Random) -> Sample:
    """A fact that was never seen cannot be known, so it is the fact with its wording that may be held out."""
    opening = rng.choice(FACT_OPENINGS)
    if rng.random() < 0.4:
        country, city = rng.choice(CAPITALS)
        question = rng.choice(CAPITAL_WORDINGS).format(country=country)
        answer = f"The capital of {country} is {city}."
    else:
        wordings, answer = rng.choice(FACTS)
        question = rng.choice(wordings)
    return exact("facts", opening + question, ask(rng, ("{text}",), text=opening + question), answer)


def small_talk(rng: Random) -> Sample:
    """Each pair of halves is one instance: held-out ones put known halves together in a way that was never seen."""
    if rng.random() < 0.25:
        request = rng.choice(UNKNOWN_REQUESTS).format(subject=rng.choice(UNKNOWN_SUBJECTS))
        end = "?" if request.split()[0] in ("What", "Who", "Why", "How", "Is") else "."
        return exact("small talk", request, ask(rng, ("{text}",), text=request + end), UNKNOWN_ANSWER)
    beginnings, ends, answer = rng.choice(SMALL_TALK)
    text = rng.choice(beginnings) + rng.choice(ends)
    return exact("small talk", text, ask(rng, ("{text}",), text=text), answer)


def memory(rng: Random) -> Sample:
    """One to four things are said, in one turn or several; one of them (or one never said) is asked for."""
    topics = rng.sample(tuple(MEMORIES), rng.randint(1, 4))
    values = [rng.choice(MEMORIES[topic].values) for topic in topics]
    told = [rng.choice(MEMORIES[topic].told).format(x=value) for topic, value in zip(topics, values, strict=True)]
    asked = rng.randrange(len(topics))
    topic, answer = topics[asked], MEMORIES[topics[asked]].answer.format(x=values[asked])
    if rng.random() < 0.12:
        topic, answer = rng.choice([other for other in MEMORIES if other not in topics]), NEVER_TOLD
    question = rng.choice(MEMORIES[topic].asked)
    instance = f"{topic}: " + ", ".join(f"{name}={value}" for name, value in zip(topics, values, strict=True))
    place = rng.random()
    if place < 0.25:
        messages = turns(" ".join([*told, question]), answer)
    elif place < 0.4:
        system = {"role": "system", "content": "The user says: " + " ".join(told)}
        messages = (system, *turns(question, answer))
    else:
        messages = (*_told_in_turns(rng, told), *turns(question, answer))
    return Sample("memory", instance, messages, ExactAnswer(answer))


def _told_in_turns(rng: Random, told: list[str]) -> tuple[Message, ...]:
    """The things said, a turn each or all at once, at times with an unrelated exchange among them."""
    parts = told if rng.random() < 0.6 else [" ".join(told)]
    exchanges = [turns(part, ACKNOWLEDGED) for part in parts]
    if rng.random() < 0.4:
        exchanges.insert(rng.randint(0, len(exchanges)), _unrelated(rng).messages)
    return tuple(message for exchange in exchanges for message in exchange)


def _unrelated(rng: Random) -> Sample:
    """Something else to talk about, never one of the problems that are held out."""
    while True:
        sample = small_talk(rng) if rng.random() < 0.5 else facts(rng)
        if not sample.held_out:
            return sample


def _person(rng: Random) -> tuple[str, dict[str, str | int]]:
    name, age, city = rng.choice(NAMES), rng.randint(1, 99), rng.choice(CITIES)
    forms: tuple[tuple[str, dict[str, str | int]], ...] = (
        (f"{name} is {age} years old.", {"name": name, "age": age}),
        (f"{name} lives in {city}.", {"name": name, "city": city}),
        (f"{name} is {age} years old and lives in {city}.", {"name": name, "age": age, "city": city}),
        (f"{name} from {city} is {age}.", {"name": name, "age": age, "city": city}),
    )
    return rng.choice(forms)


def _order(rng: Random) -> tuple[str, dict[str, str | int]]:
    item, count, color = rng.choice(ITEMS), rng.randint(2, 99), rng.choice(COLORS)
    forms: tuple[tuple[str, dict[str, str | int]], ...] = (
        (f"I want {count} {item}.", {"item": item, "count": count}),
        (f"I want {count} {color} {item}.", {"item": item, "count": count, "color": color}),
        (f"Please send {count} {item} in {color}.", {"item": item, "count": count, "color": color}),
    )
    return rng.choice(forms)


def _pet(rng: Random) -> tuple[str, dict[str, str | int]]:
    owner, pet, name = rng.choice(NAMES), rng.choice(PETS), rng.choice(PET_NAMES)
    return f"{owner} has a {pet} called {name}.", {"name": name, "animal": pet, "owner": owner}


JSON_SOURCES: tuple[Callable[[Random], tuple[str, dict[str, str | int]]], ...] = (_person, _person, _order, _pet)
JSON_WORDINGS = (
    "Write this as JSON with the keys {keys}: {text}", "{text} Answer as JSON with the keys {keys}.",
    "Give me {keys} as JSON: {text}", "Extract {keys} as JSON from this text: {text}",
    "Turn this into a JSON object with {keys}: {text}",
)  # fmt: skip
JSON_SYSTEMS = (
    "Answer only with JSON. Use the keys {keys}.",
    "You answer in JSON with the keys {keys}.",
    "Reply with a JSON object: {keys}.",
)


def as_json(rng: Random) -> Sample:
    """A sentence turned into a JSON object; the keys are asked for by the user or by the system message."""
    text, fields = rng.choice(JSON_SOURCES)(rng)
    names = rng.sample(sorted(fields), rng.randint(1, len(fields)))
    keys, answer = ", ".join(names), json.dumps({name: fields[name] for name in names})
    if rng.random() < 0.3:
        system = {"role": "system", "content": rng.choice(JSON_SYSTEMS).format(keys=keys)}
        messages = (system, *turns(text, answer))
    else:
        messages = turns(rng.choice(JSON_WORDINGS).format(keys=keys, text=text), answer)
    return Sample("JSON", f"{text} {keys}", messages, JsonAnswer(answer))


HEROES = tuple("fox bear cat dog mouse rabbit wren frog horse wolf lion duck turtle bird goat hen".split())
PLACES = (
    "a quiet forest",
    "a small village",
    "an old castle",
    "a green valley",
    "a house by the sea",
    "a garden",
    "a deep cave",
    "a big city",
)
FINDS = (
    "a golden key",
    "a red ball",
    "an old map",
    "a silver bell",
    "a shiny stone",
    "a tiny boat",
    "a blue feather",
    "a warm coat",
)
HELPERS = tuple("fox bear cat dog mouse frog turtle hen goat duck".split())
FEELINGS = ("happy", "proud", "glad", "cheerful")
STORY_WORDINGS = (
    "Tell me a short story about a {hero} named {name}.", "Write a story about {name} the {hero}.",
    "Can you tell a story about a {hero} called {name}?", "Please write a short story about {name}, a {hero}.",
    "Tell me a tale of {name} the {hero}.",
)  # fmt: skip
PLAIN_STORY_WORDINGS = (
    "Tell me a short story.",
    "Tell me a story.",
    "Write a short story.",
    "Can you tell me a story?",
    "I want to hear a story.",
)


def stories(rng: Random) -> Sample:
    hero, name = rng.choice(HEROES), rng.choice(NAMES)
    text = tell_story(rng, hero, name)
    if rng.random() < 0.15:
        wording = rng.choice(PLAIN_STORY_WORDINGS)
        return Sample("stories", wording, turns(ask(rng, (wording,)), text), StoryAnswer(()))
    question = ask(rng, STORY_WORDINGS, hero=hero, name=name)
    return Sample("stories", f"{hero} {name}", turns(question, text), StoryAnswer((hero, name)))


def tell_story(rng: Random, hero: str, name: str) -> str:
    """Five sentences: who and where, the wish, what was found or who helped, and the end."""
    place, find, feeling = rng.choice(PLACES), rng.choice(FINDS), rng.choice(FEELINGS)
    helper = rng.choice([animal for animal in HELPERS if animal != hero])
    opening = rng.choice(
        (
            f"Once upon a time there was a {hero} named {name} who lived in {place}.",
            f"In {place} there lived a {hero} called {name}.",
        )
    )
    search = rng.choice((f"One day {name} lost {find}.", f"{name} had always wished for {find}."))
    meeting = rng.choice(
        (f"{name} looked for it all day and met a kind {helper}.", f"Then a {helper} came along and wanted to help.")
    )
    finding = rng.choice((f"Together they found {find} under a tree.", f"The {helper} knew where {find} was."))
    ending = rng.choice(
        (
            f"{name} was very {feeling} and they became friends.",
            f"In the evening {name} went home, tired but {feeling}.",
        )
    )
    return " ".join((opening, search, meeting, finding, ending))
