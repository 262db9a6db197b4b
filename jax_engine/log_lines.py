"""The form of log lines, the same in every process of an engine: text, or a JSON object a line."""

import json
import logging
import time
from typing import Any

LOG_FORMATS = ("text", "json")


class JSONLines(logging.Formatter):
    """A record as one line of JSON: `time` (UTC), `level`, `logger`, `message`, all that stands in its `fields`, and
    `exception` with the stack where there is one.
    """

    def format(self, record: logging.LogRecord) -> str:
        moment = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line: dict[str, Any] = {
            "time": f"{moment}.{record.msecs:03.0f}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **record.__dict__.get("fields", {}),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


def log_to_stderr(
    log_format: str, *, level: int, text: str = "%(asctime)s %(levelname)s [%(name)s] %(message)s"
) -> None:
    """Have this process log from `level` on, in one of `LOG_FORMATS`; `text` is the line of the first."""
    handler = logging.StreamHandler()
    handler.setFormatter(JSONLines() if log_format == "json" else logging.Formatter(text, "%Y-%m-%d %H:%M:%S"))
    logging.basicConfig(level=level, handlers=[handler])


def log_format() -> str:
    """The format that this process logs in."""
    is_json = any(isinstance(handler.formatter, JSONLines) for handler in logging.getLogger().handlers)
    return "json" if is_json else "text"
