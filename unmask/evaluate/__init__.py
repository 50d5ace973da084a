"""Evaluation of encoders: MTEB, offline suites, word-level tasks, statistics and a report.

The package is callable, because `unmask.evaluate` is both its name and a function of the Python API: see `evaluate`.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from unmask.evaluate.results import Results


def evaluate(
    model: str | Sequence[str],
    *,
    output: str | Path,
    baselines: Sequence[str] = (),
    suites: Sequence[str] = (),
    tasks: Sequence[str] = (),
    data: str | Path | None = None,
) -> "Results":
    """Measure models on tasks, and write results, examples and a report into `output`.

    Args:
        model: one specification or several, as for `unmask evaluate`; the report is about the first.
        output: folder for the results; tasks that it holds already are not computed again.
        baselines: specifications of models to compare with.
        suites, tasks: names of suites and of single tasks; at least one.
        data: folder with the data of local and word-level tasks.

    Raises:
        UsageError: a specification, suite or task is wrong, or a package is missing.
        CheckpointError: a model cannot be loaded.
        StorageError: the output cannot be written.
    """
    from unmask.evaluate.run import Evaluation, run_evaluation

    return run_evaluation(
        Evaluation(
            models=[model] if isinstance(model, str) else list(model),
            baselines=baselines,
            suites=suites,
            tasks=tasks,
            data=None if data is None else Path(data),
            output=Path(output),
        )
    )


class _CallablePackage(ModuleType):
    def __call__(self, *arguments: Any, **options: Any) -> "Results":
        return evaluate(*arguments, **options)


sys.modules[__name__].__class__ = _CallablePackage
