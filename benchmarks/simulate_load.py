"""Who asks for what and when: conversations drawn from distributions, or requests recorded elsewhere.

Prompts are lengths until a request arrives; their token ids are then made so that two prompts share exactly the
beginning that they are meant to share.
"""

import csv
import json
import math
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import count, islice
from pathlib import Path
from typing import Any

FILLER, END, FIRST_ID = 0, 1, 2  # token ids: of answers and texts, of an answer's end, and the first that names a text


@dataclass(frozen=True, slots=True)
class Turn:
    """One request: what the user adds to the conversation, and how long the answer is."""

    new_tokens: int
    output_tokens: int
    delay: float  # seconds, the first turn's after the start of the simulation, a later one's after the answer before


@dataclass(frozen=True, slots=True)
class Conversation:
    """Requests of which each prompt is the one before it, its answer, and something new. Most have one turn.

    The first `shared_tokens` tokens are those of every conversation of the same `group`.
    """

    number: int  # unlike any other's
    turns: tuple[Turn, ...]
    priority: int = 0
    group: int = 0
    shared_tokens: int = 0

    def prompt_length(self, turn: int) -> int:
        before = sum(earlier.new_tokens + earlier.output_tokens for earlier in self.turns[:turn])
        return self.shared_tokens + before + self.turns[turn].new_tokens

    def prompt(self, turn: int) -> list[int]:
        """Token ids: a text begins with its own id and goes on with filler, so equal beginnings are equal texts."""
        tokens = _text(2 * self.group, self.shared_tokens) + _text(2 * self.number + 1, self.turns[0].new_tokens)
        for earlier, later in zip(self.turns[:turn], self.turns[1 : turn + 1], strict=True):
            tokens += [FILLER] * (earlier.output_tokens - 1) + [END] + [FILLER] * later.new_tokens
        return tokens


def _text(number: int, length: int) -> list[int]:
    return [FIRST_ID + number, *[FILLER] * (length - 1)] if length else []


@dataclass(frozen=True)
class Lengths:
    """Lognormal: most are short, a few are long. `sigma` is the logarithm's deviation; 0 makes all of them `mean`."""

    mean: float
    sigma: float

    def __post_init__(self) -> None:
        if not 1 <= self.mean < math.inf or not 0 <= self.sigma < math.inf:
            raise ValueError(f"lengths of mean {self.mean:g} and sigma {self.sigma:g}; at least 1 and 0 are needed")

    def draw(self, rng: random.Random, *, most: int) -> int:
        mu = math.log(self.mean) - self.sigma**2 / 2
        return max(1, min(round(rng.lognormvariate(mu, self.sigma)), most))


@dataclass(frozen=True, kw_only=True)
class Synthetic:
    """A load drawn from distributions; equal fields give equal requests, whatever is simulated with them.

    Conversations begin with gaps drawn from a gamma distribution of shape `burstiness`: 1 is Poisson, less is bursty.
    """

    num_requests: int
    rate: float  # requests a second, over all turns; infinite: everything at once
    prompt: Lengths  # what each turn adds
    output: Lengths
    max_model_len: int  # longer requests are cut to it; a conversation ends before it
    burstiness: float = 1.0
    num_prefixes: int = 0  # system prompts, each conversation begins with one of them; 0: none
    prefix_tokens: int = 0
    mean_turns: float = 1.0  # geometric
    think_seconds: float = 10.0  # mean of the exponential time from an answer to the next turn
    priorities: tuple[tuple[int, float], ...] = ((0, 1.0),)  # priority, share of conversations
    seed: int = 0

    def __post_init__(self) -> None:
        least = {"num_requests": 1, "num_prefixes": 0, "prefix_tokens": 0, "mean_turns": 1, "think_seconds": 0}
        for name, low in least.items():
            if (value := getattr(self, name)) < low:
                raise ValueError(f"{name}={value} must be at least {low}")
        for name in ("rate", "burstiness"):
            if not (value := getattr(self, name)) > 0:
                raise ValueError(f"{name}={value} must be above 0")
        if (self.num_prefixes == 0) != (self.prefix_tokens == 0):
            raise ValueError(
                f"num_prefixes={self.num_prefixes} and prefix_tokens={self.prefix_tokens}: give both or neither"
            )
        if self.prefix_tokens > self.max_model_len - 2:
            raise ValueError(
                f"prefix_tokens={self.prefix_tokens} leaves no room in max_model_len={self.max_model_len}; lower it"
            )
        if not self.priorities or min(share for _, share in self.priorities) <= 0:
            raise ValueError(f"priorities={self.priorities} must be one or more with shares above 0")

    def conversations(self) -> list[Conversation]:
        """In order of arrival, `num_requests` turns in all."""
        rng = random.Random(self.seed)
        levels, shares = zip(*self.priorities, strict=True)
        begin_rate = self.rate / self.mean_turns
        left, now, made = self.num_requests, 0.0, []
        for number in count():
            if not math.isinf(begin_rate):
                now += rng.gammavariate(self.burstiness, 1 / (self.burstiness * begin_rate))
            turns = tuple(self._turns(rng, now))[:left]
            group = rng.randrange(self.num_prefixes) if self.num_prefixes else 0
            priority = rng.choices(levels, shares)[0]
            made.append(Conversation(number, turns, priority, group, self.prefix_tokens))
            left -= len(turns)
            if left == 0:
                break
        return made

    def _turns(self, rng: random.Random, start: float) -> Iterator[Turn]:
        length, delay = self.prefix_tokens, start
        while length + 2 <= self.max_model_len:
            new = self.prompt.draw(rng, most=self.max_model_len - length - 1)
            output = self.output.draw(rng, most=self.max_model_len - length - new)
            yield Turn(new, output, delay)
            length += new + output
            if rng.random() * self.mean_turns < 1:
                return
            delay = rng.expovariate(1 / self.think_seconds) if self.think_seconds else 0.0


# Field -> the names it goes by, compared without case, spaces and underscores: ours, BurstGPT's (Wang et al. 2024,
# arXiv 2401.17644), those of the Azure LLM inference traces (Patel et al., ISCA 2024).
RECORDED_FIELDS = {
    "timestamp": ("timestamp", "arrival_time"),
    "prompt_tokens": ("prompt_tokens", "Request tokens", "ContextTokens"),
    "output_tokens": ("output_tokens", "Response tokens", "GeneratedTokens"),
    "priority": ("priority",),
    "prefix_group": ("prefix_group",),
    "prefix_tokens": ("prefix_tokens",),
}
OPTIONAL_FIELDS = ("priority", "prefix_group", "prefix_tokens")


def read_recorded(
    path: Path, *, max_model_len: int, speed: float = 1.0, num_requests: int | None = None
) -> list[Conversation]:
    """Requests from a JSON-lines (`.jsonl`) or CSV (`.csv`) file, as conversations of one turn in order of arrival.

    Only the first `num_requests` of the file are read, if that is given. A timestamp is in seconds or a date and time;
    the first request arrives at 0, and `speed` 2 makes a second of the file half a second. Rows of one `prefix_group`
    begin alike: with the same `prefix_tokens` tokens or, where there is no such field, as far as the shorter one goes,
    as turns of one conversation do.

    Raises:
        ValueError: the file, a line or a field is not as described; the message names it.
    """
    rows = [
        _recorded_row(row, f"{path}, line {line}", max_model_len) for line, row in islice(_rows(path), num_requests)
    ]
    if not rows:
        raise ValueError(f"{path} has no requests")
    groups: dict[str, int] = {}
    begin = min(row.timestamp for row in rows)
    made = []
    for number, row in enumerate(sorted(rows, key=lambda row: row.timestamp)):
        group = groups.setdefault(row.group, len(groups)) if row.group is not None else 0
        turn = Turn(row.prompt_tokens - row.shared_tokens, row.output_tokens, (row.timestamp - begin) / speed)
        made.append(Conversation(number, (turn,), row.priority, group, row.shared_tokens))
    return made


@dataclass(frozen=True, slots=True)
class _Row:
    timestamp: float
    prompt_tokens: int
    output_tokens: int
    priority: int
    group: str | None
    shared_tokens: int


def _rows(path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """(line number, row) of a file, by its ending."""
    with path.open(newline="") as file:
        if path.suffix == ".csv":
            reader = csv.DictReader(file)
            yield from ((reader.line_num, row) for row in reader)
        elif path.suffix == ".jsonl":
            for number, line in enumerate(file, start=1):
                try:
                    row = json.loads(line)
                except json.JSONDecodeError as error:
                    raise ValueError(f"{path}, line {number} is not JSON: {error}") from None
                if not isinstance(row, dict):
                    raise ValueError(f"{path}, line {number} must be an object, and is {line.strip()[:40]!r}")
                yield number, row
        else:
            raise ValueError(f"{path} must end in .jsonl (an object a line) or .csv (a header, then a row a line)")


def _recorded_row(row: Mapping[str, Any], place: str, max_model_len: int) -> _Row:
    given = {_plain(name): (name, value) for name, value in row.items() if name and value not in (None, "")}
    found = {}
    for field, names in RECORDED_FIELDS.items():
        present = [given[_plain(name)] for name in names if _plain(name) in given]
        if present:
            found[field] = present[0]
        elif field not in OPTIONAL_FIELDS:
            raise ValueError(f"{place}: no {field}; it may be called {' or '.join(names)}")

    def whole(field: str, low: int) -> int:
        name, value = found[field]
        try:
            number = int(value)
        except (TypeError, ValueError):
            number = low - 1
        if number < low or isinstance(value, bool | float):
            raise ValueError(
                f"{place}: {name} is {value!r} and must be a whole number of at least {low}; "
                "correct the row, or leave it out if its request failed"
            )
        return number

    prompt, output = whole("prompt_tokens", 1), whole("output_tokens", 1)
    if prompt + output > max_model_len:
        raise ValueError(
            f"{place}: {prompt} prompt and {output} output tokens are more than max_model_len={max_model_len}; raise it"
        )
    group = str(found["prefix_group"][1]) if "prefix_group" in found else None
    shared = 0
    if group is not None:
        shared = whole("prefix_tokens", 0) if "prefix_tokens" in found else prompt
    elif "prefix_tokens" in found:
        raise ValueError(f"{place}: {found['prefix_tokens'][0]} without prefix_group; say with whom they are shared")
    priority = whole("priority", -(2**31)) if "priority" in found else 0
    timestamp = _seconds(*found["timestamp"], place)
    return _Row(timestamp, prompt, output, priority, group, min(shared, prompt))


def _plain(name: str) -> str:
    return name.lower().replace("_", "").replace(" ", "")


def _seconds(name: str, value: Any, place: str) -> float:
    """A number of seconds, or a date and time, which without a zone is UTC."""
    try:
        seconds = float(value)
    except (TypeError, ValueError):
        try:
            moment = datetime.fromisoformat(str(value))
            seconds = (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()
        except ValueError:
            seconds = math.nan
    if isinstance(value, bool) or not math.isfinite(seconds):
        raise ValueError(f"{place}: {name} is {value!r} and must be seconds, or a date and time")
    return seconds
