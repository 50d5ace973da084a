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
    """Build the folder that `unmask evaluate --data` reads, from data sets of the Hugging Face hub.

    Licences and sizes are shown first, and nothing is downloaded without consent. Run again, the command fetches only
    the files that are missing.

    Parameters
    ----------
    suite
        Suite to fetch the data of.
    output
        Folder to write.
    source
        Folder in the hub's layout (mteb/sts12-sts/...) to read instead of the hub.
    yes
        Do not ask.
    """
    from unmask.errors import UsageError
    from unmask.evaluate.local.public_data import PUBLIC_CORPORA, fetch_public_data, missing_tasks

    rows = [
        (corpus.task, f"{corpus.dataset}@{corpus.revision[:8]}", f"{corpus.kilobytes:,} kB", corpus.licence)
        for corpus in PUBLIC_CORPORA
    ]
    print_table(("task", "data set", "size", "licence"), rows, right=("size",))
    if not yes:
        if not sys.stdin.isatty():
            raise UsageError("nothing was fetched: nobody is there to ask; agree to the licences with --yes")
        say(f"Fetch {sum(corpus.kilobytes for corpus in PUBLIC_CORPORA) / 1000:.1f} MB under these licences? [y/N]")
        if sys.stdin.readline().strip().lower() not in ("y", "yes"):
            raise UsageError("nothing was fetched")
    measured = fetch_public_data(
        output, source=source, progress=lambda corpus: say(f"fetching {corpus.dataset} for {corpus.task}")
    )
    for corpus in PUBLIC_CORPORA:
        if corpus.task not in measured:
            say(f"{corpus.task}: not row by row the data of our published figures; expect other last digits")
    say(f"not on the hub, left out of {suite}: {', '.join(missing_tasks())}")
    tasks = " ".join(f"--task {corpus.task}" for corpus in PUBLIC_CORPORA)
    print_result(f"unmask evaluate --data {output} {tasks}")
    return 0
