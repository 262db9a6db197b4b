"""The command line: what it understands, what it refuses, what it costs to ask for help."""

import dataclasses
import json
import subprocess
import sys
from importlib import metadata

import pytest

from jax_engine.config import EngineConfig
from jax_engine.server.cli.flags import COMPILE_FIRST, ENGINE_GROUPS, as_flags, count, engine_config
from jax_engine.server.cli.parser import run_command_line
from jax_engine.server.cli.root import command_line, main
from jax_engine.server.settings import ServerSettings


def run(*arguments, stdin=""):
    command = [sys.executable, "-m", "jax_engine.server.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, input=stdin)


def parse(*arguments, **environment):
    """What the command that the arguments name would be given."""
    taken = []

    def take(command, options):
        taken.append(options)
        return 0

    assert run_command_line(command_line(), arguments, version="0", environment=environment, run=take) == 0
    return taken[0]


def refusal(capsys, *arguments):
    """The one line on standard error, and the exit code 2, of a command that does nothing else."""
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_every_engine_setting_has_one_flag():
    flags = [flag.field for group in ENGINE_GROUPS.values() for flag in group] + [COMPILE_FIRST.field, "model"]
    assert sorted(flags) == sorted(field.name for field in dataclasses.fields(EngineConfig))


def test_flags_become_the_configuration():
    options = parse(
        *("serve", "my-model", "--max-model-len", "8K", "--max_num_seqs=8", "--kv-cache-memory-bytes", "2G"),
        *(
            "--dtype",
            "bfloat16",
            "--gpu-memory-utilization",
            "0.5",
            "--compile-before-ready",
            "--compile-threads",
            "3",
            "--no-enable-prefix-caching",
        ),
        *("--prefix-caching-hash-algo", "xxhash"),
    )
    assert engine_config(options) == EngineConfig(
        model="my-model",
        max_model_len=8192,
        max_num_seqs=8,
        kv_cache_memory_bytes=2 * 2**30,
        dtype="bfloat16",
        gpu_memory_utilization=0.5,
        compile_before_ready=True,
        compile_threads=3,
        enable_prefix_caching=False,
        prefix_caching_hash_algo="xxhash",
    )
    options = parse("serve", "--kv-offloading-size", "1.5", "--kv-offloading-load", "always")
    assert engine_config(options) == EngineConfig(kv_offloading_size=1.5, kv_offloading_load="always")
    defaults = parse("serve", "--generation-config", "vllm", "--override-generation-config", '{"top_k": 3}')
    expected = EngineConfig(generation_config="vllm", override_generation_config={"top_k": 3})
    assert engine_config(defaults) == expected
    assert engine_config(parse("serve", "--swap-space", "4")) == EngineConfig(swap_space=4.0)


def test_speculation_is_given_as_json(capsys):
    asked = {"method": "ngram", "num_speculative_tokens": 4}
    assert engine_config(parse("serve", "--speculative-config", json.dumps(asked))).speculative_config == asked
    for text in ("{", "4"):
        with pytest.raises(SystemExit):
            parse("serve", "--speculative-config", text)
        assert "is not" in capsys.readouterr().err


def test_without_flags_the_configuration_is_the_default():
    assert engine_config(parse("serve")) == EngineConfig()
    assert engine_config(parse("generate")) == EngineConfig()
    assert engine_config(parse("chat")) == EngineConfig()


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("4096", 4096),
        ("32k", 32_000),
        ("32K", 32_768),
        ("512M", 2**29),
        ("2G", 2**31),
        ("1.5G", 3 * 2**29),
        ("2GiB", 2**31),
        ("2GB", 2 * 10**9),
    ],
)
def test_numbers_may_have_units(text, value):
    assert count(text) == value


@pytest.mark.parametrize("text", ["", "G", "1.5", "-1", "2X", "1e3"])
def test_other_numbers_are_refused(capsys, text):
    assert "--max-model-len" in refusal(capsys, "serve", f"--max-model-len={text}")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("serve", "--max-model-length", "8"), "unknown option --max-model-length; did you mean --max-model-len?"),
        (("serve", "--prot=1"), "did you mean --port?"),
        (("serve", "--max-model", "8"), "did you mean --max-model-len?"),  # no abbreviations
        (("chat", "--temprature", "1"), "did you mean --temperature?"),
        (("serve", "a", "b"), "unknown argument b"),
        (("srve",), "unknown command srve; did you mean serve?"),
        (("--verison",), "did you mean --version?"),
        (("serve", "--no-enable-prefix-cashing"), "did you mean --no-enable-prefix-caching?"),
        (("serve", "--enable-prefix-caching=yes"), "--enable-prefix-caching takes no value"),
        (("serve", "--port"), "--port needs a value"),
        (("run-batch", "-i", "a"), "--output-file is missing"),
        (("serve", "--dtype", "float63"), "float32"),
    ],
)
def test_a_misspelling_is_answered_with_the_nearest_name(capsys, arguments, words):
    line = refusal(capsys, *arguments)
    assert line.startswith("jax-engine")
    assert words in line


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--max-num-seqs", "0"), "--max-num-seqs 0 must be a whole number"),
        (("--max-num-batched-tokens", "4"), "--max-num-batched-tokens 4 must be at least --max-num-seqs 64"),
        (("--gpu-memory-utilization", "1.5"), "--gpu-memory-utilization 1.5"),
        (("--port", "70000"), "--port 70000"),
        (("--shutdown-timeout", "-1"), "--shutdown-timeout -1"),
        (("--chat-template", "/nowhere/at.all"), "--chat-template /nowhere/at.all cannot be read"),
        (("--host", "192.0.2.1"), "cannot be listened on"),
        (("--trust-remote-code",), "is refused: a checkpoint's code is for PyTorch"),
        (("--ssl-certfile", "/nowhere/at.all"), "No such file"),
        (("--uds", "/nowhere/at/all.sock"), "--uds '/nowhere/at/all.sock' cannot be listened on"),
        (("--root-path", "llm/"), "must begin with a slash"),
        (("--allowed-origins", "https://a.example"), "is not a JSON list of strings"),
        (("--receive-timeout", "0"), "--receive-timeout 0"),
    ],
)
def test_a_bad_setting_is_one_line_in_the_words_of_the_command_line(capsys, arguments, words):
    assert words in refusal(capsys, "serve", *arguments)


def test_several_values_may_follow_one_option():
    options = parse(
        "serve", "my-model", "--served-model-name", "a", "b", "--lora-modules", "x=1", "y=2", "--enable-lora"
    )
    assert options["model"] == "my-model"
    assert options["served_model_name"] == ["a", "b"]
    assert options["lora_modules"] == ["x=1", "y=2"]
    options = parse("serve", "--api-key=k", "--served-model-name=a", "my-model", "--api_key", "l")
    assert (options["model"], options["served_model_name"], options["api_key"]) == ("my-model", ["a"], ["k", "l"])
    assert parse("generate", "--chat", "--", "--not-an-option")["prompts"] == ["--not-an-option"]


def test_fields_are_translated_whole():
    assert as_flags("n=1 and max_num_seqs=2", ["max_num_seqs"]) == "n=1 and --max-num-seqs 2"


def test_a_setting_of_the_server_that_is_no_number(capsys):
    with pytest.raises(ValueError, match="api_key"):
        ServerSettings(api_keys=("",))
    assert "served_model_name" in refusal(capsys, "serve", "--served-model-name", "")


def test_help_teaches_without_importing_anything_heavy():
    script = (
        "import sys\n"
        "from jax_engine.server.cli.root import main\n"
        "try:\n    main(['serve', '--help'])\n"
        "except SystemExit:\n    pass\n"
        "heavy = {'jax', 'numpy', 'transformers', 'fastapi', 'uvicorn', 'tokenizers', 'huggingface_hub'}\n"
        "print('heavy:', *sorted(heavy & set(sys.modules)))\n"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert result.stdout.splitlines()[-1] == "heavy:"
    for words in ("examples:", "--max-num-seqs", "(default: 64)", "curl"):
        assert words in result.stdout


def test_version_and_bare_command():
    assert run("--version").stdout.startswith("jax-engine 0.")
    assert "COMMAND" in run().stdout


def test_every_command_has_its_help(capsys):
    for command in command_line().commands:
        assert main([*command.name.split(), "--help"]) == 0
        printed = capsys.readouterr().out
        assert command.summary in printed
        for flag in command.options:
            assert flag.option.removeprefix("--") in printed


def test_generate_answers_from_arguments_and_a_file(tmp_path):
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "What is 2 + 3?"}\n\n{"prompt": "What is 17 + 25?", "id": 7}\n')
    result = run("generate", "--chat", "--temperature", "0", "--jsonl", "--file", str(file), "What is 4 + 4?")
    assert result.returncode == 0, result.stderr
    rows = [json.loads(line) for line in result.stdout.splitlines()]
    assert [row["prompt"] for row in rows] == ["What is 4 + 4?", "What is 2 + 3?", "What is 17 + 25?"]
    assert [row["finish_reason"] for row in rows] == ["stop"] * 3
    assert "42" in rows[2]["text"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [((), "no prompt: the input is empty"), (("--file", "nowhere.txt"), "--file nowhere.txt cannot be read")],
)
def test_generate_without_prompts_says_so(arguments, words):
    result = run("generate", *arguments)
    assert result.returncode == 2
    assert words in result.stderr
    assert "Traceback" not in result.stderr


def test_chat_with_a_server_remembers_resets_and_reports_errors(server):
    lines = "/help\nWhat is 17 + 25?\n/reset\n\nWhat is 2 + 3?\n/exit\nnot read\n"
    result = run("chat", "--url", server.url, "--temperature", "0", stdin=lines)
    assert result.returncode == 0, result.stderr
    assert "42" in result.stdout
    assert "/reset forgets" in result.stderr
    wrong = run("chat", "no-such-model", "--url", server.url, stdin="hi\n")
    assert "answered 404: the model 'no-such-model' does not exist" in wrong.stderr
    nowhere = run("chat", "--url", "http://127.0.0.1:9", stdin="hi\n")
    assert "the connection to http://127.0.0.1:9/v1/chat/completions failed" in nowhere.stderr


def test_chat_in_process_answers():
    result = run("chat", "--temperature", "0", "--max-tokens", "80", stdin="What is 17 + 25?\n")
    assert result.returncode == 0, result.stderr
    assert result.stdout == "17 + 25 = 42\n", "the answer alone, without what the model thinks before it"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("chat", "--url", "http://127.0.0.1:9", "--max-num-seqs", "4"), "--max-num-seqs is for an engine"),
        (("complete", "--api-key", "k"), "--api-key is for the server of --url"),
    ],
)
def test_what_would_have_no_effect_is_refused(capsys, arguments, words):
    assert words in refusal(capsys, *arguments)


def test_complete_continues_each_line_with_a_server(server):
    result = run(
        "complete", "--url", server.url, "--temperature", "0", "--max-tokens", "8", stdin="Once upon\n\nOnce upon\n"
    )
    assert result.returncode == 0, result.stderr
    first, second = result.stdout.splitlines()
    assert first == second != ""
    quick = run("complete", "--url", f"{server.url}/v1", "-q", "Once upon", "--temperature=0", "--max-tokens=8")
    assert quick.stdout == f"{first}\n"
    wrong = run("complete", "--url", server.url, "-q", "Once", "--temperature=-1")
    assert wrong.returncode == 2
    assert "answered 400: --temperature -1" in wrong.stderr
    assert wrong.stdout == ""


def test_collect_env_describes_the_machine_and_keeps_secrets(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_very_secret")
    monkeypatch.setenv("JAX_ENGINE_API_KEY", "also secret")
    result = run("collect-env", "--json")
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout)
    assert report["packages"]["jax"] == metadata.version("jax")
    assert report["devices"]["backend"] == "cpu"
    assert report["environment"]["HF_TOKEN"] == "(set)"
    assert "secret" not in result.stdout
    printed = run("collect-env").stdout
    assert metadata.version("flax") in printed and "secret" not in printed
