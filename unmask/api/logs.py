"""Log lines: JSON to stderr, readable ones where stderr is a terminal, and never a secret."""

import logging
import re
import sys
from collections.abc import Sequence

import structlog
from structlog.typing import EventDict, WrappedLogger

_SECRETS = re.compile(
    r"(?i)(?P<before>\bbearer\s+|[?&](?:key|api_?key|access_token)=)[^\s&\"']+|\b(?:sk|gr|um|hf)[-_][\w-]{8,}"
)


class Redaction:
    """A processor that takes out what looks like a key, and the very keys it was given."""

    def __init__(self, keys: Sequence[str] = ()) -> None:
        self._keys = keys

    def __call__(self, logger: WrappedLogger, method: str, event: EventDict) -> EventDict:
        return {name: self._clean(value) if isinstance(value, str) else value for name, value in event.items()}

    def _clean(self, text: str) -> str:
        for key in self._keys:
            text = text.replace(key, "***")
        return _SECRETS.sub(lambda match: f"{match['before'] or ''}***", text)


def configure_logging(level: str, keys: Sequence[str] = ()) -> None:
    """Send structlog's and the standard library's records the same way, through the same redaction.

    Args:
        level: debug, info, warning or error.
        keys: secrets to take out wherever they appear.
    """
    before = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    terminal = sys.stderr.isatty()
    renderer = (
        structlog.dev.ConsoleRenderer(exception_formatter=structlog.dev.plain_traceback)
        if terminal
        else structlog.processors.JSONRenderer()
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=before,
            processors=[
                structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                structlog.processors.format_exc_info,
                Redaction(keys),
                renderer,
            ],
        )
    )
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    # Both narrate their start at this level; the server says what matters itself.
    logging.getLogger("uvicorn.error").setLevel(logging.WARNING)
    logging.getLogger("alembic").setLevel(logging.WARNING)
    logging.getLogger("httpx2").setLevel(logging.WARNING)  # a line for each question to a provider
    structlog.configure(
        processors=[
            structlog.stdlib.filter_by_level,
            *before,
            structlog.stdlib.ProcessorFormatter.wrap_for_formatter,
        ],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=True,
    )
