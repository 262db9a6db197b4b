"""What pages of keys and values are known by: a chain of hashes over a request's tokens, page by page."""

import hashlib
from array import array
from collections.abc import Callable, Sequence

from jax_engine.lora_request import LoRARequest

Digest = Callable[[bytes], bytes]  # of fixed length


def sha256(data: bytes) -> bytes:
    """The cryptographic hash: nobody can make two contents that are taken for one another."""
    return hashlib.sha256(data).digest()


def digest_function(algorithm: str) -> Digest:
    """What pages are known by, of `config.HASH_ALGORITHMS`.

    "xxhash" is XXH3 of 128 bits: faster, and no protection from someone who makes prompts that collide with another's.
    """
    if algorithm == "sha256":
        return sha256
    import xxhash  # needed by those who ask for it alone

    return xxhash.xxh3_128_digest


def first_hash(salt: str | None, lora: LoRARequest | None, digest: Digest) -> bytes:
    """In place of the hash before the first page's; of fixed length, so that no salt or adapter looks like tokens."""
    hashed = digest(b"" if salt is None else b"salt" + salt.encode("utf-8", "surrogatepass"))
    return hashed if lora is None else digest(b"adapter" + hashed + lora.cache_key)


def chained_hash(before: bytes, tokens: Sequence[int], digest: Digest) -> bytes:
    """The hash of a page of `tokens` behind one whose hash, or `first_hash`, is `before`."""
    return digest(before + array("q", tokens).tobytes())


def prompt_hashes(
    tokens: Sequence[int], page_size: int, *, salt: str | None, lora: LoRARequest | None, digest: Digest
) -> list[bytes]:
    """The hashes of all full pages of a prompt, in order."""
    hashes, last = [], first_hash(salt, lora, digest)
    for start in range(0, len(tokens) - page_size + 1, page_size):
        last = chained_hash(last, tokens[start : start + page_size], digest)
        hashes.append(last)
    return hashes
