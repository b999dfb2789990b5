"""`make fuzz`: so many inputs, seeded, thrown at a node, at an edge and at whatever reads a file.

Knows targets and how inputs are shared among them; prints a line for each. What must hold: never a crash, never
more than 64 MiB of growth, always an answer in words.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import typer

from isthmus.trust import certificates
from isthmus.trust.credentials import Credentials
from isthmus.trust.signing import load_private
from tests.faults.training import run_here, settings
from tests.fuzz import edge, files, node
from tests.fuzz.target import GROWTH_BYTES, Memory, Target
from tests.harness import Server, save_tiny_model, serving, write_rows
from tests.offsite.by_hand import make_emulator


class Grounds:
    """A served node, a hostile one, and a good file of every kind."""

    def __init__(self, home: Path, server: Server, hostile: edge.Hostile) -> None:
        self.server = server
        self.node = node.Node(server.address, Credentials.load(home / "certs" / "alice"))
        emulated = home / "emulators" / "half"
        run_here(settings(server, home / "rows.jsonl", steps=2, certs=home / "certs" / "alice"), home / "run")
        places = files.places(home / "site", home / "model", emulated, home / "run", home / "certs" / "alice")
        self._files = [place.target() for place in places]
        self._edge = list(edge.targets(hostile, self.node.card, home))
        self._node = list(node.targets(self.node, emulated))
        # What Python and torch load at first use is not an input's growth.
        for target in self.targets:
            target.attack(20, 1)
        self.memory = {"node": Memory(server.process.pid), "edge": Memory(os.getpid())}

    @property
    def targets(self) -> list[Target]:
        """All of them."""
        return [*self._node, *self._edge, *self._files]

    def shares(self, inputs: int) -> Iterator[tuple[Target, int]]:
        """How many of so many inputs each target gets, one at least."""
        whole = sum(target.share for target in self.targets)
        for target in self.targets:
            yield target, max(1, round(inputs * target.share / whole))

    def check(self) -> None:
        """Whether the node lives, has said nothing untoward and has not grown."""
        assert self.server.process.poll() is None, self.server.log
        assert "Traceback" not in self.server.log, self.server.log[-5000:]
        assert (grown := self.memory["node"].grown()) < GROWTH_BYTES, f"the node grew by {grown >> 20} MiB"


@contextmanager
def grounds(home: Path) -> Iterator[Grounds]:
    """Everything that inputs are thrown at, in a folder, while in here."""
    os.environ["ISTHMUS_CACHE"] = str(home / "cache")
    save_tiny_model(home / "model", "llama")
    write_rows(home / "rows.jsonl")
    certificates.init_authority(home / "certs")
    certificates.issue(home / "certs", "alice")
    signing_key = load_private(home / "certs" / "server" / "signing.key")
    make_emulator(home / "emulators" / "half", home / "model", "1:1", signing_key)
    (home / "signers").mkdir()
    (home / "signers" / "alice.pub").write_bytes((home / "certs" / "authority" / "issued" / "alice.pub").read_bytes())
    taking = ("--submissions", str(home / "submissions"), "--signers", str(home / "signers"))
    flags = ("--cut", "1:1", "--certs", str(home / "certs" / "server"), "--emulators", str(home / "emulators"), *taking)
    hostile = edge.Hostile()
    with serving(home / "model", *flags, cache=home / "node-cache") as server:
        ready = Grounds(home, server, hostile)
        try:
            yield ready
        finally:
            ready.node.close()
            hostile.close()


def main(
    inputs: Annotated[int, typer.Option(min=1, help="How many inputs in all.")] = 100_000,
    seed: Annotated[int, typer.Option(help="The same seed gives the same inputs.")] = 0,
    only: Annotated[str, typer.Option(help="Only targets whose name holds this.")] = "",
) -> None:
    """Throw inputs at everything that a peer or a file can reach."""
    say: Callable[[str], None] = typer.echo
    with TemporaryDirectory() as home, grounds(Path(home)) as ready:
        fed = 0
        for target, count in ready.shares(inputs):
            if only in target.name:
                target.attack(count, seed)
                ready.check()
                fed += count
                say(f"{fed:>7,} of {inputs:,}: {target.name}, {count:,} inputs")
        grown = {side: memory.grown() >> 20 for side, memory in ready.memory.items()}
        say(f"no bad outcome in {fed:,} inputs, seed {seed}; the node grew by {grown['node']} MiB")


if __name__ == "__main__":
    app = typer.Typer(pretty_exceptions_enable=False)
    app.command()(main)
    app()
