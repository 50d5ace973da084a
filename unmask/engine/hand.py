"""`Hand`: what an engine gives its packs to. `LocalHand` computes in this process; a replica is in another one.

An engine has a thread per hand. Hands take work from one queue when they are free, so the queue stays fair and nothing
waits at a busy hand.
"""

import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

import numpy as np
import torch

from unmask.encoder import Encoder, Prompt
from unmask.encoder.packing import pack_budget, parallel_packs
from unmask.errors import EngineError

log = logging.getLogger("unmask")

PACK_TOKENS = 16_384

# One forward at a time in this process, whatever the number of models: two at once would slow each other down.
_COMPUTE_LOCK = threading.Lock()

HandState = Literal["ready", "suspect", "starting", "parked"]


@dataclass(frozen=True)
class PackVectors:
    """Outcome of a pack.

    Attributes:
        vectors: float32 [n, dim]; the rows of errors hold nothing of use.
        errors: the error of each prompt that has no vector, by row.
    """

    vectors: np.ndarray
    errors: dict[int, EngineError] = field(default_factory=dict)


class HandLost(Exception):
    """A forward gave no answer: the hand died, or is late and may never answer. Its prompts are for other hands.

    Attributes:
        is_late: true if the hand may still be alive.
    """

    def __init__(self, is_late: bool) -> None:
        super().__init__()
        self.is_late = is_late


class Hand(Protocol):
    """Computes packs, for one thread of an engine.

    Attributes:
        name: place in messages and metrics.
        state: "ready"; "suspect" after a late answer, until its canary is right; "starting"; or "parked" while too few
            tokens wait for it.
        tokens_per_second: speed at its start, if it was measured; None otherwise.
    """

    name: str
    state: HandState
    tokens_per_second: float | None

    def sizes(self, waiting: int) -> tuple[int, int]:
        """Return the number of packs, and the tokens of each, of a forward when `waiting` tokens wait."""
        ...

    def forward(
        self, packs: Sequence[Sequence[Prompt]], limit_s: float, deliver: Callable[[int, PackVectors], None]
    ) -> None:
        """Compute packs, and deliver each with its index.

        Args:
            limit_s: seconds after which the forward counts as late.
            deliver: called from any thread. A late answer that is right after all may be delivered by `restore`.

        Raises:
            HandLost: packs that were not delivered must be computed elsewhere.
        """
        ...

    def restore(self) -> bool:
        """Return true if the hand can compute. Otherwise take a step towards it, of about a second at most."""
        ...

    def check(self) -> None:
        """Begin a check of an idle hand, which `restore` completes."""
        ...

    def park(self) -> None:
        """Free what the hand holds, until `restore` is called again."""
        ...

    def close(self) -> None:
        """End for good."""
        ...


class LocalHand:
    """Computes in this process. It is never late and never lost.

    Args:
        encoder: the loaded model.
        pack_tokens: most tokens of a pack; halved when memory runs out.
    """

    name = "here"
    state: HandState = "ready"
    tokens_per_second: float | None = None

    def __init__(self, encoder: Encoder, pack_tokens: int = PACK_TOKENS) -> None:
        self._encoder, self.pack_tokens = encoder, pack_tokens

    def sizes(self, waiting: int) -> tuple[int, int]:
        """Return number and tokens of packs that end at about the same time on all cores; see `Hand`."""
        device = self._encoder.device
        return parallel_packs(waiting, device), min(self.pack_tokens, pack_budget(waiting, device))

    def forward(
        self, packs: Sequence[Sequence[Prompt]], limit_s: float, deliver: Callable[[int, PackVectors], None]
    ) -> None:
        """Compute packs, several at the same time; see `Hand`."""

        def run(number: int) -> None:
            deliver(number, self._run_pack(packs[number]))

        with _COMPUTE_LOCK:
            self._encoder.map_packs(run, range(len(packs)))

    def _run_pack(self, prompts: Sequence[Prompt]) -> PackVectors:
        """Run one forward. Never raises: the thread must live on for other requests."""
        try:
            vectors = self._encoder.forward_pack(prompts)
        except Exception as error:
            if not _out_of_memory(error) or len(prompts) == 1:
                log.exception("a forward of %d sequences failed", len(prompts))
                failure = EngineError("the model failed on this request")
                empty = np.zeros((len(prompts), self._encoder.dim), dtype=np.float32)
                return PackVectors(empty, dict.fromkeys(range(len(prompts)), failure))
            tokens = sum(len(prompt.ids) for prompt in prompts)
            self.pack_tokens = max(256, min(self.pack_tokens, tokens) // 2)
            log.warning("out of memory: packs are now at most %d tokens", self.pack_tokens)
            half = len(prompts) // 2
            return _joined(self._run_pack(prompts[:half]), self._run_pack(prompts[half:]))
        not_finite = np.flatnonzero(~np.isfinite(vectors).all(axis=1))
        error = EngineError("the model produced a vector that is not finite; its precision may be too low")
        return PackVectors(vectors, {int(row): error for row in not_finite})

    def restore(self) -> bool:
        """Return true: it can always compute."""
        return True

    def check(self) -> None:
        """Do nothing: a process that does not work does not check itself either."""

    def park(self) -> None:
        """Do nothing: the encoder belongs to the caller."""

    def close(self) -> None:
        """Do nothing: the encoder belongs to the caller."""


def _joined(first: PackVectors, second: PackVectors) -> PackVectors:
    later = {len(first.vectors) + row: error for row, error in second.errors.items()}
    return PackVectors(np.concatenate([first.vectors, second.vectors]), first.errors | later)


def _out_of_memory(error: BaseException) -> bool:
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(error)
