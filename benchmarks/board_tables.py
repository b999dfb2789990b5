"""The tables of docs/devices.md that are extrapolated, each figure with how far it may be off.

Knows how `benchmarks.boards` reckons and how it is written down; reckons nothing itself.
"""

from benchmarks.boards import (
    COMPUTING,
    EDGES,
    REACHED,
    ROOMS,
    STEPPING,
    Cases,
    Edge,
    Found,
    Spread,
    beyond,
    efficiency,
    fitting,
    kept_factor,
    memory,
    memory_shares,
    product_shares,
    seconds,
    seconds_here,
    seconds_shares,
    working,
)
from benchmarks.shapes import FLOAT32
from benchmarks.tables import short, size, table
from isthmus.planning.machines import BOARDS, DESKTOP, HEADLESS, PHONE, Board

NAMED = ["model", "cut", "batch", "dtype"]


def tables(found: Found, cases: Cases) -> dict[str, str]:
    """What is extrapolated, and how near the same comes to the measured `cases`, by the tables' names."""
    memories, times = Spread.over(memory_shares(found, cases)), Spread.over(seconds_shares(found, cases))
    return {
        "fits": f"{_fits(found, memories)}\n\n{_reading(found, cases)}",
        "checks": _checks(found, cases),
        "ends": _ends(found, memories),
        "factors": _factors(found, cases),
        "boards": _boards(),
        "board-seconds": _board_seconds(found, memories, times.times(product_shares(found, cases))),
    }


def _named(edge: Edge) -> list[str]:
    dtype = "float32" if edge.value == FLOAT32 else "bfloat16"
    return [edge.shape.name, edge.cut, f"{edge.rows} x {edge.tokens}, loss on {edge.lossy}", dtype]


def _fits(found: Found, spread: Spread) -> str:
    rows = [
        [*_named(edge), spread.around(memory(edge, found), size)]
        + [fitting(edge, room, found, spread) for room in ROOMS.values()]
        for edge in EDGES
    ]
    heading = [*NAMED, "takes, extrapolated", *(f"{name}: {size(room)} left" for name, room in ROOMS.items())]
    return table(heading, rows)


def _reading(found: Found, cases: Cases) -> str:
    most = max(found[name][STEPPING].value for name in cases) * 1e6
    memories, times = memory_shares(found, cases), seconds_shares(found, cases)
    product = product_shares(found, cases)
    lines = {
        "Extrapolated": f"no board was tried. Edges of up to {size(most)} that were measured on the machine below took "
        f"{_between(Spread.over(memories))} of the memory that the same arithmetic gives for them, and in float32 "
        f"{_between(Spread.over(times))} of the seconds ([row by row](#how-far-the-extrapolation-is-off)). Brackets "
        f"are these shares of the figure before them; those of [seconds](#extrapolated-seconds-on-boards) are "
        f"multiplied by {_between(product)} as well, what a matrix product was of its best.",
        "Brackets cover what was measured and no more": "of these edges, each left out once, one lay up to "
        f"{short(beyond(memories))} times further out in memory than all others, and {short(beyond(times))} times in "
        "seconds. What is larger than any of them may be further off.",
        "Left": "the memory less what the operating system keeps for itself, which is assumed: "
        f"{size(HEADLESS)} without a desktop, {size(DESKTOP)} with one, {size(PHONE)} on a phone.",
        "Too close to tell": "what is left lies within the brackets.",
    }
    return "\n".join(f"- **{claim}**: {said}" for claim, said in lines.items())


def _between(spread: Spread) -> str:
    return f"{short(spread.low)} to {short(spread.high)}"


def _checks(found: Found, cases: Cases) -> str:
    rows = []
    for name, edge in cases.items():
        taken, spent = memory(edge, found) / 1e6, seconds_here(edge, found)
        peak, computing = found[name][STEPPING], found[name][COMPUTING]
        share = f"{short(computing.value / spent)} ({_between(Spread.of(computing, spent))})"
        memories = [short(taken), short(peak.value), short(peak.value / taken)]
        rows.append([*_named(edge), *memories, short(spent), computing.bare, share])
    heading = [*NAMED, "memory, extrapolated, MB", "measured, MB", "measured of extrapolated"]
    return table([*heading, "computing, extrapolated, s", "measured, s", "measured of extrapolated"], rows)


def _ends(found: Found, spread: Spread) -> str:
    rows = []
    for edge in EDGES:
        embeddings = edge.shape.embeddings * edge.value
        parts = [embeddings, edge.weights - embeddings, edge.trained, edge.kept * kept_factor(found)]
        whole = spread.around(memory(edge, found), size)
        rows.append([*_named(edge), *map(size, parts), whole, short(edge.flops / 1e12)])
    heading = [*NAMED, "embedding and head", "end blocks", "LoRA and AdamW", "kept for backward"]
    return table([*heading, "whole process, extrapolated", "TFLOP a step"], rows)


def _boards() -> str:
    rows = [
        [board.name, board.cores, short(board.peak / 1e9), size(board.memory), size(board.room), board.source]
        for board in BOARDS
    ]
    return table(["board", "computing", "peak, GFLOP/s", "memory", "left for an edge (assumed)", "source"], rows)


def _board_seconds(found: Found, memories: Spread, times: Spread) -> str:
    said = {"fits": "", "no": "does not fit", "too close to tell": "may not fit: "}

    def cell(edge: Edge, board: Board) -> str:
        fits = fitting(edge, board.room, found, memories)
        return said[fits] + ("" if fits == "no" else times.around(seconds(edge, board, found), short))

    rows = [[*_named(edge), *(cell(edge, board) for board in BOARDS)] for edge in EDGES]
    return table([*NAMED, *(f"{board.name}, s" for board in BOARDS)], rows)


def _factors(found: Found, cases: Cases) -> str:
    rows = [
        ["kept for backward, of the formula", short(kept_factor(found))],
        ["working memory beside imports and tensors", size(working(found))],
        ["a step's speed, of a matrix product's best", short(efficiency(found))],
        ["a matrix product's speed, of its best", _between(product_shares(found, cases))],
        ["a matrix product's speed, of a board's peak (assumed)", short(REACHED)],
    ]
    return table(["factor", "value"], rows)
