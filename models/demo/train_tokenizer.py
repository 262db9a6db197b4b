"""Trains the demo model's byte-level BPE tokenizer on generated text and writes its files.

python -m jax_engine.models.demo.train_tokenizer --output DIR
"""

import argparse
import itertools
import json
import re
import string
from collections.abc import Iterator
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, pre_tokenizers, processors
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer

from jax_engine.models.demo.chat_template import BEGIN, CHAT_TEMPLATE, CONTROL_TOKENS, END, PAD, TEXT_TOKENS, render
from jax_engine.models.demo.generator import training_samples

SCHEMA_WORDS = (
    "type function name description parameters properties object required string number integer boolean array "
    "arguments city time status"
).split()

PIECES = "|".join(
    (
        r"\A(?:system|user|assistant|tool)(?=\n)",  # a turn's role, which follows a control token
        r"(?<=[</])tools(?=>)",
        rf'(?<=")(?:{"|".join(SCHEMA_WORDS)})(?=")',  # the fixed words of tool descriptions
        r" \p{Ll}+",  # a word after a space
        r" ?\p{Lu}\p{Ll}+",  # a capitalised word
        r" ?\p{L}",  # any other letter stands alone: words in quotes and words in capitals are spelled out
        r"\p{N}",
        r" ?[^\s\p{L}\p{N}]+",
        r"\n+",
        r"\s+(?!\S)",
        r"\s+",
    )
)
"""How text is cut before merging: letters of quoted words, and digits, never merge, so that a small model can spell."""


def train_tokenizer(*, vocab_size: int, num_samples: int, seed: int) -> Tokenizer:
    """A tokenizer of exactly `vocab_size` tokens, control and text tokens first; any UTF-8 text round-trips."""
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[*CONTROL_TOKENS, *TEXT_TOKENS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_texts(num_samples, seed), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BEGIN} $A", pair=f"{BEGIN} $A {BEGIN} $B", special_tokens=[(BEGIN, tokenizer.token_to_id(BEGIN))]
    )
    return _with_text_tokens_kept(tokenizer)


def _with_text_tokens_kept(tokenizer: Tokenizer) -> Tokenizer:
    """The same tokenizer with only the control tokens special; the trainer marks everything given to it as such."""
    content = json.loads(tokenizer.to_str())
    for token in content["added_tokens"]:
        token["special"] = token["content"] in CONTROL_TOKENS
    return Tokenizer.from_str(json.dumps(content))


def _texts(num_samples: int, seed: int) -> Iterator[str]:
    """The text between added tokens, which merges must not cross, and all letters after a space."""
    added = re.compile("|".join(map(re.escape, (*CONTROL_TOKENS, *TEXT_TOKENS))))
    for sample in itertools.islice(training_samples(seed=seed), num_samples):
        yield from added.split("".join(span.text for span in render(sample)))
    yield from itertools.repeat(" " + " ".join(string.ascii_letters), num_samples)


def tokenizer_config(max_length: int) -> dict[str, object]:
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BEGIN,
        "eos_token": END,
        "pad_token": PAD,
        "clean_up_tokenization_spaces": False,
        "model_max_length": max_length,
        "chat_template": CHAT_TEMPLATE,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--output", type=Path, required=True, help="folder for tokenizer.json and tokenizer_config.json"
    )
    parser.add_argument("--vocab-size", type=int, default=1024)
    parser.add_argument("--num-samples", type=int, default=40_000)
    parser.add_argument("--max-length", type=int, default=2048, help="model_max_length, in tokens")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    tokenizer = train_tokenizer(vocab_size=options.vocab_size, num_samples=options.num_samples, seed=options.seed)
    options.output.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(options.output / "tokenizer.json"))
    text = json.dumps(tokenizer_config(options.max_length), indent=2, ensure_ascii=False)
    (options.output / "tokenizer_config.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
