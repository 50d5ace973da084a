"""Vectors that were computed a moment ago, so that the same text costs nothing the second time."""

import hashlib
import threading
from collections import OrderedDict

import numpy as np

from unmask.encoder import Prompt

# Beside a vector's own bytes: its key, the array object and the dictionary's entry.
_ENTRY_BYTES = 300


def key_of(prompt: Prompt) -> bytes:
    """What decides a prompt's raw vector, within one model: its tokens, instruction included, and which are pooled.

    Dimensions and normalisation come after it, so that one entry serves all of them.
    """
    whole = hashlib.blake2b(prompt.ids.tobytes(), digest_size=16)
    whole.update(b"%d:%d" % prompt.pooled)
    return whole.digest()


class RecentVectors:
    """Raw vectors by prompt, the least recently asked for leaving first. Safe for several threads.

    Args:
        limit_bytes: memory for vectors and bookkeeping; 0 keeps nothing.
    """

    def __init__(self, limit_bytes: int) -> None:
        self._limit, self._bytes = limit_bytes, 0
        self._vectors: OrderedDict[bytes, np.ndarray] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: bytes) -> np.ndarray | None:
        """The vector, read-only, or None."""
        with self._lock:
            vector = self._vectors.get(key)
            if vector is not None:
                self._vectors.move_to_end(key)
            return vector

    def put(self, key: bytes, vector: np.ndarray) -> None:
        """Keep a copy, if there is room for it at all."""
        size = vector.nbytes + _ENTRY_BYTES
        if size > self._limit:
            return
        kept = vector.copy()
        kept.flags.writeable = False
        with self._lock:
            before = self._vectors.pop(key, None)
            self._vectors[key] = kept
            self._bytes += size - (0 if before is None else before.nbytes + _ENTRY_BYTES)
            while self._bytes > self._limit:
                _, oldest = self._vectors.popitem(last=False)
                self._bytes -= oldest.nbytes + _ENTRY_BYTES

    def __len__(self) -> int:
        return len(self._vectors)

    @property
    def bytes(self) -> int:
        """Memory in use, by our own count."""
        return self._bytes
