"""`unmask --version`, and with `-v` what decides the speed and the bits of vectors on this machine."""

import platform
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version

from unmask import __version__

VERSION_FLAGS = ("--version", "-V")
_DETAILS = ("-v", "--verbose")
_PACKAGES = ("torch", "transformers", "tokenizers")


def asks_for_details(words: Sequence[str]) -> bool:
    """Return True for the words of `unmask --version -v`, in any order."""
    return len(words) == 2 and any(a in words for a in VERSION_FLAGS) and any(b in words for b in _DETAILS)


def version_details() -> str:
    """Describe versions, the processor, and the precision that `dtype="auto"` chose for each model and why."""
    from unmask.encoder.precision_choices import choices_of_processor, processor_name

    lines = [f"unmask {__version__}", f"python {platform.python_version()}"]
    for package in _PACKAGES:
        try:
            lines.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            lines.append(f"{package} is not installed")
    lines += [f"processor {processor_name()}", "", 'dtype "auto" on this processor:']
    choices = choices_of_processor()
    lines += [f"  {choice.model or 'a model'}: {choice.dtype}. {choice.reason}" for choice in choices]
    if not choices:
        lines.append("  nothing was measured yet: 'unmask models show MODEL' does it")
    return "\n".join(lines)
