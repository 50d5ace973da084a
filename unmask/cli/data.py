"""`unmask data ...`: evaluation data from public sources."""

import sys
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import App, Parameter

from unmask.terminal import print_result, print_table, say

data = App(name="data", help="Fetch public evaluation data.")


@data.command
def fetch(
    suite: Literal["local"] = "local",
    /,
    *,
    output: Annotated[Path, Parameter(name=["--output", "-o"])],
    source: Path | None = None,
    yes: Annotated[bool, Parameter(name=["--yes", "-y"])] = False,
) -> int:
    """Build the folder that `unmask evaluate --data` reads, from data sets and repositories at pinned revisions.

    Licences and sizes are shown first, and nothing is downloaded without consent. Run again, the command fetches only
    the files that are missing.

    Parameters
    ----------
    suite
        Suite to fetch the data of.
    output
        Folder to write.
    source
        Folder to read instead of the network, with data sets and repositories by name (mteb/sts12-sts/...).
    yes
        Do not ask.
    """
    from unmask.errors import UsageError
    from unmask.evaluate.local.public_data import PUBLIC_CORPORA, TASKS_NOT_FETCHED, fetch_public_data

    rows = [
        (", ".join(corpus.tasks), corpus.origin, f"{corpus.kilobytes:,} kB", corpus.licence)
        for corpus in PUBLIC_CORPORA
    ]
    print_table(("task", "source", "size", "licence"), rows, right=("size",))
    if not yes:
        if sys.stdin is None or not sys.stdin.isatty():
            raise UsageError("nothing was fetched: nobody is there to ask; agree to the licences with --yes")
        say(f"Fetch {sum(corpus.kilobytes for corpus in PUBLIC_CORPORA) / 1000:.1f} MB under these licences? [y/N]")
        if sys.stdin.readline().strip().lower() not in ("y", "yes"):
            raise UsageError("nothing was fetched")
    measured = fetch_public_data(
        output, source=source, progress=lambda corpus: say(f"fetching {corpus.origin} for {', '.join(corpus.tasks)}")
    )
    fetched = [task for corpus in PUBLIC_CORPORA for task in corpus.tasks]
    for task in fetched:
        if task not in measured:
            say(f"{task}: not row by row the data of our published figures; expect other last digits")
    say(f"{len(TASKS_NOT_FETCHED)} tasks of the suite {suite!r} have no public source with the same rows:")
    for task, reason in TASKS_NOT_FETCHED.items():
        say(f"  {task}: {reason}")
    tasks = " ".join(f"--task {task}" for task in fetched)
    print_result(f"unmask evaluate --data {output} {tasks}")
    return 0
