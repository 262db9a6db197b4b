"""Tool tasks in the Hermes form: choosing a tool and its arguments, and answering from a tool's result."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Any

from jax_engine.models.demo.lexicon import CITIES, COLORS, DAYS, FOODS, ITEMS, NAMES
from jax_engine.models.demo.samples import ExactAnswer, Message, Sample, ToolCallAnswer
from jax_engine.models.demo.tasks_numbers import ask, number_below

Arguments = dict[str, Any]


@dataclass(frozen=True)
class Tool:
    """One callable tool, and how people ask for it.

    `parameters` maps each argument to its JSON type, `draw` makes arguments, `wordings` are requests with the
    arguments as slots, `result` makes what the tool returns, and `reply` tells the user about it.
    """

    name: str
    description: str
    parameters: dict[str, str]
    wordings: tuple[str, ...]
    draw: Callable[[Random], Arguments]
    result: Callable[[Random, Arguments], Arguments]
    reply: str

    @property
    def schema(self) -> dict[str, Any]:
        """The tool in OpenAI's form."""
        properties = {name: {"type": kind} for name, kind in self.parameters.items()}
        parameters = {"type": "object", "properties": properties, "required": list(self.parameters)}
        return {
            "type": "function",
            "function": {"name": self.name, "description": self.description, "parameters": parameters},
        }


WEATHERS = ("sunny", "cloudy", "rainy", "windy", "snowy", "foggy")
LANGUAGES = ("French", "German", "Spanish", "Italian", "Greek", "Dutch")
ROOMS = ("kitchen", "bedroom", "bathroom", "garage", "office")


def _clock(rng: Random) -> str:
    return f"{rng.randint(0, 23):02d}:{rng.randint(0, 59):02d}"


TOOLS = (
    Tool(
        "get_weather",
        "Get the weather in a city.",
        {"city": "string"},
        (
            "What is the weather in {city}?",
            "How is the weather in {city} today?",
            "Tell me the weather in {city}.",
            "Is it warm in {city}?",
        ),
        lambda rng: {"city": rng.choice(CITIES)},
        lambda rng, arguments: {"weather": rng.choice(WEATHERS), "degrees": rng.randint(0, 35)},
        "It is {weather} in {city} with {degrees} degrees.",
    ),
    Tool(
        "get_time",
        "Get the time in a city.",
        {"city": "string"},
        ("What time is it in {city}?", "Tell me the time in {city}.", "What is the time in {city} now?"),
        lambda rng: {"city": rng.choice(CITIES)},
        lambda rng, arguments: {"time": _clock(rng)},
        "It is {time} in {city}.",
    ),
    Tool(
        "multiply",
        "Multiply two numbers.",
        {"a": "number", "b": "number"},
        ("What is {a} times {b}?", "Multiply {a} by {b}.", "What is {a} * {b}?", "Use a tool to multiply {a} and {b}."),
        lambda rng: {"a": number_below(rng, 9999), "b": number_below(rng, 9999)},
        lambda rng, arguments: {"result": arguments["a"] * arguments["b"]},
        "{a} * {b} = {result}",
    ),
    Tool(
        "add",
        "Add two numbers.",
        {"a": "number", "b": "number"},
        ("What is {a} plus {b}?", "Add {a} and {b}.", "What is {a} + {b}?", "Use a tool to add {a} and {b}."),
        lambda rng: {"a": number_below(rng, 9999), "b": number_below(rng, 9999)},
        lambda rng, arguments: {"result": arguments["a"] + arguments["b"]},
        "{a} + {b} = {result}",
    ),
    Tool(
        "set_alarm",
        "Set an alarm.",
        {"time": "string"},
        (
            "Wake me up at {time}.",
            "Set an alarm for {time}.",
            "I need an alarm at {time}.",
            "Please set the alarm to {time}.",
        ),
        lambda rng: {"time": _clock(rng)},
        lambda rng, arguments: {"status": "ok"},
        "The alarm is set for {time}.",
    ),
    Tool(
        "set_timer",
        "Start a timer.",
        {"minutes": "number"},
        (
            "Set a timer for {minutes} minutes.",
            "Start a timer of {minutes} minutes.",
            "Tell me when {minutes} minutes are over.",
        ),
        lambda rng: {"minutes": rng.randint(2, 90)},
        lambda rng, arguments: {"status": "ok"},
        "The timer runs for {minutes} minutes.",
    ),
    Tool(
        "send_message",
        "Send a message to a person.",
        {"name": "string", "text": "string"},
        ('Send "{text}" to {name}.', 'Write {name} the message "{text}".', 'Tell {name}: "{text}"'),
        lambda rng: {
            "name": rng.choice(NAMES),
            "text": f"{rng.choice(('See you', 'Call me', 'I am free', 'Come'))} on {rng.choice(DAYS)}",
        },
        lambda rng, arguments: {"status": "sent"},
        "I sent your message to {name}.",
    ),
    Tool(
        "find_recipe",
        "Find a recipe for a dish.",
        {"dish": "string"},
        (
            "How do I cook {dish}?",
            "Find a recipe for {dish}.",
            "I want to make {dish}.",
            "Give me a recipe for {dish}.",
        ),
        lambda rng: {"dish": rng.choice(FOODS)},
        lambda rng, arguments: {"minutes": rng.randint(5, 90)},
        "I found a recipe for {dish} that takes {minutes} minutes.",
    ),
    Tool(
        "translate",
        "Translate a word.",
        {"word": "string", "language": "string"},
        ("What is {word} in {language}?", "Translate {word} into {language}.", "How do you say {word} in {language}?"),
        lambda rng: {"word": rng.choice(FOODS), "language": rng.choice(LANGUAGES)},
        lambda rng, arguments: {"status": "not found"},
        "I could not find {word} in {language}.",
    ),
    Tool(
        "set_light",
        "Set the light of a room to a color.",
        {"room": "string", "color": "string"},
        (
            "Make the light in the {room} {color}.",
            "Set the {room} light to {color}.",
            "I want {color} light in the {room}.",
        ),
        lambda rng: {"room": rng.choice(ROOMS), "color": rng.choice(COLORS)},
        lambda rng, arguments: {"status": "ok"},
        "The light in the {room} is {color} now.",
    ),
    Tool(
        "get_price",
        "Get the price of a product.",
        {"product": "string"},
        ("How much do {product} cost?", "What is the price of {product}?", "Find the price of {product}."),
        lambda rng: {"product": rng.choice(ITEMS)},
        lambda rng, arguments: {"price": rng.randint(1, 99)},
        "The price of {product} is {price}.",
    ),
    Tool(
        "book_table",
        "Book a table at a restaurant.",
        {"day": "string", "people": "number"},
        (
            "Book a table for {people} people on {day}.",
            "I need a table on {day} for {people} people.",
            "Reserve a table for {people} on {day}.",
        ),
        lambda rng: {"day": rng.choice(DAYS), "people": rng.randint(2, 20)},
        lambda rng, arguments: {"status": "ok"},
        "Your table for {people} on {day} is booked.",
    ),
)


def _offered(rng: Random, wanted: Tool) -> tuple[dict[str, Any], ...]:
    """The wanted tool among up to two others, in any order."""
    others = rng.sample([tool for tool in TOOLS if tool is not wanted], rng.choices((0, 1, 2), weights=(5, 4, 1))[0])
    chosen = [wanted, *others]
    rng.shuffle(chosen)
    return tuple(tool.schema for tool in chosen)


def _call_message(tool: Tool, arguments: Arguments) -> Message:
    call = {"type": "function", "function": {"name": tool.name, "arguments": arguments}}
    return {"role": "assistant", "content": "", "tool_calls": [call]}


def tool_calls(rng: Random) -> Sample:
    tool = rng.choice(TOOLS)
    arguments = tool.draw(rng)
    question = ask(rng, tool.wordings, **arguments)
    expected = json.dumps({"name": tool.name, "arguments": arguments})
    messages = ({"role": "user", "content": question}, _call_message(tool, arguments))
    return Sample("tool calls", f"{tool.name} {expected}", messages, ToolCallAnswer(expected), _offered(rng, tool))


def tool_results(rng: Random) -> Sample:
    """The call has been made and its result is given: what is left is to tell the user."""
    tool = rng.choice(TOOLS)
    arguments = tool.draw(rng)
    result = tool.result(rng, arguments)
    answer = tool.reply.format(**arguments, **result)
    messages: tuple[Message, ...] = (
        {"role": "user", "content": ask(rng, tool.wordings, **arguments)},
        _call_message(tool, arguments),
        {"role": "tool", "content": json.dumps(result)},
        {"role": "assistant", "content": answer},
    )
    return Sample(
        "tool results",
        f"{tool.name} {json.dumps(arguments)} {json.dumps(result)}",
        messages,
        ExactAnswer(answer),
        _offered(rng, tool),
    )
