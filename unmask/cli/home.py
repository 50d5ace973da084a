"""`unmask home ...`: the folder UNMASK_HOME, and its caches."""

from cyclopts import App

from unmask.cli.options import AsJson
from unmask.terminal import print_table, say

home = App(name="home", help="Show what UNMASK_HOME holds, and empty its caches.")


@home.default
def list_folders(*, as_json: AsJson = False) -> int:
    """List the folders in UNMASK_HOME with their sizes."""
    from unmask.home import HOME_FOLDERS, folder_bytes
    from unmask.home import home as home_folder

    root = home_folder()
    rows = []
    for folder in HOME_FOLDERS:
        size = folder_bytes(root / folder.name)
        if as_json:
            rows.append((folder.name, size, folder.is_cache, folder.content))
        else:
            rows.append((folder.name, f"{size / 1e6:,.1f} MB", "yes" if folder.is_cache else "no", folder.content))
    headings = ("folder", "bytes" if as_json else "size", "cache", "content")
    print_table(headings, rows, right=("size",), as_json=as_json)
    say(f"in {root}; 'unmask home prune' empties caches")
    return 0


@home.command
def prune(*folders: str) -> int:
    """Remove caches, which later commands make again. Do not do that while a command is running.

    Parameters
    ----------
    folders
        Names of caches. Default: prepacked, precision.
    """
    from unmask.disk import storage_errors
    from unmask.errors import UsageError
    from unmask.home import HOME_FOLDERS, folder_bytes, remove_folder
    from unmask.home import home as home_folder

    caches = [folder.name for folder in HOME_FOLDERS if folder.is_cache]
    chosen = folders or ("prepacked", "precision")
    if unknown := [name for name in chosen if name not in caches]:
        raise UsageError(f"{unknown[0]!r} is no cache in UNMASK_HOME; there are {', '.join(caches)}")
    for name in chosen:
        folder = home_folder() / name
        size = folder_bytes(folder)
        with storage_errors(str(folder), action="remove"):
            remove_folder(folder)
        say(f"{name}: {size / 1e6:,.1f} MB removed")
    return 0
