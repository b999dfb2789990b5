"""How busy others kept this machine's cores while something was measured.

Knows the kernel's counters of the whole machine and of this process's children; measures nothing else.
"""

import os
import resource
import time
from dataclasses import dataclass
from pathlib import Path

IDLE = (3, 4)
"""Where idle time and waiting for disks stand in a line of /proc/stat."""


@dataclass(frozen=True)
class Cores:
    """A moment: seconds that the cores have worked, that this process and its ended children have, and the clock's."""

    busy: float
    own: float
    clock: float
    cores: int

    @classmethod
    def now(cls) -> "Cores":
        """This moment.

        Raises:
            OSError: the kernel has no /proc/stat.
        """
        first = Path("/proc/stat").read_text(encoding="utf-8").splitlines()[0]
        ticks = [int(count) for count in first.split()[1:9]]
        busy = sum(count for at, count in enumerate(ticks) if at not in IDLE) / os.sysconf("SC_CLK_TCK")
        used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        own = sum(each.ru_utime + each.ru_stime for each in used)
        return cls(busy, own, time.perf_counter(), os.cpu_count() or 1)

    def others_since(self, earlier: "Cores") -> float:
        """Share of the cores' time since `earlier` that others used; never below 0."""
        others = (self.busy - earlier.busy) - (self.own - earlier.own)
        return max(0.0, others / (self.cores * (self.clock - earlier.clock)))
