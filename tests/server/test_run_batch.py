"""`jax-engine run-batch`: every line gets its result, whatever the others are, and a stopped run goes on."""

import json
import signal
import subprocess
import sys
import time

import pytest

from jax_engine.server.cli.batch_files import finished_keys, keys_of
from jax_engine.server.cli.root import main
from jax_engine.server.cli.run_batch import Counts, check_not_streamed

RUN = [sys.executable, "-m", "jax_engine.server.cli", "run-batch"]


def line(custom_id, url="/v1/completions", **body):
    return json.dumps({"custom_id": custom_id, "method": "POST", "url": url, "body": body}) + "\n"


def result(custom_id, number=1):
    response = {"status_code": 200, "request_id": "r", "body": {}}
    return json.dumps({"id": f"batch_req_{number}", "custom_id": custom_id, "response": response, "error": None}) + "\n"


def run(*arguments):
    return subprocess.run([*RUN, *map(str, arguments)], capture_output=True, text=True, check=False)


def test_two_lines_with_one_custom_id_are_refused_by_their_numbers(tmp_path):
    file = tmp_path / "in.jsonl"
    file.write_text(line("a") + "\n" + line("b") + "no json\n" + line("a"))
    with pytest.raises(ValueError, match="lines 1 and 5 have the same custom_id 'a'"):
        keys_of(file)


def test_whole_results_are_kept_and_a_torn_one_is_cut_off(tmp_path):
    asked, file = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    asked.write_text(line("a") + "no json\n" + line("c"))
    bad = '{"id": "batch_req_2", "custom_id": null, "response": null, "error": {"code": "x"}}\n'
    whole = result("a") + bad
    file.write_text(whole + result("c", 3)[:-20])
    keys = keys_of(asked)
    assert finished_keys(file, keys) == {key for key, number in keys.items() if number != 3}
    assert file.read_text() == whole
    assert finished_keys(tmp_path / "none.jsonl", keys) == set()


@pytest.mark.parametrize(
    ("content", "words"),
    [("my notes\n", "line 1: not a result"), (result("z"), "line 1: custom_id 'z' is not in the input")],
)
def test_a_file_of_something_else_is_left_as_it_is(tmp_path, capsys, content, words):
    asked, file = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    asked.write_text(line("a"))
    file.write_text(content)
    with pytest.raises(SystemExit) as ended:
        main(["run-batch", "-i", str(asked), "-o", str(file)])
    assert ended.value.code == 2
    (told,) = capsys.readouterr().err.splitlines()
    assert words in told
    assert file.read_text() == content


def test_settings_that_cannot_be_begun_with_leave_no_file(tmp_path, capsys):
    asked, file = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    asked.write_text(line("a"))
    for given, words in (
        (("-i", str(asked), "-o", str(file), "--max-concurrency", "0"), "--max-concurrency 0 must be"),
        (("-i", str(asked), "-o", str(asked)), "is the input"),
        (("-i", str(file), "-o", str(asked)), f"--input-file {file} cannot be read"),
    ):
        with pytest.raises(SystemExit):
            main(["run-batch", *given])
        assert words in capsys.readouterr().err
    assert not file.exists()
    assert asked.read_text() == line("a")


def test_a_stream_has_no_place_in_a_line():
    check_not_streamed(b'{"prompt": "a", "stream": false}')
    with pytest.raises(ValueError, match=r"body\.stream=true"):
        check_not_streamed(b'{"stream": true}')


def test_rates_are_of_this_run_alone():
    counts = Counts(answered=6, failed=1, prompt_tokens=30, completion_tokens=60)
    summary = counts.summary(kept=4, remaining=2, seconds=3.0)
    assert summary["total_samples"] == 6
    assert summary["throughput_samples_per_sec"] == 2
    assert summary["output_tokens_per_sec"] == 20
    assert Counts().summary(kept=4, remaining=0, seconds=0.0)["throughput_samples_per_sec"] == 0


def test_a_finished_file_needs_no_engine(tmp_path, capsys):
    asked, file = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    asked.write_text(line("a"))
    file.write_text(result("a"))
    assert main(["run-batch", "-i", str(asked), "-o", str(file)]) == 0
    assert json.loads(capsys.readouterr().out)["kept_samples"] == 1


def test_a_stopped_run_is_gone_on_with_and_bad_lines_are_errors(tmp_path):
    asked, file, summary = tmp_path / "in.jsonl", tmp_path / "out.jsonl", tmp_path / "summary.json"
    chat = {"messages": [{"role": "user", "content": "What is 17 + 25?"}], "temperature": 0}
    short = {"prompt": "Once", "max_tokens": 2, "temperature": 0}
    long = {"prompt": "Once", "max_tokens": 100, "ignore_eos": True, "temperature": 0}
    bad = [line("refused", **{**short, "max_tokens": -5}), "no json\n", line("reset", "/reset_prefix_cache")]
    asked.write_text(
        line("chat", "/v1/chat/completions", **chat)
        + "".join(bad)
        + "".join(line(f"short {i}", **short) for i in range(4))
        + "".join(line(f"long {i}", **long) for i in range(8))
    )
    command = ["-i", str(asked), "-o", str(file), "--max-concurrency", "2"]
    stopped = subprocess.Popen([*RUN, *command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 240
    while not (file.exists() and file.read_text().count("\n") >= 9) and stopped.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    stopped.send_signal(signal.SIGINT)
    printed, errors = stopped.communicate(timeout=120)
    assert stopped.returncode == 130, errors
    assert "Traceback" not in errors
    before = file.read_text()
    assert before.endswith("\n")
    told = json.loads(printed)
    assert told["remaining_samples"] == 16 - before.count("\n") > 0
    assert told["total_output_tokens"] > 0

    file.write_text(before + '{"id": "torn')
    again = run(*command, "--summary", summary)
    assert again.returncode == 0, again.stderr
    assert file.read_text().startswith(before)
    rows = [json.loads(text) for text in file.read_text().splitlines()]
    names = [row["custom_id"] for row in rows]
    assert len(names) == len(set(names)) == 16
    by_name = dict(zip(names, rows, strict=True))
    answer = by_name["chat"]["response"]
    assert answer["status_code"] == 200
    assert "42" in answer["body"]["choices"][0]["message"]["content"]
    assert answer["body"]["id"].endswith(answer["request_id"])
    assert by_name["refused"]["response"]["status_code"] == 400
    assert "max_tokens=-5" in by_name["refused"]["response"]["body"]["error"]["message"]
    assert by_name[None]["error"]["message"].startswith("line 3: JSON is malformed")
    assert "url='/reset_prefix_cache' must be one of" in by_name["reset"]["error"]["message"]
    figures = json.loads(summary.read_text())
    assert figures == json.loads(again.stdout)
    assert figures["kept_samples"] == before.count("\n")
    assert figures["total_samples"] == told["remaining_samples"]
    assert figures["throughput_samples_per_sec"] == pytest.approx(
        figures["total_samples"] / figures["inference_time_seconds"]
    )
