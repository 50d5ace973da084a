"""Configure logging: JSON lines to stderr, readable lines on a terminal, secrets redacted."""

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
    """A structlog processor that redacts the configured keys and all text that looks like a key."""

    def __init__(self, keys: Sequence[str] = ()) -> None:
        self._keys = keys

    def __call__(self, logger: WrappedLogger, method: str, event: EventDict) -> EventDict:
        return {name: self._clean(value) if isinstance(value, str) else value for name, value in event.items()}

    def _clean(self, text: str) -> str:
        for key in self._keys:
            text = text.replace(key, "***")
        return _SECRETS.sub(lambda match: f"{match['before'] or ''}***", text)


def configure_logging(level: str, keys: Sequence[str] = ()) -> None:
    """Send the records of structlog and of the standard library through the same redaction to stderr.

    Args:
        level: debug, info, warning or error.
        keys: secrets to redact wherever they appear.
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
    # Both log their start at INFO; the server announces itself.
    logging.getLogger("uvicorn.error").setLevel(logging.WARNING)
    logging.getLogger("alembic").setLevel(logging.WARNING)
    logging.getLogger("httpx2").setLevel(logging.WARNING)  # one line for each request to a sign-in provider
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
