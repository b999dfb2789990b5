"""Two network namespaces joined by a cable, and what the kernel counts in each.

Knows `unshare`, `nsenter`, `ip` and /proc; knows nothing of models or ledgers. A namespace lives as long as the process
that holds it, and that process ends when its input does: so whatever becomes of the tests, nothing stays.
"""

import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

EDGE_ADDRESS, CLOUD_ADDRESS = "10.77.0.1", "10.77.0.2"
TOOLS = ("unshare", "nsenter", "ip", "tc")
SEGMENTS = 1
"""Segments in one packet as the kernel hands it on: with 1, packets are counted as a cable would carry them."""


@dataclass(frozen=True)
class Counted:
    """What an end of the cable has sent so far.

    Attributes:
        bytes: with Ethernet's headers, by the interface's counter.
        packets: by the same.
        retransmitted: TCP segments that the kernel sent again; they are in `bytes` and `packets`.
        opened: TCP connections that this end began.
    """

    bytes: int
    packets: int
    retransmitted: int
    opened: int

    def __sub__(self, before: "Counted") -> "Counted":
        return Counted(*(now - then for now, then in zip(vars(self).values(), vars(before).values(), strict=True)))


@dataclass(frozen=True)
class Namespace:
    """A network namespace, held by the process of this number; `interface` is its end of a cable."""

    holder: int
    interface: str
    address: str

    @property
    def enter(self) -> tuple[str, ...]:
        """What to put before a command that shall run in here."""
        return ("nsenter", f"--net=/proc/{self.holder}/ns/net")

    def do(self, *command: str) -> None:
        """Run a command in here to its end; a failure raises with what it said."""
        done = subprocess.run([*self.enter, *command], capture_output=True, text=True, timeout=30)
        assert done.returncode == 0, f"{' '.join(command)}: {done.stderr}"

    def sent(self) -> Counted:
        """What the kernel counts now, once nothing has been on its way for a while."""
        found = self._sent()
        while True:
            time.sleep(0.3)
            before, found = found, self._sent()
            if found == before:
                return found

    def _sent(self) -> Counted:
        tcp = self._tcp()
        figures = self._line_of_interface().split()
        return Counted(int(figures[8]), int(figures[9]), tcp["RetransSegs"], tcp["ActiveOpens"])

    def _line_of_interface(self) -> str:
        lines = Path(f"/proc/{self.holder}/net/dev").read_text().splitlines()
        (line,) = (line for line in lines if line.strip().startswith(f"{self.interface}:"))
        return line.partition(":")[2]

    def _tcp(self) -> dict[str, int]:
        lines = Path(f"/proc/{self.holder}/net/snmp").read_text().splitlines()
        names, values = (line.split()[1:] for line in lines if line.startswith("Tcp:"))
        return dict(zip(names, map(int, values), strict=True))


def missing() -> str | None:
    """Why namespaces cannot be joined here; None where they can."""
    absent = [tool for tool in TOOLS if shutil.which(tool) is None]
    if absent:
        return f"{', '.join(absent)} of util-linux and iproute2 not installed"
    tried = subprocess.run(["unshare", "--net", "ip", "link", "set", "lo", "up"], capture_output=True, text=True)  # noqa: S607
    return None if tried.returncode == 0 else f"no network namespace may be made: {tried.stderr.strip()}"


@contextmanager
def joined() -> Iterator[tuple[Namespace, Namespace]]:
    """The edge's namespace and the cloud's, joined by a cable without segmentation offload, while in here."""
    with ExitStack() as held:
        edge = Namespace(held.enter_context(_held()), "to-cloud", EDGE_ADDRESS)
        cloud = Namespace(held.enter_context(_held()), "to-edge", CLOUD_ADDRESS)
        join(edge, cloud)
        yield edge, cloud


def join(one: Namespace, other: Namespace) -> None:
    """Lay a cable between two namespaces, and bring both of its ends up."""
    for each in (one, other):
        # Its own advertisements would cross the cable and be nobody's.
        each.do("sh", "-c", "echo 1 > /proc/sys/net/ipv6/conf/default/disable_ipv6")
    ends = [("name", each.interface, "netns", str(each.holder)) for each in (one, other)]
    one.do("ip", "link", "add", *ends[0], "type", "veth", "peer", *ends[1])
    for each in (one, other):
        each.do("ip", "link", "set", each.interface, "gso_max_segs", str(SEGMENTS), "up")
        each.do("ip", "address", "add", f"{each.address}/24", "dev", each.interface)


@contextmanager
def _held() -> Iterator[int]:
    """The number of a process that holds a namespace of its own."""
    command = ["unshare", "--net", "sh", "-c", "echo held; exec cat"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        try:
            yield holder.pid
        finally:
            holder.kill()
