"""Command line before environment before file before defaults; nothing unknown is accepted, and no secret is shown."""

import logging

import pytest

from jax_engine.server.cli.flags import boolean, engine_config
from jax_engine.server.cli.parser import run_command_line
from jax_engine.server.cli.root import command_line, main

FILE = """\
# as vLLM's
model: my-model
max_model_len: 8K
max-num-seqs: 3
served-model-name: [a, "b c"]
enable-prefix-caching: false
speculative-config: {method: ngram, num_speculative_tokens: 4}
api-key: 0123
"""


def parse(*arguments, **environment):
    taken = []

    def take(command, options):
        taken.append(options)
        return 0

    run_command_line(command_line(), arguments, version="0", environment=environment, run=take)
    return taken[0]


def refusal(capsys, *arguments, **environment):
    with pytest.raises(SystemExit) as ended:
        parse(*arguments, **environment)
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "settings.yaml"
    path.write_text(FILE)
    return path


def test_each_source_gives_way_to_the_one_before_it(file):
    arguments = ("serve", "--config", str(file))
    assert parse("serve")["max_num_seqs"] is None
    assert parse(*arguments)["max_num_seqs"] == 3
    assert parse(*arguments, JAX_ENGINE_MAX_NUM_SEQS="4")["max_num_seqs"] == 4
    assert parse(*arguments, "--max-num-seqs", "5", JAX_ENGINE_MAX_NUM_SEQS="4")["max_num_seqs"] == 5
    assert parse("serve", JAX_ENGINE_CONFIG=str(file))["model"] == "my-model"
    assert parse(*arguments, "other-model")["model"] == "other-model"


def test_a_file_holds_what_flags_may_be_given(file):
    options = parse("serve", "--config", str(file))
    config = engine_config(options)
    assert (config.max_model_len, config.enable_prefix_caching) == (8192, False)
    assert config.speculative_config == {"method": "ngram", "num_speculative_tokens": 4}
    assert options["served_model_name"] == ["a", "b c"]
    assert options["api_key"] == ["0123"], "as it is written, and not as an octal number"


def test_variables_hold_lists_as_a_shell_does():
    options = parse("serve", JAX_ENGINE_API_KEY="one 'two three'", JAX_ENGINE_ENABLE_LORA="true")
    assert options["api_key"] == ["one", "two three"]
    assert options["enable_lora"] is True


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("max-model-length: 8", "line 1: unknown key max-model-length; did you mean max-model-len?"),
        ("port: 1\nport: 2", "line 2: port stands there for the second time"),
        ("\nmax-num-seqs: many", "line 2: max-num-seqs 'many' is not a number"),
        ("port: [1, 2]", "line 1: port takes one value"),
        ("port:", "line 1: port has no value"),
        ("- port", "must hold keys and values"),
        ("port: {", "is not YAML"),
        ("config: other.yaml", "unknown key config"),
        ("enable-lora: maybe", "line 1: enable-lora 'maybe' must be true or false"),
    ],
)
def test_a_mistake_in_a_file_is_told_with_its_line(tmp_path, capsys, content, words):
    path = tmp_path / "settings.yaml"
    path.write_text(content)
    assert words in refusal(capsys, "serve", "--config", str(path))


def test_a_value_out_of_range_is_told_with_its_source(tmp_path, capsys, monkeypatch):
    path = tmp_path / "settings.yaml"
    path.write_text("max-num-seqs: 0")
    with pytest.raises(SystemExit):
        main(["serve", "--config", str(path)])
    told = capsys.readouterr().err
    assert "--max-num-seqs 0 must be" in told
    assert f"(max-num-seqs is from --config {path}, line 1: max-num-seqs)" in told
    monkeypatch.setenv("JAX_ENGINE_PORT", "70000")
    with pytest.raises(SystemExit):
        main(["serve"])
    assert "(port is from JAX_ENGINE_PORT)" in capsys.readouterr().err


def test_a_misspelled_variable_is_logged_without_its_value(caplog):
    with caplog.at_level(logging.WARNING):
        parse("serve", JAX_ENGINE_API_KEYS="secret", JAX_ENGINE_INPUT_FILE="of another command")
    (record,) = caplog.records
    assert record.message == (
        "the environment variable JAX_ENGINE_API_KEYS is no setting; did you mean JAX_ENGINE_API_KEY?"
    )


def test_a_missing_file_is_told(capsys):
    assert "--config nowhere.yaml cannot be read" in refusal(capsys, "serve", "--config", "nowhere.yaml")


def test_switches_have_the_usual_words():
    assert [boolean(text) for text in ("true", "Yes", "on", "1", "FALSE", "no", "off", "0")] == [True] * 4 + [False] * 4
