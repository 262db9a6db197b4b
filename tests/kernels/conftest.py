"""Random ragged batches for the attention operations."""

from collections.abc import Callable

import pytest
from jaxtyping import Array
from ragged_cases import build_ragged_case


@pytest.fixture(scope="session")
def ragged_case() -> Callable[..., dict[str, Array]]:
    return build_ragged_case
