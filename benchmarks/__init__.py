"""What the split costs: benchmarks, their results by commit and machine, and the page that shows them.

Nothing here is a test: no figure fails a build. `make bench` runs what has no result for the present commit.
"""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before anything here imports what reads it
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
