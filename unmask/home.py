"""`UNMASK_HOME`: the folder for models, caches and databases."""

import os
import shutil
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class HomeFolder:
    """A folder in UNMASK_HOME.

    Attributes:
        name: of the folder.
        content: what it holds, in a few words.
        is_cache: True if a later command makes its content again by itself.
    """

    name: str
    content: str
    is_cache: bool = False


HOME_FOLDERS = (
    HomeFolder("models", "downloaded weights"),
    HomeFolder("prepacked", "weights as the compiled kernels read them, for fast starts", is_cache=True),
    HomeFolder("precision", "the precision of each model that was measured here", is_cache=True),
    HomeFolder("kernels", "compiled kernels", is_cache=True),
    HomeFolder("vectors", "vectors of evaluations and teachers", is_cache=True),
    HomeFolder("words", "word states of evaluations", is_cache=True),
    HomeFolder("conformance", "right and wrong vectors of the canary texts", is_cache=True),
    HomeFolder("onboarding", "raw files of the gates, which measurements name"),
    HomeFolder("accounts", "accounts and the operator's part of the catalogue"),
)


def home() -> Path:
    """Return the folder that holds models, caches and databases: UNMASK_HOME, else the platform's user data folder.

    Calling this does not create the folder.
    """
    chosen = os.environ.get("UNMASK_HOME")
    if chosen:
        return Path(chosen).expanduser().absolute()
    import platformdirs

    return Path(platformdirs.user_data_dir("unmask", appauthor=False))


def folder_bytes(folder: Path) -> int:
    """Return the number of bytes of all files in a folder and those below it; 0 if there is no such folder."""
    return sum(file.lstat().st_size for file in folder.rglob("*") if not file.is_dir())


def remove_folder(folder: Path) -> None:
    """Remove a folder of UNMASK_HOME with all that is in it. Raises OSError."""
    if folder.is_dir():
        shutil.rmtree(folder)
