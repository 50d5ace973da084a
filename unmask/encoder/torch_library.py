"""`load_torch_library`: torch's largest library, loaded in the background while Python imports other modules.

Linking that library takes a quarter of the time that `import torch` takes, and needs no Python. So a command that will
import torch begins with it.
"""

import ctypes
import importlib.util
import threading
from pathlib import Path

# In torch's own order: the first opens what the second one links to.
_LIBRARIES = {"libtorch_global_deps.so": ctypes.RTLD_GLOBAL, "libtorch_cpu.so": ctypes.RTLD_LOCAL}


def load_torch_library() -> threading.Thread | None:
    """Begin to load torch's library, and return the thread. None where torch is not installed or has no such files.

    An error is left to `import torch`, which names it.
    """
    torch = importlib.util.find_spec("torch")
    if torch is None or not torch.submodule_search_locations:
        return None
    folder = Path(torch.submodule_search_locations[0]) / "lib"
    if not all((folder / name).exists() for name in _LIBRARIES):  # macOS and Windows have other names
        return None

    def load() -> None:
        try:
            for name, mode in _LIBRARIES.items():
                ctypes.CDLL(str(folder / name), mode=mode)  # without the interpreter's lock
        except OSError:
            return

    thread = threading.Thread(target=load, name="unmask-torch-library", daemon=True)
    thread.start()
    return thread
