"""`jax-engine generate`: prompts from the command line, a file or standard input; answers as text or JSON lines."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import msgspec

from jax_engine.config import EngineConfig
from jax_engine.llm import LLM
from jax_engine.outputs import RequestOutput


def generate(
    config: EngineConfig,
    prompts: Sequence[str],
    *,
    file: str | None,
    chat: bool,
    jsonl: bool,
    given: Mapping[str, Any],
) -> int:
    """Complete the prompts and print the answers in their order; returns the exit code. ValueError for bad input."""
    asked = all_prompts(prompts, file)
    settings = asdict(config)
    with LLM(settings.pop("model"), **settings) as llm:
        # Without a word on the length, an answer may be as long as the context allows; a continuation may not.
        unlimited = {"max_tokens": None} if chat else {}
        params = replace(llm.get_default_sampling_params(), **{**unlimited, **given})
        if chat:
            outputs = llm.chat([[{"role": "user", "content": prompt}] for prompt in asked], params, use_tqdm=False)
        else:
            outputs = llm.generate(asked, params, use_tqdm=False)
    for prompt, output in zip(asked, outputs, strict=True):
        print_output(prompt, output, jsonl=jsonl)
    return 0


def all_prompts(prompts: Sequence[str], file: str | None) -> list[str]:
    """The prompts given, then those of the file; of standard input when there are neither."""
    asked = list(prompts)
    if file is not None:
        asked += prompts_of_file(Path(file))
    if not asked and file is None:
        if sys.stdin.isatty():
            raise ValueError('no prompt: give one as an argument, as in jax-engine generate --chat "What is 17 + 25?"')
        asked = [line for line in sys.stdin.read().splitlines() if line.strip()]
    if not asked:
        raise ValueError("no prompt: the input is empty")
    return asked


def prompts_of_file(path: Path) -> list[str]:
    """One prompt a line; in a .jsonl file, the strings under "prompt"."""
    try:
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--file {path} cannot be read: {error}") from error
    if path.suffix != ".jsonl":
        return lines
    prompts = []
    for number, line in enumerate(lines, start=1):
        try:
            prompts.append(msgspec.json.decode(line, type=dict[str, Any])["prompt"])
        except (msgspec.DecodeError, KeyError):
            raise ValueError(f'--file {path}, line {number}: not a JSON object with a "prompt"') from None
    return prompts


def print_output(prompt: str, output: RequestOutput, *, jsonl: bool) -> None:
    """Print each completion of a prompt."""
    for completion in output.outputs:
        if jsonl:
            row = {
                "prompt": prompt,
                "text": completion.text,
                "finish_reason": completion.finish_reason,
                "prompt_tokens": len(output.prompt_token_ids),
                "output_tokens": len(completion.token_ids),
            }
            print(msgspec.json.encode(row).decode())
        else:
            print(completion.text)
