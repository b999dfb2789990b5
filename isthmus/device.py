"""What a process computes on, and what the bits of its results depend on.

Knows torch's devices and versions; knows no settings and no command.
"""

from importlib.metadata import version

import torch

from isthmus import __version__
from isthmus.errors import UsageError


def runtime(device: str) -> str:
    """What the bits of a computation depend on in this process, beside its inputs: versions, device, threads."""
    versions = f"isthmus {__version__}, torch {torch.__version__}, transformers {version('transformers')}"
    return f"{versions}, {device}, {torch.get_num_threads()} threads"


def pick_device(name: str) -> torch.device:
    """`auto` is CUDA where there is one, else the CPU.

    Raises:
        UsageError: no such device here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError):
        raise UsageError(f"no device {name!r} here; use auto, cpu or cuda") from None
    return device
