"""The small model of `tests/api`, for servers whose catalogue changes."""

from tests.api.conftest import tiny_llama

__all__ = ["tiny_llama"]
