"""Which adapter a request uses; vLLM's object and names."""

import msgspec

MAX_ADAPTER_ID = 2**31 - 1


class LoRARequest(msgspec.Struct, array_like=True, frozen=True):
    """An adapter: its name, the caller's number for it, and its folder, in PEFT's layout (`demo:NAME` is one of the
    built-in model's).

    All three together identify it: whoever changes the files of a folder gives them another name or number.

    Raises:
        ValueError: a field of another type, an empty one, or a number out of range.
    """

    lora_name: str
    lora_int_id: int
    lora_path: str

    def __post_init__(self) -> None:
        for field in ("lora_name", "lora_path"):
            value = self.lora_path if field == "lora_path" else self.lora_name
            if not isinstance(value, str) or not value:
                raise ValueError(f"{field}={value!r} must be a non-empty string")
        number: object = self.lora_int_id
        if not isinstance(number, int) or isinstance(number, bool) or not 1 <= number <= MAX_ADAPTER_ID:
            raise ValueError(f"lora_int_id={number!r} must be a whole number from 1 to {MAX_ADAPTER_ID}")

    @property
    def cache_key(self) -> bytes:
        """What keeps its prefixes apart from those of others in the prefix cache."""
        return msgspec.msgpack.encode((self.lora_name, self.lora_int_id, self.lora_path))


def split_module(module: str) -> tuple[str, str]:
    """Name and folder of an entry of `lora_modules`; ValueError when it is not NAME=PATH."""
    name, _, path = str(module).partition("=")
    if not name or not path:
        raise ValueError(f"lora_modules={module!r} must be NAME=PATH, such as shout=demo:shout")
    return name, path
