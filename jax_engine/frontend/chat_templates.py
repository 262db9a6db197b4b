"""What can be told of a chat template without rendering it, and where one failed."""

import re
from functools import lru_cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jinja2.nodes import Node

# The tags that transformers adds to Jinja, which mean nothing to a text.
GENERATION = re.compile(r"\{%[-+]?\s*(end)?generation\s*[-+]?%\}")


@lru_cache(maxsize=16)
def content_format_of(template: str) -> str:
    """How a template takes the content of messages: "openai" when it goes through a message's parts, else "string".

    A template that cannot be read takes strings: rendering it says what is wrong.
    """
    from jinja2 import TemplateSyntaxError, nodes
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    try:
        tree = ImmutableSandboxedEnvironment(extensions=["jinja2.ext.loopcontrols"]).parse(GENERATION.sub("", template))
    except (TemplateSyntaxError, RecursionError):
        return "string"
    names = {  # variables that are a message's content
        assignment.target.name
        for assignment in tree.find_all(nodes.Assign)
        if isinstance(assignment.target, nodes.Name) and _is_content(assignment.node)
    }
    iterated = [loop.iter for loop in tree.find_all(nodes.For)]
    found = any(_is_content(node) or (isinstance(node, nodes.Name) and node.name in names) for node in iterated)
    return "openai" if found else "string"


def _is_content(node: "Node") -> bool:
    """Whether an expression is `message.content` or `message["content"]`."""
    from jinja2 import nodes

    if isinstance(node, nodes.Getattr):
        return node.attr == "content"
    return isinstance(node, nodes.Getitem) and isinstance(node.arg, nodes.Const) and node.arg.value == "content"


def failed_line(error: BaseException) -> int | None:
    """The line of the template at which rendering failed, if it can be told."""
    from jinja2 import TemplateSyntaxError

    line = error.lineno if isinstance(error, TemplateSyntaxError) else None
    trace = error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == "<template>":
            line = trace.tb_lineno
        trace = trace.tb_next
    return line
