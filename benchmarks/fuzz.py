"""Send a server requests made from its own OpenAPI document, right and wrong ones, and look for answers that break it.

    jax-engine serve --port 8000 --max-request-body-bytes 1M
    python benchmarks/fuzz.py --url http://localhost:8000 --cases 5000

An answer breaks it when its status is 500 or above, or its status, content type or body is not what the document says.
Answers are kept to a few tokens, so that a case takes milliseconds. Exit code 1 when anything was found.
"""

import argparse
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from math import ceil
from random import Random
from typing import Any

import httpx
import schemathesis
from hypothesis import HealthCheck, Phase, given, seed, settings, strategies
from schemathesis.checks import CHECKS
from schemathesis.core.failures import Failure, FailureGroup
from schemathesis.generation import GenerationMode

MOST_TOKENS = 4
NEEDED = frozenset({"prompt", "messages", "input", "tokens", "max_tokens"})  # that routes cannot do without
LENGTHS = ("max_tokens", "max_completion_tokens", "max_output_tokens")
WIDTHS = ("n", "best_of")
NAMES = ("not_a_server_error", "status_code_conformance", "content_type_conformance", "response_schema_conformance")
NO_ANSWER = frozenset(
    {"/tokenize", "/detokenize", "/v1/messages/count_tokens", "/v1/embeddings", "/pooling"}
)  # nothing is generated there
# Not asked: what ends the server's readiness for everybody.
LEFT_OUT = frozenset({"/sleep", "/wake_up", "/abort_requests", "/start_profile", "/stop_profile"})


def simpler(body: Any, chance: Random) -> Any:
    """Half of the time, `body` with few of the fields that can be left out, and for a model that is there: with all of
    them hardly a request is right.
    """
    if not isinstance(body, dict) or chance.random() < 0.5:
        return body
    others = [name for name in body if name not in NEEDED]
    kept = {*NEEDED, *chance.sample(others, min(len(others), chance.randrange(4)))} - {"model"}
    return {name: value for name, value in body.items() if name in kept}


def kept_short(body: Any, path: str) -> Any:
    """A body whose answer has few tokens, if it gets one; what is wrong with it stays."""
    if not isinstance(body, dict) or path in NO_ANSWER:
        return body
    short = dict(body)
    for name in LENGTHS:
        if isinstance(short.get(name), int) and short[name] > MOST_TOKENS:
            short[name] = MOST_TOKENS
    for name in WIDTHS:
        if isinstance(short.get(name), int) and 2 < short[name] <= 20:
            short[name] = 2
    with_messages = "messages" in short or "prompt" in short
    if with_messages and not any(name in short for name in LENGTHS):
        short["max_tokens"] = MOST_TOKENS
    elif "input" in short and "max_output_tokens" not in short:
        short["max_output_tokens"] = MOST_TOKENS
    if isinstance(short.get("min_tokens"), int) and short["min_tokens"] > MOST_TOKENS:
        short["min_tokens"] = MOST_TOKENS
    return short


def fuzz(url: str, cases: int, *, start: int = 0) -> Iterator[tuple[str, str]]:
    """Send about `cases` requests, as many to each route that takes a body, and a tenth of that to each other; fewer
    where there are not as many different ones.

    Yields (route and status, what was wrong) for each answer; what was wrong is empty where nothing was.
    """
    schema = schemathesis.openapi.from_dict(httpx.get(f"{url}/openapi.json").raise_for_status().json())
    schema.config.update(base_url=url)
    results: Iterable[Any] = schema.get_all_operations()  # one that the document describes wrongly has no `ok`
    operations = [operation for operation in (result.ok() for result in results) if operation.path not in LEFT_OUT]
    weights = [10 if operation.body else 1 for operation in operations]
    checks = [CHECKS.get_one(name) for name in NAMES]
    for number, (operation, weight) in enumerate(zip(operations, weights, strict=True)):
        yield from send_all(operation, max(2, ceil(cases * weight / sum(weights))), checks, start=start + number)


def send_all(operation: Any, count: int, checks: list[Any], *, start: int) -> list[tuple[str, str]]:
    """(route and status, what was wrong) of `count` requests to one route."""
    found: list[tuple[str, str]] = []

    @seed(start)
    @settings(
        max_examples=count,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=_cases(operation), chance=strategies.randoms(use_true_random=False))
    def send(case: Any, chance: Random) -> None:
        case.body = kept_short(simpler(case.body, chance), case.operation.path)
        response = case.call(timeout=120)
        name = f"{case.method} {case.operation.path} {response.status_code}"
        try:
            case.validate_response(response, checks=checks)
        except (Failure, FailureGroup) as error:
            problems = getattr(error, "exceptions", [error])
            told = "; ".join(f"{type(problem).__name__}: {problem}" for problem in problems)
            found.append((name, f"{told}\n{case.as_curl_command()[:2000]}\n{response.text[:1000]}"))
        else:
            found.append((name, ""))

    send()
    return found


def _cases(operation: Any) -> Any:
    """Cases of an operation, right and wrong ones."""
    right = operation.as_strategy(generation_mode=GenerationMode.POSITIVE)
    try:
        return right | operation.as_strategy(generation_mode=GenerationMode.NEGATIVE)
    except Exception:  # there is nothing in it that could be wrong
        return right


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://localhost:8000")
    parser.add_argument("--cases", type=int, default=5000)
    parser.add_argument("--start", type=int, default=0, help="another number makes other cases")
    options = parser.parse_args()
    began = time.monotonic()
    answers: Counter[str] = Counter()
    problems: dict[str, str] = {}
    for name, problem in fuzz(options.url, options.cases, start=options.start):
        answers[name] += 1
        if problem:
            problems.setdefault(f"{name}: {problem.splitlines()[0]}", problem)
    for name, count in sorted(answers.items()):
        print(f"{count:6} {name}")
    for problem in problems.values():
        print(f"\n{problem}")
    print(f"{answers.total()} cases in {time.monotonic() - began:.0f} s: {len(problems)} kinds of wrong answers")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
