"""An engine on Ray in a process of its own; prints what a test asks as one line of JSON.

Run as `python -m tests.on_ray.spread MODEL sticky|scale`.
"""

import json
import sys
import threading
import time
from dataclasses import asdict
from pathlib import Path

import torch

from cloud_node.config import ServeConfig
from cloud_node.engine import Opening
from cloud_node.engines import build_engine
from isthmus.cut import Cut
from isthmus.rows import Rows

CUT, WIDTH = Cut(1, 1), 32
SCALED_WITHIN_S = 150.0


def hidden(tokens: int) -> torch.Tensor:
    return torch.randn(tokens, WIDTH, generator=torch.Generator().manual_seed(0))


def forward(engine, session: str, tokens: int = 8) -> torch.Tensor:  # type: ignore[no-untyped-def]
    return engine.forward(session, 1, hidden(tokens), Rows((tokens,), (0,)), keep=False).tensor_KD


def stages_of(engine, session: str) -> list[int]:  # type: ignore[no-untyped-def]
    import ray

    return ray.get([stage.pid.remote() for stage in engine._sessions[session].chain.stages])


def sticky(engine) -> dict[str, object]:  # type: ignore[no-untyped-def]
    """Where six sessions are, after one request each and after five more."""
    names = [f"session-{number}" for number in range(6)]
    for name in names:
        engine.open(name, Opening(CUT, tenant=name))
        forward(engine, name)
    first = {name: stages_of(engine, name) for name in names}
    for _ in range(5):
        for name in names:
            forward(engine, name)
    again = {name: stages_of(engine, name) for name in names}
    for name in names:
        engine.close(name)
    time.sleep(5)
    return {"first": first, "again": again, "load": asdict(engine.load())}


def scale(engine) -> dict[str, object]:  # type: ignore[no-untyped-def]
    """How many replicas there are before much waits, and while it does; where a new session then is."""
    before = engine._cluster.replicas()
    engine.open("old", Opening(CUT, alone=True))  # its requests are not joined: the more of them wait
    forward(engine, "old")
    over = threading.Event()

    def ask() -> None:
        while not over.is_set():
            forward(engine, "old", 1500)

    threads = [threading.Thread(target=ask) for _ in range(16)]
    for thread in threads:
        thread.start()
    until = time.monotonic() + SCALED_WITHIN_S
    while engine._cluster.replicas() < 2 and time.monotonic() < until:
        time.sleep(0.5)
    during = engine._cluster.replicas()
    old = stages_of(engine, "old")
    others = []
    for number in range(3):
        engine.open(f"new-{number}", Opening(CUT))
        forward(engine, f"new-{number}")
        others.append(stages_of(engine, f"new-{number}"))
    over.set()
    for thread in threads:
        thread.join()
    return {"before": before, "during": during, "old": old, "stayed": stages_of(engine, "old"), "others": others}


def main() -> None:
    model, what = Path(sys.argv[1]), sys.argv[2]
    replicas = {"sticky": "2:2", "scale": "1:2"}[what]
    given = {"model": str(model), "cut": [str(CUT)], "engine": "ray", "stages": 2, "replicas": replicas, "threads": 1}
    engine = build_engine(ServeConfig.model_validate(given), model)
    print("FOUND", json.dumps({"sticky": sticky, "scale": scale}[what](engine)), flush=True)  # noqa: T201
    engine.stop()


if __name__ == "__main__":
    main()
