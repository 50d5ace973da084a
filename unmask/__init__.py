"""unmask: turn a decoder-only LLM into a text encoder, and serve its vectors.

>>> from unmask import Encoder
>>> encoder = Encoder.load("unmask/smollm2-135m-embed")
>>> encoder.encode(["a text", "another"]).shape
(2, 576)
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["Encoder", "UnmaskError", "__version__"]

if TYPE_CHECKING:
    from unmask.encoder import Encoder
    from unmask.errors import UnmaskError

_LAZY = {"Encoder": "unmask.encoder", "UnmaskError": "unmask.errors"}


def __getattr__(name: str) -> Any:
    # torch takes seconds to import; `unmask --help` must not pay for it.
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'unmask' has no attribute {name!r}")
