"""`edge_client calibrate`: measure this device, the line to a server and what is behind it, for plans to reckon with.

Knows what is measured and in which order; how each is timed, and the file that it ends in, stand elsewhere.
"""

import os
import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from rich.console import Console

from edge_client.config import TrainConfig
from edge_client.timed_line import Served, time_handling, time_line
from edge_client.timing import time_device
from isthmus.device import pick_device
from isthmus.durable import write_whole
from isthmus.errors import UsageError
from isthmus.load import DTYPES
from isthmus.planning import configurations
from isthmus.planning.calibration import Calibration, Measured
from isthmus.planning.seconds import ASSUMED, Handling
from isthmus.training.progress import meter

Told = Callable[[int, int], None]


def calibrate(
    model: str | None,
    line: TrainConfig | None,
    dtype: str,
    device: str,
    threads: int | None,
    console: Console,
) -> Calibration:
    """Measure what is asked for.

    Args:
        model: directory, `config.json` or name of the model whose blocks are timed here; None: this device is left out.
        line: what opens a session with the server; None: the line is left out.
        dtype: of the ends.
        device: where they run.
        threads: to measure with; None: with one, and with as many as there are.
        console: where progress is shown.

    Raises:
        IsthmusError: whatever stands in the way, each with its remedy.
    """
    if model is None and line is None:
        raise UsageError(
            "there is nothing to measure; give --model DIR for this device, --server HOST:PORT for the line"
        )
    if dtype not in DTYPES:
        raise UsageError(f"--dtype {dtype!r:.40} is none of {', '.join(DTYPES)}")
    speeds, measured = {}, None
    if model is not None:
        configuration = configurations.read(configurations.find(model))
        width = int(configuration.get_text_config().hidden_size)
        measured = Measured(model_type=configuration.model_type, hidden_size=width, dtype=dtype)
        for count in _threads(threads):
            with _shown(console, f"this device, {count} thread{'s' * (count > 1)}") as told:
                speeds[count] = time_device(configuration, DTYPES[dtype], pick_device(device), count, told)
    served = _served(line, threads, console)
    return Calibration(
        schema="isthmus-calibration/1",
        device=_in_words(pick_device(device)),
        memory_bytes=_memory(pick_device(device)),
        model=measured,
        speeds=speeds,
        line=served.line if served is not None else None,
        cloud_speed=served.cloud if served is not None else None,
        handling=served.handling
        if served is not None
        else Handling(request_s=ASSUMED.request_s, byte_s=time_handling(dtype)),
    )


def save(found: Calibration, out: Path) -> None:
    """Write the file, over an older one.

    Raises:
        UsageError: the disk refuses.
    """
    try:
        write_whole(out, found.to_json().encode())
    except OSError as error:
        raise UsageError(f"{out} cannot be written ({error.strerror}); choose another --out") from None


def _served(line: TrainConfig | None, threads: int | None, console: Console) -> Served | None:
    if line is None:
        return None
    if threads is not None:
        torch.set_num_threads(threads)
    with _shown(console, "the line and the server") as told:
        return time_line(line, told)


def _threads(asked: int | None) -> list[int]:
    return [asked] if asked is not None else sorted({1, torch.get_num_threads()})


@contextmanager
def _shown(console: Console, label: str) -> Iterator[Told]:
    with meter(console, label, 100) as progress:
        yield lambda done, whole: progress.update(100 * done // whole)


def _in_words(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores"


def _memory(device: torch.device) -> int | None:
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError):  # not told by this system
        return None
