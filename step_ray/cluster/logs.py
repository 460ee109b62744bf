"""Logs for machines: one JSON object a line, with the ids of run and stage.

Takes what a run would show on a terminal, writes it to stderr. Workers log through the standard
library, and Ray gives their lines the same form and its own ids (`raysetup`); here is the driver.
"""

import json
import logging
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.text import Text

from step_ray.config import RunConfig
from step_ray.progress import Counter, PlainCounter, Reporter

LOGGER = "step_ray"
"""Logger of the package, above those of its modules."""
WARNING_STYLE = "[yellow]"
"""How a Reporter's line shows that something is not as it should be."""
CLIENT_LOGGERS = ("httpx", "httpx2", "httpcore", "httpcore2", "openai")
"""Loggers of HTTP clients, under the names that they have had."""
IDS = ("run", "stage", "task", "episode", "stop_reason")
"""What a line may carry beside its message, as `extra` of a log call."""


class JsonLines(logging.Formatter):
    """A record as Ray's JSON logs have it: asctime, levelname, message, file, process, ids."""

    def format(self, record: logging.LogRecord) -> str:
        """One line, without a line break inside."""
        fields = {
            "asctime": time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(record.created)),
            "levelname": record.levelname,
            "message": record.getMessage(),
            "filename": record.filename,
            "lineno": record.lineno,
            "process": record.process,
            **{name: vars(record)[name] for name in IDS if name in vars(record)},
        }
        if record.exc_info:
            fields["exc_text"] = self.formatException(record.exc_info)
        return json.dumps(fields, ensure_ascii=False)


class JsonReporter(Reporter):
    """Progress as log lines of the driver."""

    def __init__(self, run: str) -> None:
        super().__init__()
        self._run = run
        self._logger = logging.getLogger(LOGGER)

    def line(self, text: str) -> None:
        """One line; yellow ones are warnings."""
        level = logging.WARNING if WARNING_STYLE in text else logging.INFO
        message = " ".join(Text.from_markup(text).plain.split())
        self._logger.log(level, message, extra={"run": self._run, "stage": self.stage})

    @contextmanager
    def counter(self, name: str, total: int | None = None) -> Iterator[Counter]:
        """A line every few seconds."""
        yield PlainCounter(self, name, total)


def reporter_for(config: RunConfig) -> Reporter:
    """How the run of a config shows its progress."""
    if config.ray.log_format == "text":
        return Reporter()
    use_json()
    return JsonReporter(config.name)


def quiet_clients() -> None:
    """Keep the line that HTTP clients log for each request out of logs at level INFO."""
    for name in CLIENT_LOGGERS:
        logging.getLogger(name).setLevel(logging.WARNING)


def use_json() -> None:
    """Let this process log the package's lines as JSON on stderr."""
    quiet_clients()
    logger = logging.getLogger(LOGGER)
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines())
    logger.handlers = [handler]
    logger.setLevel(logging.INFO)
    logger.propagate = False


def tell_error(line: str) -> None:
    """The last line of a command that failed."""
    logger = logging.getLogger(LOGGER)
    if logger.handlers:
        logger.error(line)
    else:
        print(f"step-ray: {line}", file=sys.stderr)
