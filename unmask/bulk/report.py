"""Progress and result of a bulk job."""

from dataclasses import dataclass

from unmask.encoder.prompts import Prompt


@dataclass(frozen=True)
class Tally:
    """Counts: rows, tokens of them as encoded, texts that were cut to fit, rows without a vector."""

    rows: int = 0
    tokens: int = 0
    truncated: int = 0
    empty: int = 0

    def plus(self, prompts: list[Prompt | None]) -> "Tally":
        """Return these counts plus the counts of one row per prompt."""
        encoded = [prompt for prompt in prompts if prompt is not None]
        return self.plus_tally(
            Tally(
                rows=len(prompts),
                tokens=sum(len(prompt.ids) for prompt in encoded),
                truncated=sum(prompt.truncated for prompt in encoded),
                empty=len(prompts) - len(encoded),
            )
        )

    def plus_tally(self, other: "Tally") -> "Tally":
        """Return the sums of these counts and others."""
        return Tally(
            self.rows + other.rows,
            self.tokens + other.tokens,
            self.truncated + other.truncated,
            self.empty + other.empty,
        )


@dataclass(frozen=True)
class Activity:
    """Processes that encode a job, and their work.

    Attributes:
        workers: processes that are encoding now.
        redone: pieces of work that had to be given out again since the job began.
        worker_seconds: sum of the times that processes were held for the job: the time that a cloud bills.
    """

    workers: int = 1
    redone: int = 0
    worker_seconds: float = 0.0


@dataclass(frozen=True)
class EncodeProgress:
    """State of a running job.

    Attributes:
        rows: rows of the output that are done.
        total: rows of the input; None if it is a stream, or several files.
        tokens: tokens encoded by this run.
        seconds: time since the first text was read.
        activity: workers that are encoding.
    """

    rows: int
    total: int | None
    tokens: int
    seconds: float
    activity: Activity = Activity()


@dataclass(frozen=True)
class EncodeReport(Tally):
    """Result of a job. The counts cover the whole output, whichever run made its rows.

    Attributes:
        seconds: of this run alone, loading included.
        resumed_at: rows that an earlier run had already encoded.
        precision: of the model, in the words of `Encoder.precision`.
        left_out: files of the input folders that hold no table, by name.
        processors: kinds of processors that made the vectors, told apart by the vectors of a few texts; 0 where this
            is not recorded. Float32 vectors of two kinds may differ in their last bits.
        worker_seconds: time that processes were there for this run, loading included, all together.
        redone: pieces of work that had to be given out again, because a worker was lost or late.
    """

    seconds: float = 0.0
    resumed_at: int = 0
    precision: str = ""
    left_out: tuple[str, ...] = ()
    processors: int = 0
    worker_seconds: float = 0.0
    redone: int = 0
