"""Charts drawn on the server as SVG, and numbers formatted for people: shared by the report and the web pages."""

from pathlib import Path

TEMPLATES = Path(__file__).parent / "templates"

__all__ = ["TEMPLATES"]
