"""Number tasks. Each reasoning part goes digit by digit, so that a very small model can follow every step of it."""

from collections.abc import Mapping, Sequence
from random import Random

from jax_engine.models.demo.samples import ExactAnswer, Message, Sample, thought


def ask(rng: Random, wordings: Sequence[str], **values: object) -> str:
    """One of `wordings` filled in; at times as people type it, in lower case or without the end mark."""
    text = rng.choice(wordings).format(**values)
    if rng.random() < 0.15:
        text = text[0].lower() + text[1:]
    if rng.random() < 0.15:
        text = text.rstrip("?.")
    return text


def turns(question: str, answer: str) -> tuple[Message, ...]:
    return ({"role": "user", "content": question}, {"role": "assistant", "content": answer})


def exact(task: str, instance: str, question: str, answer: str, *, trace: str = "") -> Sample:
    """A single question whose answer must match to the letter."""
    reply = thought(trace, answer) if trace else answer
    return Sample(task, instance, turns(question, reply), ExactAnswer(answer))


def number_below(rng: Random, largest: int) -> int:
    """A number of one to as many digits as `largest` has; each length is as likely as the next."""
    limit = 10 ** rng.randint(1, len(str(largest)))
    return rng.randrange(min(limit, largest + 1))


SUM_WORDINGS = (
    "What is {a} + {b}?", "What is {a} plus {b}?", "{a} + {b} =", "{a} + {b}", "{a}+{b}", "{a}+{b}=?",
    "Add {a} and {b}.", "What is the sum of {a} and {b}?", "How much is {a} plus {b}?", "Calculate {a} + {b}.",
    "Please add {a} to {b}.", "What do you get if you add {a} and {b}?", "Can you tell me what {a} + {b} is?",
    "Compute {a} + {b}.", "I have {a} apples and get {b} more. What is {a} + {b}?", "Hi! What is {a} + {b}?",
)  # fmt: skip


def addition(rng: Random) -> Sample:
    a, b = number_below(rng, 999), number_below(rng, 999)
    question = ask(rng, SUM_WORDINGS, a=a, b=b)
    return exact("addition", f"{a}+{b}", question, f"{a} + {b} = {a + b}", trace=addition_trace(a, b))


def addition_trace(a: int, b: int) -> str:
    """Columns from the right: digit + digit + carry = sum."""
    lines, carry = [], 0
    for column in range(max(len(str(a)), len(str(b)))):
        x, y = a // 10**column % 10, b // 10**column % 10
        lines.append(f"{x}+{y}+{carry}={x + y + carry}")
        carry = (x + y + carry) // 10
    return "\n".join(lines)


DIFFERENCE_WORDINGS = (
    "What is {a} - {b}?", "What is {a} minus {b}?", "{a} - {b} =", "{a} - {b}", "{a}-{b}", "{a}-{b}=?",
    "Subtract {b} from {a}.", "How much is {a} minus {b}?", "Calculate {a} - {b}.", "Take {b} away from {a}.",
    "Compute {a} - {b}.", "What is left if you take {b} from {a}?", "What is the difference between {a} and {b}?",
    "Can you tell me what {a} - {b} is?",
)  # fmt: skip


def subtraction(rng: Random) -> Sample:
    b, a = sorted((number_below(rng, 999), number_below(rng, 999)))
    question = ask(rng, DIFFERENCE_WORDINGS, a=a, b=b)
    return exact("subtraction", f"{a}-{b}", question, f"{a} - {b} = {a - b}", trace=subtraction_trace(a, b))


def subtraction_trace(a: int, b: int) -> str:
    """Columns from the right: digit - digit - borrow; where that falls below zero, ten is put before the digit."""
    lines, borrow = [], 0
    for column in range(len(str(a))):
        x, y = a // 10**column % 10, b // 10**column % 10
        top = x if x >= y + borrow else x + 10
        lines.append(f"{top}-{y}-{borrow}={top - y - borrow}")
        borrow = int(top > x)
    return "\n".join(lines)


PRODUCT_WORDINGS = (
    "What is {a} * {b}?", "What is {a} times {b}?", "{a} * {b} =", "{a} * {b}", "{a}*{b}", "{a} x {b} =",
    "Multiply {a} by {b}.", "How much is {a} times {b}?", "Calculate {a} * {b}.", "Compute {a} * {b}.",
    "What is the product of {a} and {b}?", "Please multiply {a} and {b}.", "What is {a} multiplied by {b}?",
    "Can you tell me what {a} * {b} is?",
)  # fmt: skip


def multiplication(rng: Random) -> Sample:
    """Up to three digits by one digit."""
    a, b = number_below(rng, 999), rng.randrange(10)
    question = ask(rng, PRODUCT_WORDINGS, a=a, b=b)
    return exact("multiplication", f"{a}*{b}", question, f"{a} * {b} = {a * b}", trace=multiplication_trace(a, b))


def multiplication_trace(a: int, b: int) -> str:
    """Columns from the right: digit * factor, then the carry is added."""
    lines, carry = [], 0
    for column in range(len(str(a))):
        product = a // 10**column % 10 * b
        lines.append(f"{a // 10**column % 10}*{b}={product}+{carry}={product + carry}")
        carry = (product + carry) // 10
    return "\n".join(lines)


COMPARE_WORDINGS: Mapping[str, tuple[str, ...]] = {
    "larger": (
        "Which is larger, {a} or {b}?",
        "Which number is larger: {a} or {b}?",
        "Is {a} or {b} larger?",
        "What is bigger, {a} or {b}?",
        "Which of {a} and {b} is larger?",
        "Which is greater, {a} or {b}?",
        "Compare {a} and {b}. Which is larger?",
    ),
    "smaller": (
        "Which is smaller, {a} or {b}?",
        "Which number is smaller: {a} or {b}?",
        "Is {a} or {b} smaller?",
        "Which of {a} and {b} is smaller?",
        "Which is less, {a} or {b}?",
        "Compare {a} and {b}. Which is smaller?",
    ),
}


def comparison(rng: Random) -> Sample:
    a = number_below(rng, 9999)
    b = a + rng.choice((-1, 1)) * number_below(rng, 99) if rng.random() < 0.4 else number_below(rng, 9999)
    b = abs(b) if b != a else a + 1
    wanted = rng.choice(tuple(COMPARE_WORDINGS))
    best = max(a, b) if wanted == "larger" else min(a, b)
    question = ask(rng, COMPARE_WORDINGS[wanted], a=a, b=b)
    return exact("comparison", f"{wanted} {a} {b}", question, f"{best} is {wanted}.", trace=comparison_trace(a, b))


def comparison_trace(a: int, b: int) -> str:
    """Lengths first; where they are equal, digit by digit from the left up to the first difference."""
    left, right = str(a), str(b)
    pairs = [(len(left), len(right))]
    if len(left) == len(right):
        pairs += [(int(x), int(y)) for x, y in zip(left, right, strict=True)]
    lines = []
    for x, y in pairs:
        lines.append(f"{x}{'=' if x == y else '>' if x > y else '<'}{y}")
        if x != y:
            break
    return "\n".join([*lines, f"{left}{'>' if a > b else '<'}{right}"])


SORT_WORDINGS: Mapping[str, tuple[str, ...]] = {
    "up": (
        "Sort these numbers: {numbers}",
        "Sort {numbers} from smallest to largest.",
        "Put these numbers in order: {numbers}",
        "Order the numbers {numbers}.",
        "Sort the list {numbers}.",
        "Please sort {numbers} in ascending order.",
    ),
    "down": (
        "Sort {numbers} from largest to smallest.",
        "Sort these numbers, largest first: {numbers}",
        "Please sort {numbers} in descending order.",
        "Put {numbers} in order, largest first.",
    ),
}


def sorting(rng: Random) -> Sample:
    numbers = rng.sample(range(100), rng.randint(2, 5))
    direction = rng.choice(("up", "up", "down"))
    ordered = sorted(numbers, reverse=direction == "down")
    question = ask(rng, SORT_WORDINGS[direction], numbers=", ".join(map(str, numbers)))
    answer = ", ".join(map(str, ordered))
    return exact("sorting", f"{direction} {numbers}", question, answer, trace=sorting_trace(numbers, ordered))


def sorting_trace(numbers: list[int], ordered: list[int]) -> str:
    """What is left, then the next number to take, until nothing is left."""
    left, lines = list(numbers), []
    for number in ordered:
        lines.append(f"{','.join(map(str, left))}:{number}")
        left.remove(number)
    return "\n".join(lines)


PARITY_WORDINGS = (
    "Is {a} even or odd?", "Is {a} odd or even?", "Is the number {a} even or odd?", "Tell me if {a} is even or odd.",
    "Even or odd: {a}?", "Would you call {a} even or odd?",
)  # fmt: skip


def parity(rng: Random) -> Sample:
    a = number_below(rng, 9999)
    return exact("parity", str(a), ask(rng, PARITY_WORDINGS, a=a), f"{a} is {'odd' if a % 2 else 'even'}.")


NEXT_WORDINGS: Mapping[int, tuple[str, ...]] = {
    1: (
        "What number comes after {a}?",
        "Which number comes after {a}?",
        "Count one up from {a}.",
        "What comes after {a}?",
    ),
    -1: (
        "What number comes before {a}?",
        "Which number comes before {a}?",
        "Count one down from {a}.",
        "What comes before {a}?",
    ),
}


def neighbours(rng: Random) -> Sample:
    a, step = number_below(rng, 998) + 1, rng.choice((1, -1))
    return exact("neighbours", f"{a}{step:+d}", ask(rng, NEXT_WORDINGS[step], a=a), str(a + step))
