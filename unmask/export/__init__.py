"""The same vectors in other people's formats, each with its proof: hub folders, ONNX and GGUF files, parity."""

from typing import TYPE_CHECKING

from unmask.exports import lazy_exports

if TYPE_CHECKING:
    from unmask.export.capabilities import ExportVerdict, Target, judge
    from unmask.export.model_card import CardFacts
    from unmask.export.parity import ParityReport, ParityRow
    from unmask.export.run import ExportOptions, run_export, run_parity

__all__ = [
    "CardFacts",
    "ExportOptions",
    "ExportVerdict",
    "ParityReport",
    "ParityRow",
    "Target",
    "judge",
    "run_export",
    "run_parity",
]

__getattr__ = lazy_exports(
    __name__,
    {
        "capabilities": ("Target", "ExportVerdict", "judge"),
        "model_card": ("CardFacts",),
        "parity": ("ParityReport", "ParityRow"),
        "run": ("ExportOptions", "run_export", "run_parity"),
    },
)
