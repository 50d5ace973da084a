"""Everything that unmask raises on purpose.

UnmaskError
├── UsageError                 an argument, option or file name is wrong
├── CheckpointError            a model's files cannot be used
│   ├── ModelNotFound
│   ├── UnsupportedArchitecture
│   └── AdapterMismatch
├── InputError                 a text cannot be encoded
│   ├── EmptyText
│   ├── TextTooLong
│   └── InstructionTooLong
├── EngineError                the model is fine, but not now
│   ├── Overloaded             carries retry_after, in seconds
│   ├── ModelLoading           carries retry_after, in seconds
│   ├── DeadlineExceeded
│   └── EngineStopped
├── TrainingError              a run cannot go on: the loss is not a number, memory is out
└── StorageError               the disk is full or cannot be written

Each message names the thing, the value seen and what to do. The command line prints it as one line; the API
maps the class to a status in `unmask.api.errors`, and nowhere else.
"""


class UnmaskError(Exception):
    """Root of the tree. `str(error)` is one sentence meant for a person."""


class UsageError(UnmaskError):
    """An argument, an option or a file name is wrong."""


class CheckpointError(UnmaskError):
    """The files of a model or adapter cannot be used."""


class ModelNotFound(CheckpointError):
    """No model is known, stored or downloadable under the given name."""


class UnsupportedArchitecture(CheckpointError):
    """The checkpoint is sound, but no code here can run it."""


class AdapterMismatch(CheckpointError):
    """An adapter does not fit the model it was to be merged into."""


class InputError(UnmaskError, ValueError):
    """A text cannot be encoded. `index` is its position in the call, where there is one."""

    def __init__(self, message: str, index: int | None = None) -> None:
        super().__init__(message)
        self.index = index


class EmptyText(InputError):
    """The text has no token of its own, so there is nothing to average."""


class TextTooLong(InputError):
    """The text does not fit the model's maximum length and truncation was not asked for."""


class InstructionTooLong(InputError):
    """The instruction alone fills the model's maximum length."""


class EngineError(UnmaskError):
    """The request was sound; the engine could not serve it now."""


class Overloaded(EngineError):
    """Admitting the request would break somebody's deadline. Try again after `retry_after` seconds."""

    def __init__(self, message: str, retry_after: float) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class ModelLoading(EngineError):
    """The model is being read from disk. Try again after `retry_after` seconds."""

    def __init__(self, message: str, retry_after: float) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class DeadlineExceeded(EngineError):
    """The caller's deadline passed before its vectors were ready."""


class EngineStopped(EngineError):
    """The engine is shutting down."""


class TrainingError(UnmaskError):
    """A training run cannot go on. What it had learnt up to its last checkpoint is kept."""


class StorageError(UnmaskError):
    """Something could not be written: no space, no permission."""
