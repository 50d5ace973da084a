"""The servers of `tests/api`, for the tests of the process around them."""

from tests.api.conftest import service, start, tiny_llama

__all__ = ["service", "start", "tiny_llama"]
