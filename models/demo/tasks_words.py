"""Word tasks. The reasoning part spells a word with a number before each letter, then looks letters up by number."""

from collections.abc import Mapping
from random import Random

from jax_engine.models.demo.lexicon import DAYS, MONTH_LENGTHS, MONTHS, OPPOSITES, SYLLABLES, WORDS
from jax_engine.models.demo.samples import Sample
from jax_engine.models.demo.tasks_numbers import ask, exact

MAX_LETTERS = 9
"""Numbers before letters stay single digits."""


def draw_word(rng: Random) -> str:
    """A real word, or a made-up one, of three to nine letters."""
    while True:
        word = rng.choice(WORDS) if rng.random() < 0.6 else "".join(rng.choices(SYLLABLES, k=rng.randint(2, 4)))
        if 3 <= len(word) <= MAX_LETTERS:
            return word


def spelled(word: str) -> str:
    """`garden` -> `1g2a3r4d5e6n`."""
    return "".join(f"{place}{letter}" for place, letter in enumerate(word, start=1))


REVERSE_WORDINGS = (
    'Reverse the word "{word}".', 'Reverse "{word}".', "Reverse the word {word}.", "Reverse {word}",
    'Spell "{word}" backwards.', 'Write "{word}" backwards.', 'What is "{word}" spelled backwards?',
    "What is {word} backwards?", "Please reverse the word {word}.", 'Can you reverse the letters of "{word}"?',
)  # fmt: skip


def reversing(rng: Random) -> Sample:
    word = draw_word(rng)
    backwards = [f"{place}{word[place - 1]}" for place in range(len(word), 0, -1)]
    trace = f"{spelled(word)}\n{''.join(backwards)}"
    return exact("reversing", word, ask(rng, REVERSE_WORDINGS, word=word), word[::-1], trace=trace)


SPELL_WORDINGS = (
    'Spell "{word}".', "Spell the word {word}.", "How do you spell {word}?", 'How is "{word}" spelled?',
    "Spell {word} for me.", 'Please spell the word "{word}".', "Spell {word} letter by letter.",
)  # fmt: skip


def spelling(rng: Random) -> Sample:
    word = draw_word(rng)
    return exact("spelling", word, ask(rng, SPELL_WORDINGS, word=word), " ".join(word))


LENGTH_WORDINGS = (
    'How many letters are in "{word}"?', "How many letters are in the word {word}?",
    'How many letters does "{word}" have?', "How many letters does the word {word} have?",
    'Count the letters in "{word}".', "Count the letters of {word}.", 'How long is the word "{word}"?',
)  # fmt: skip


def counting_letters(rng: Random) -> Sample:
    word = draw_word(rng)
    answer = f'"{word}" has {len(word)} letters.'
    return exact("counting letters", word, ask(rng, LENGTH_WORDINGS, word=word), answer, trace=spelled(word))


OCCURRENCE_WORDINGS = (
    'How many times does "{letter}" appear in "{word}"?', "How many {letter}'s are in {word}?",
    'How many {letter} are in "{word}"?', "How many times does the letter {letter} occur in {word}?",
    "Count the letter {letter} in the word {word}.", 'How often does {letter} occur in "{word}"?',
    'How many "{letter}" are there in {word}?', "How many {letter}s are in {word}?",
)  # fmt: skip


def counting_one_letter(rng: Random) -> Sample:
    word = "strawberry" if rng.random() < 0.02 else draw_word(rng)
    letter = rng.choice(word) if rng.random() < 0.8 else rng.choice("abcdefghijklmnopqrstuvwxyz")
    seen = [word[: place + 1].count(letter) for place in range(len(word))]
    trace = f"{letter}: " + "".join(f"{character}{count}" for character, count in zip(word, seen, strict=True))
    question = ask(rng, OCCURRENCE_WORDINGS, letter=letter, word=word)
    return exact("counting one letter", f"{letter} {word}", question, str(seen[-1]), trace=trace)


UPPER_WORDINGS = (
    'Write "{word}" in upper case.', "Write the word {word} in capital letters.", 'Upper-case "{word}".',
    "Make {word} upper case.", "Put {word} in capitals.", 'Convert "{word}" to upper case.',
    "What is {word} in capital letters?", "Turn {word} into upper case.",
)  # fmt: skip


def upper_casing(rng: Random) -> Sample:
    word = draw_word(rng)
    return exact("upper-casing", word, ask(rng, UPPER_WORDINGS, word=word), word.upper())


WORD_COUNT_WORDINGS = (
    'How many words are in "{text}"?', "How many words are in this text: {text}", "Count the words: {text}",
    'Count the words in "{text}".', "How many words does this have: {text}", "Count these words: {text}",
)  # fmt: skip


def counting_words(rng: Random) -> Sample:
    words = rng.choices(WORDS, k=rng.randint(2, 8))
    trace = "".join(f"{place} {word}" for place, word in enumerate(words, start=1))
    text = " ".join(words)
    answer = f"There are {len(words)} words."
    return exact("counting words", text, ask(rng, WORD_COUNT_WORDINGS, text=text), answer, trace=trace)


LIST_WORDINGS: Mapping[str, tuple[str, ...]] = {
    "first": (
        "What is the first word of: {text}",
        "Give me the first word in this list: {text}",
        "Which word comes first: {text}",
    ),
    "last": (
        "What is the last word of: {text}",
        "Give me the last word in this list: {text}",
        "Which word comes last: {text}",
    ),
    "backwards": (
        "Reverse the order of these words: {text}",
        "Say these words in reverse order: {text}",
        "List these words backwards: {text}",
    ),
    "same": ("Repeat after me: {text}", "Say this again: {text}", "Repeat these words: {text}"),
}


def word_lists(rng: Random) -> Sample:
    """The first or the last word of a list, the list backwards, or the list once more."""
    words = [f" {word}" for word in rng.sample(WORDS, rng.randint(2, 5))]
    kind = rng.choice(tuple(LIST_WORDINGS))
    chosen = {"first": words[:1], "last": words[-1:], "backwards": words[::-1], "same": words}[kind]
    text = ",".join(words).strip()
    answer = f"The {kind} word is{chosen[0]}." if kind in ("first", "last") else ",".join(chosen).strip()
    return exact("word lists", f"{kind} {text}", ask(rng, LIST_WORDINGS[kind], text=text), answer)


DATE_WORDINGS: Mapping[str, tuple[str, ...]] = {
    "after": (
        "What {unit} is {n} {units} after {start}?",
        "Which {unit} comes {n} {units} after {start}?",
        "What {unit} is it {n} {units} after {start}?",
        "If it is {start} now, what {unit} is it in {n} {units}?",
    ),
    "before": (
        "What {unit} is {n} {units} before {start}?",
        "Which {unit} comes {n} {units} before {start}?",
        "What {unit} was it {n} {units} before {start}?",
        "If it is {start} now, what {unit} was it {n} {units} ago?",
    ),
}

NEXT_DATE_WORDINGS: Mapping[str, tuple[str, ...]] = {
    "after": ("What {unit} comes after {start}?", "Which {unit} follows {start}?", "What {unit} is after {start}?"),
    "before": (
        "What {unit} comes before {start}?",
        "Which {unit} is right before {start}?",
        "What {unit} is before {start}?",
    ),
}


def dates(rng: Random) -> Sample:
    """Days of the week and months, counted forwards or backwards one by one."""
    unit, names = rng.choice((("day", DAYS), ("month", MONTHS)))
    n, direction = rng.randint(1, 9), rng.choice(("after", "before"))
    place, step = rng.randrange(len(names)), 1 if direction == "after" else -1
    walk = [names[(place + step * count) % len(names)] for count in range(n + 1)]
    one_step = n == 1 and rng.random() < 0.7
    wordings = NEXT_DATE_WORDINGS[direction] if one_step else DATE_WORDINGS[direction]
    units = unit if n == 1 else f"{unit}s"
    question = ask(rng, wordings, unit=unit, units=units, n=n, start=names[place])
    trace = f"{n} {direction}\n" + "".join(f"{count} {name}" for count, name in enumerate(walk))
    return exact("days and months", f"{n} {direction} {names[place]}", question, f"{walk[-1]}.", trace=trace)


MONTH_LENGTH_WORDINGS = (
    "How many days does {month} have?", "How many days are in {month}?", "How many days are there in {month}?",
    "How long is {month}?", "How many days has {month}?", "Tell me how many days {month} has.",
    "How many days does the month of {month} have?",
)  # fmt: skip


def month_lengths(rng: Random) -> Sample:
    place, wording = rng.randrange(12), rng.choice(MONTH_LENGTH_WORDINGS)
    month = MONTHS[place]
    answer = f"{month} has {MONTH_LENGTHS[place]} days."
    return exact("month lengths", f"{month} | {wording}", ask(rng, (wording,), month=month), answer)


OPPOSITE_WORDINGS = (
    "What is the opposite of {word}?", 'What is the opposite of "{word}"?', "Give me the opposite of {word}.",
    "Opposite of {word}?", "Which word is the opposite of {word}?", "Tell me the opposite of {word}.",
    'Which word means the opposite of "{word}"?', "Name the opposite of {word}.", "What word is opposite to {word}?",
)  # fmt: skip


def opposites(rng: Random) -> Sample:
    """A pair that was never seen cannot be worked out, so it is the pair with its wording that may be held out."""
    word, opposite = rng.choice(OPPOSITES)
    wording = rng.choice(OPPOSITE_WORDINGS)
    answer = f"The opposite of {word} is {opposite}."
    return exact("opposites", f"{word} | {wording}", ask(rng, (wording,), word=word), answer)
