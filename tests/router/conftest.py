"""The small model of `tests/api`, for servers whose catalogue changes."""

from tests.api.conftest import encoder, tiny_llama

__all__ = ["encoder", "tiny_llama"]
