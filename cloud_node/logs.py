"""How a node's log looks: lines of text, or one JSON object a line.

Knows log records and the fields that they may carry; decides nothing about what is logged.
"""

import json
import logging
import sys
from datetime import UTC, datetime
from typing import Literal

FIELDS = ("session", "step", "microbatch", "pass", "tenant", "error")
"""What a record may carry beside its message, given as `extra`; `error` is a name of the error catalogue."""

OURS = ("isthmus", "cloud_node", "emulator")
"""The packages whose loggers a level is set for; those of libraries stay as they are."""

TEXT = "%(asctime)s %(levelname)s %(name)s: %(message)s"


class JsonLines(logging.Formatter):
    """A record as one JSON object: time (UTC), level, logger, message, those of `FIELDS` that it has, traceback."""

    def format(self, record: logging.LogRecord) -> str:
        """See `logging.Formatter`."""
        line: dict[str, object] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
        }
        line |= {name: getattr(record, name) for name in FIELDS if hasattr(record, name)}
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


def configure(form: Literal["text", "json"], level: Literal["debug", "info", "warning"] = "info") -> None:
    """Send the process's log to standard error: ours from `level` on, that of libraries from INFO on.

    At `debug` there is a line for each request that was answered, at `info` for each that was refused.

    As JSON, warnings go through the log too, and progress bars are off. The lines that gRPC's core writes by itself, of
    handshakes that it refuses, stay text; with GRPC_VERBOSITY=NONE in the environment there are none.
    """
    for name in OURS:
        logging.getLogger(name).setLevel(level.upper())
    if form == "text":
        logging.basicConfig(level=logging.INFO, format=TEXT, stream=sys.stderr)
        return
    from transformers.utils import logging as transformers_logging

    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines())
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    logging.captureWarnings(True)
    transformers_logging.disable_progress_bar()
    transformers_logging.disable_default_handler()
    transformers_logging.enable_propagation()
