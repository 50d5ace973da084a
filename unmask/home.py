"""`UNMASK_HOME`: the folder for models, caches and databases."""

import os
from pathlib import Path


def home() -> Path:
    """The folder that holds models, caches and databases: UNMASK_HOME, else the platform's user data folder.

    Calling this does not create the folder.
    """
    chosen = os.environ.get("UNMASK_HOME")
    if chosen:
        return Path(chosen).expanduser().absolute()
    import platformdirs

    return Path(platformdirs.user_data_dir("unmask", appauthor=False))
