"""`RecentVectors`: a cache of vectors, so that a text that comes again is not computed again."""

import hashlib
import threading
from collections import OrderedDict

import numpy as np

from unmask.encoder import Prompt

# Memory of an entry beside the vector itself: key, array object and dictionary entry.
_ENTRY_BYTES = 300


def cache_key(prompt: Prompt) -> bytes:
    """Hash all that decides a prompt's raw vector within one model: its tokens, and the pooled span.

    Dimensions and normalisation are applied later, so that one entry serves all of them.
    """
    digest = hashlib.blake2b(prompt.ids.tobytes(), digest_size=16)
    digest.update(b"%d:%d" % prompt.pooled)
    return digest.digest()


class RecentVectors:
    """A thread-safe LRU cache of raw vectors by prompt.

    Args:
        limit_bytes: memory for vectors and bookkeeping; 0 stores nothing.
    """

    def __init__(self, limit_bytes: int) -> None:
        self._limit, self._bytes = limit_bytes, 0
        self._vectors: OrderedDict[bytes, np.ndarray] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: bytes) -> np.ndarray | None:
        """Return the vector, read-only, or None."""
        with self._lock:
            vector = self._vectors.get(key)
            if vector is not None:
                self._vectors.move_to_end(key)
            return vector

    def put(self, key: bytes, vector: np.ndarray) -> None:
        """Store a copy, unless it alone is larger than the cache."""
        size = vector.nbytes + _ENTRY_BYTES
        if size > self._limit:
            return
        copy = vector.copy()
        copy.flags.writeable = False
        with self._lock:
            previous = self._vectors.pop(key, None)
            self._vectors[key] = copy
            self._bytes += size - (0 if previous is None else previous.nbytes + _ENTRY_BYTES)
            while self._bytes > self._limit:
                _, oldest = self._vectors.popitem(last=False)
                self._bytes -= oldest.nbytes + _ENTRY_BYTES

    def __len__(self) -> int:
        return len(self._vectors)

    @property
    def bytes(self) -> int:
        """Memory in use, as counted here."""
        return self._bytes
