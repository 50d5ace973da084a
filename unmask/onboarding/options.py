"""`OnboardingOptions`: settings of the gates. This module imports no torch and no database, for the command line."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from unmask.errors import UsageError

DEFAULT_LENGTHS, DEFAULT_CALLERS = (16, 64, 256), (1, 4, 16)


@dataclass(frozen=True, kw_only=True)
class OnboardingOptions:
    """A model to take live, and the settings of its gates. Most fields are options of `unmask onboard`.

    Attributes:
        model: id of the record.
        source: id, folder or file to load the weights from.
        compat: "reference" gives the published LLM2Vec vectors, quirks included. Default: as the record says.
        licence: Licence of the weights, if the record does not know it.
        replace_specification: Correct the record where its specification differs from the weights.
        reference: .npz file with texts and vectors to compare with. Default: compare with transformers.
        suites: Suite to measure quality on, as "unmask evaluate" names it. Repeat it for several. Default: local.
        tasks: Task, to measure less than a suite. Repeat it for several.
        data: Folder with the data of offline tasks.
        lengths: Tokens per text in the sweep of speeds. Repeat it for several.
        callers: Concurrent callers in the sweep. Repeat it for several.
        seconds: Seconds that each point of the sweep takes.
        cost_per_hour: Dollars that the machine costs per hour, to propose a price.
        utilisation: Share of the hours that customers pay for, to propose a price.
        price: Dollars per million tokens, instead of a proposed price.
        stage: Stop before the last step; "unmask catalogue live" takes it.
        command: command of the operator, for the model's page.
        by: Author of the measurements, for the model's page.
        output: folder for the raw files.
    """

    model: str
    source: str
    compat: Literal["default", "reference"] | None = None
    licence: str | None = None
    replace_specification: bool = False
    reference: Path | None = None
    suites: tuple[str, ...] = ()
    tasks: tuple[str, ...] = ()
    data: Path | None = None
    lengths: tuple[int, ...] = DEFAULT_LENGTHS
    callers: tuple[int, ...] = DEFAULT_CALLERS
    seconds: float = 2.0
    cost_per_hour: int | None = None  # nano-dollars, as all money in Python
    utilisation: float = 0.5
    price: int | None = None  # nano-dollars
    stage: bool = False
    command: str = ""
    by: str = "the operator of this server"
    output: Path

    def __post_init__(self) -> None:
        if self.compat not in (None, "default", "reference"):
            raise UsageError(f"compat={self.compat!r}: choose default or reference")
        if not 0 < self.utilisation <= 1:
            raise UsageError(f"--utilisation {self.utilisation:g}: choose more than 0, and 1 at most")
        if not 0 < self.seconds <= 3600:
            raise UsageError(f"--seconds {self.seconds:g}: choose more than 0, and an hour at most")
        for option, counts in (("--length", self.lengths), ("--callers", self.callers)):
            if not counts or min(counts) < 1:
                raise UsageError(f"{option} {', '.join(map(str, counts)) or '(none)'}: choose 1 or more")
        if self.reference is not None and not self.reference.is_file():
            raise UsageError(f"--reference {self.reference} is no file")
