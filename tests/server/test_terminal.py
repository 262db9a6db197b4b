"""How answers are shown in a terminal, and read from a stream."""

import io

import pytest
from rich.console import Console

from jax_engine.server.cli.partners import chunks, lines
from jax_engine.server.cli.terminal import MarkdownDisplay, PlainDisplay, split_block


@pytest.mark.parametrize(
    ("text", "block", "rest"),
    [
        ("one line", "", "one line"),
        ("a\n\nb", "a", "b"),
        ("a\n\nb\n\n\nc", "a\n\nb\n", "c"),
        ("```\na\n\nb", "", "```\na\n\nb"),
        ("x\n\n```\na\n\nb", "x", "```\na\n\nb"),
        ("```\na\n```\n\nb", "```\na\n```", "b"),
    ],
)
def test_blocks_end_at_blank_lines_outside_of_code(text, block, rest):
    assert split_block(text) == (block, rest)


def shown(*pieces, thought=""):
    output = io.StringIO()
    display = MarkdownDisplay(Console(file=output, force_terminal=True, width=60, color_system=None))
    if thought:
        display.reason(thought)
    for piece in pieces:
        display.write(piece)
    display.end(" [stopped]")
    return output.getvalue()


def test_markdown_is_drawn_and_every_block_stays():
    printed = shown(
        "# Ti", "tle\n\nSome **bold", "** text\n\n```python\nx = 1\n\ny = 2\n```\n\nthe end", thought="hm [1]"
    )
    for words in ("hm [1]", "Title", "Some bold text", "x = 1", "y = 2", "the end", "[stopped]"):
        assert words in printed
    assert "**" not in printed.rpartition("Some bold text")[2]


def test_plain_output_is_the_answer_alone(capsys):
    display = PlainDisplay()
    display.reason("hm")
    display.write("**a**")
    display.write("\n\nb")
    display.end()
    assert capsys.readouterr().out == "**a**\n\nb\n"


def test_events_are_read_across_the_pieces_of_a_stream():
    pieces = [b'data: {"a"', b": 1}\n\nda", b'ta: {"a": 2}\n\n: ping\n\ndata: [DONE]\n\n']
    assert list(chunks(lines(pieces))) == [{"a": 1}, {"a": 2}]
    with pytest.raises(ValueError, match="engine died"):
        list(chunks(lines([b'data: {"error": {"message": "engine died"}}\n'])))
