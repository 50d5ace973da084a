"""Reports for people: `report.html`, `report.md` and comparisons, made from results alone."""

from unmask.evaluate.report.comparison import (
    output_file,
    print_comparison,
    print_comparison_json,
    print_drift,
    write_comparison,
)
from unmask.evaluate.report.page import write_report

__all__ = [
    "output_file",
    "print_comparison",
    "print_comparison_json",
    "print_drift",
    "write_comparison",
    "write_report",
]
