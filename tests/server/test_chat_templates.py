"""Chat templates: whose is used, what it is given, and what is said when it fails."""

import json

import pytest

from jax_engine.frontend.chat_templates import content_format_of
from jax_engine.frontend.tokenizer import load_tokenizer
from jax_engine.loading.model_files import resolve_model_path
from jax_engine.server.cli.root import read_template
from jax_engine.server.errors import ApiError
from jax_engine.server.openai.chat_format import rendered_chat
from jax_engine.server.openai.protocol import ChatCompletionRequest
from jax_engine.server.settings import ServerSettings

TOKENIZER = load_tokenizer(resolve_model_path("demo"))
USER = {"role": "user", "content": "hi"}
MOOD = "{{ messages[0].content }} {{ mood or 'calm' }} {{ reasoning_effort or '' }}"
PARTS = "{% for message in messages %}{% for part in message['content'] %}<{{ part.text }}>{% endfor %}{% endfor %}"


def rendered(settings: dict | None = None, **fields) -> str:
    asked = ChatCompletionRequest.from_body(json.dumps({"messages": [USER], **fields}).encode())
    return rendered_chat(TOKENIZER, ServerSettings(**(settings or {})), asked)


def refusal(settings: dict | None = None, **fields) -> ApiError:
    with pytest.raises(ApiError) as caught:
        rendered(settings, **fields)
    assert caught.value.status == 400
    return caught.value


def test_a_requests_variables_go_before_the_servers():
    settings = {"chat_template": MOOD, "default_chat_template_kwargs": {"mood": "glad"}}
    assert rendered({"chat_template": MOOD}).strip() == "hi calm"
    assert rendered(settings).strip() == "hi glad"
    assert rendered(settings, chat_template_kwargs={"mood": "sad"}).strip() == "hi sad"
    assert rendered(settings, reasoning_effort="low") == "hi glad low"


def test_a_requests_own_template_is_used_only_where_clients_are_trusted():
    own = "{{ messages|length }}"
    error = refusal(chat_template=own)
    assert error.param == "chat_template"
    assert "--trust-request-chat-template" in error.message
    assert rendered({"trust_request_chat_template": True}, chat_template=own) == "1"


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{{ bos_token }}\n{{ raise_exception('no robots\\nhere') }}", "at its line 2: no robots\nhere"),
        ("one\n\n{% if %}", "at its line 3: "),
        ("\n{% for message in messages %}\n{{ 1 / 0 }}{% endfor %}", "at its line 3: division by zero"),
    ],
)
def test_a_template_that_fails_says_where_and_why(template, words):
    assert words in refusal({"chat_template": template}).message


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (PARTS, "openai"),
        ("{% set content = message.content %}{% for part in content %}{{ part }}{% endfor %}", "openai"),
        ("{% generation %}{% for c in messages[0].content %}{% break %}{% endfor %}{% endgeneration %}", "openai"),
        ("{% for message in messages %}{{ message.content }}{% endfor %}", "string"),
        ("{% for message in content %}{{ message.content }}{% endfor %}", "string"),
        ("{% if", "string"),
    ],
)
def test_the_content_is_given_as_the_template_reads_it(template, expected):
    assert content_format_of(template) == expected


def test_content_in_parts():
    messages = [USER, {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]
    assert rendered({"chat_template": PARTS}, messages=messages) == "<hi><a><b>"
    strings = {"chat_template": "{{ messages[1].content }}", "chat_template_content_format": "string"}
    assert rendered(strings, messages=messages) == "a\nb"
    assert "'text': 'hi'" in rendered({"chat_template": MOOD, "chat_template_content_format": "openai"})
    with pytest.raises(ValueError, match="chat_template_content_format='list' is not known"):
        ServerSettings(chat_template_content_format="list")


@pytest.mark.parametrize("name", ["reasoning", "reasoning_content"])
def test_a_template_may_read_earlier_reasoning_under_either_name(name):
    messages = [USER, {"role": "assistant", "content": "42", name: "6 * 7"}]
    template = "{{ messages[1].reasoning }} {{ messages[1].reasoning_content }}"
    assert rendered({"chat_template": template}, messages=messages) == "6 * 7 6 * 7"


def test_a_template_is_a_file_or_itself(tmp_path):
    file = tmp_path / "own.jinja"
    file.write_text(MOOD)
    assert read_template(str(file)) == read_template(MOOD) == MOOD
    assert read_template(None) is None
    with pytest.raises(ValueError, match="--chat-template nowhere cannot be read"):
        read_template("nowhere")
