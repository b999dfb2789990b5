"""`cloud_node serve` whose accounts are metered; what they took is written to a file when it ends.

Knows the command line of a node, before which stands the file's name; serves as any node does.
"""

import json
import sys
from pathlib import Path

from benchmarks.meter import CLOUD, Meter
from cloud_node.cli import main


def serve(out: Path) -> None:
    """Serve until the process is told to end."""
    meter = Meter(CLOUD)
    try:
        main()
    finally:
        out.write_text(json.dumps({"processor_s": meter.processor_s, "accounts": meter.taken()}))


if __name__ == "__main__":
    found = Path(sys.argv.pop(1))
    serve(found)
