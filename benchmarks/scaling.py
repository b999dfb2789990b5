"""`python -m benchmarks.scaling`: what many edges that train one large model need, by arithmetic.

Prints the tables of docs/scaling.md, or writes them there with `--write`. Knows which methods and numbers of edges are
shown; the formulas stand in `benchmarks.needs` and `benchmarks.shapes`, all that is assumed in `benchmarks.setting`.
"""

from dataclasses import replace
from typing import Annotated

import typer

from benchmarks.needs import INT8, Method, Need, dlora, kill_revive, side, split, split_again, top
from benchmarks.results import ROOT
from benchmarks.setting import Setting, shown
from benchmarks.shapes import BFLOAT16, LLAMA_70B, Shape
from benchmarks.tables import put, short, size, table

PAGE = ROOT / "docs" / "scaling.md"
SHAPE = LLAMA_70B
EDGES = (1_000, 100_000)
DAY = 86400
INFINITE = float("inf")


def needs(shape: Shape, setting: Setting) -> list[Need]:
    """Of the methods that exist and use the cloud while they train."""
    methods = [split(shape), split_again(shape), top(shape, setting), side(shape, setting), dlora(shape, setting)]
    return [Need(shape, setting, method) for method in (*methods, kill_revive(shape, setting))]


def summary_table(setting: Setting) -> str:
    """What it comes to, method by method."""
    heading = ["edges", "method", "GPUs (H100)", "memory kept for backwards", "up, Gbit/s", "down, Gbit/s"]
    wanted = f"{setting.steps_per_hour:g} steps an hour"
    rows = []
    for edges in EDGES:
        for need in needs(SHAPE, setting):
            kept = size(need.kept_bytes(edges)) if need.kept else "none"
            cells = [f"{setting.gpus * need.replicas(edges):,}", kept, *crossing(need, edges), need.bottleneck]
            rows.append([f"{edges:,}", introduced(need.method), *cells, reached(need)])
        rows.append([f"{edges:,}", *offsite_cells(setting, edges)])
    return table([*heading, "first bottleneck", wanted], rows)


def introduced(method: Method) -> str:
    """What it is called where it is first named: with the flag that asks for it."""
    return f"{method.name} (`{method.flag}`)" if method.flag else method.name


def reached(need: Need) -> str:
    """Whether the wanted rate is."""
    short_of = need.steps_per_hour < need.setting.steps_per_hour
    return f"**not reached: {short(need.steps_per_hour)}**" if short_of else "reached"


def crossing(need: Need, edges: int) -> list[str]:
    """Gbit/s up and down, at the cloud."""
    return [short(8 * need.rate(edges) * each / 1e9) for each in (need.up, need.down)]


def offsite_cells(setting: Setting, edges: int) -> list[str]:
    """The summary's row of Offsite-Tuning: every block is on the edge, and the cloud sends them within a day."""
    need = Need(SHAPE, setting, Method("`offsite`", 0, SHAPE.blocks, 0, 0, 0, 0, trips=0))
    fetched = f"{fetching(edges)}, for a day, once"
    return [need.method.name, "0 while training", "none", "0", fetched, need.bottleneck, reached(need)]


def tokens_table(setting: Setting) -> str:
    """What one token costs."""
    heading = ["method", "cloud, GFLOP a token", "up, kB a token", "down, kB a token", "kept, MB a token"]
    heading += ["for so long, s", "round trips a step", "a step, s", "steps an hour"]
    rows = [
        [
            *(need.method.name, short(need.flops / 1e9), short(need.up / 1e3), short(need.down / 1e3)),
            *(short(need.kept / 1e6), short(need.held), short(need.method.trips), short(need.step)),
            short(need.steps_per_hour),
        ]
        for need in needs(SHAPE, setting)
    ]
    return table(heading, rows)


def replica_table(setting: Setting) -> str:
    """What one replica with one front end carries."""
    heading = ["method", "weights", "room beside them", "computing, tokens/s", "memory, tokens/s"]
    heading += ["front end, tokens/s", "sessions admitted", "first bottleneck"]
    rows = [
        [
            *(need.method.name, size(need.weights), size(need.room)),
            *("no bound" if bound == INFINITE else short(bound) for bound in (*need.capacity.values(), need.sessions)),
            need.bottleneck,
        ]
        for need in needs(SHAPE, setting)
    ]
    return table(heading, rows)


def fleet_table(setting: Setting, edges: int) -> str:
    """What `edges` edges need."""
    heading = ["method", "tokens/s", "replicas", "GPUs", "GPU memory", "front ends"]
    rows = []
    for need in needs(SHAPE, setting):
        replicas = need.replicas(edges)
        counts = [f"{replicas:,}", f"{setting.gpus * replicas:,}", size(need.gpu_bytes(edges))]
        rows.append([need.method.name, short(need.rate(edges)), *counts, f"{need.front_ends(edges):,}"])
    return table(heading, rows)


def levers_table(setting: Setting) -> str:
    """What `split` needs for the most edges when one thing changes."""
    once = split_again(SHAPE)
    changed = {
        "`split` as above": (split(SHAPE), setting),
        "int8 codec": (split(SHAPE), replace(setting, value_bytes=INT8)),
        "8 GPUs a replica": (split(SHAPE), replace(setting, gpus=8)),
        f"weights in 8 bits, {short(INT8)} bytes each": (split(SHAPE), replace(setting, weight_bytes=INT8)),
        "edges on 1 Gbit/s": (split(SHAPE), replace(setting, link=1e9 / 8)),
        "nothing kept": (once, setting),
        "nothing kept, int8 codec": (once, replace(setting, value_bytes=INT8)),
        "nothing kept, batches that reach 0.5 of the peak": (once, replace(setting, utilisation=0.5)),
        "train top, cached": (top(SHAPE, setting), setting),
        "train top, cached, int8 codec": (top(SHAPE, setting), replace(setting, value_bytes=INT8)),
    }
    heading = ["change", "a replica, tokens/s", "first bottleneck", "GPUs", "up, Gbit/s", "down, Gbit/s", "front ends"]
    rows = []
    for name, (method, changes) in changed.items():
        need, most = Need(SHAPE, changes, method), EDGES[-1]
        bound, gpus = min(need.capacity["computing"], need.capacity["memory"]), changes.gpus * need.replicas(most)
        cells = [short(bound), need.bottleneck, f"{gpus:,}", *crossing(need, most), f"{need.front_ends(most):,}"]
        rows.append([name, *cells])
    return table(heading, rows)


def decode_table(setting: Setting) -> str:
    """What one replica decodes at most: each step reads the weights once for all rows, and each row's cache."""
    need, context = Need(SHAPE, setting, split(SHAPE)), int(setting.step_tokens)
    cache = need.span * SHAPE.cached_bytes() * context
    rows = []
    for sessions in (1, 16, 64, 256):
        reading = (need.weights + sessions * cache) / (setting.gpus * setting.bandwidth)
        computing = sessions * need.span * SHAPE.forward_flops(1) / setting.computing
        said = "yes" if sessions * cache <= need.room else "no"
        rows.append([sessions, size(sessions * cache), said, short(sessions / max(reading, computing))])
    return table(["rows at once", f"caches of {context:,} tokens", "fit beside the weights", "tokens/s at most"], rows)


def emulator_bytes(shape: Shape, end_blocks: int) -> float:
    """Of an 8-bit emulator with its ends in bfloat16, which is fetched once."""
    return (shape.blocks - end_blocks) * shape.block * INT8 + shape.ends(end_blocks) * BFLOAT16


def fetching(edges: int) -> str:
    """Gbit/s that bring every edge its emulator within a day."""
    return short(8 * edges * emulator_bytes(SHAPE, 2) / DAY / 1e9)


def offsite_table(_: Setting) -> str:
    """What Offsite-Tuning needs of the cloud: one fetch each."""
    fetched, adapter = emulator_bytes(SHAPE, 2), SHAPE.lora(8, 2) * BFLOAT16
    rows = [[f"{edges:,}", size(fetched), size(edges * fetched), fetching(edges), size(adapter)] for edges in EDGES]
    heading = ["edges", "`quant-8` emulator and ends", "to fetch in all", "within a day, Gbit/s", "an adapter back"]
    return table(heading, rows)


def findings(setting: Setting) -> str:
    """What the tables come to."""
    kept, again, above, side_network, whole, alive = needs(SHAPE, setting)
    most = EDGES[-1]

    def gpus(need: Need) -> str:
        return f"{setting.gpus * need.replicas(most):,}"

    fetched = size(emulator_bytes(SHAPE, 2))
    moved, _ = crossing(kept, most)
    lines = {
        "Memory is the first bottleneck of `split`": f"a token keeps {size(kept.kept)} on the cloud for the "
        f"{short(kept.held)} s that edge and line take between the passes, so a replica holds "
        f"{short(kept.capacity['memory'])} tokens/s where it computes {short(kept.capacity['computing'])}.",
        "Computing the forward again is cheaper than keeping it": f"{gpus(again)} GPUs in place of {gpus(kept)} for "
        f"{most:,} edges, for half as many bytes again upwards. The engine comes to this by itself: it admits "
        f"{short(kept.sessions)} sessions to a replica, and what is over a session's share is not kept.",
        "`--train top` and `side` with their caches": f"{gpus(above)} and {gpus(side_network)} GPUs, for no backward "
        f"and one forward in {setting.epochs:g} epochs.",
        "`dlora` is bound by the edge's line": f"{short(whole.steps_per_hour)} steps an hour with all ports and "
        f"{short(alive.steps_per_hour)} with Kill-and-Revive, where {setting.steps_per_hour:g} are wanted. While it "
        "waits at its ports the cloud keeps its graph, which takes more GPUs than any other method, for fewer tokens.",
        "The cloud's network is not first": f"`split` for {most:,} edges moves {moved} Gbit/s each way through "
        f"{kept.front_ends(most):,} front ends of the speed that was measured.",
        "`offsite` needs no GPU while it trains": f"every edge fetches {fetched}, holds it and computes all "
        f"{SHAPE.blocks} blocks by itself, so the device is the bottleneck, and after it the fetching.",
    }
    return "\n".join(f"- **{claim}**: {numbers}" for claim, numbers in lines.items())


def planned_table(setting: Setting, core: int = 32, rank: int = 8) -> str:
    """Formulas of methods that are not built."""
    boundary, ports = 4 * SHAPE.hidden, 2 * SHAPE.blocks
    adapters = 2 * SHAPE.lora(rank, SHAPE.blocks) / setting.step_tokens
    each = setting.value_bytes / 1e3
    rows = [
        ["`dlora --exchange core`", f"4d + 4 x {core} x {ports} ports", short((boundary + 4 * core * ports) * each)],
        [
            "`dlora --exchange parameters`",
            f"4d + 2 x adapter of rank {rank} / tokens of a step",
            short((boundary + adapters) * each),
        ],
    ]
    return table(["planned", "values a token, both ways", "kB a token"], rows)


def tables(setting: Setting) -> dict[str, str]:
    """All of them, by their names on the page."""
    fleets = {f"edges-{edges}": fleet_table(setting, edges) for edges in EDGES}
    return {
        "summary": summary_table(setting),
        "findings": findings(setting),
        "token": tokens_table(setting),
        "replica": replica_table(setting),
        **fleets,
        "levers": levers_table(setting),
        "decode": decode_table(setting),
        "offsite": offsite_table(setting),
        "planned": planned_table(setting),
        "assumptions": table(["constant", "value", "what it is, and where it is from"], shown()),
    }


def main(write: Annotated[bool, typer.Option("--write", help="put the tables into docs/scaling.md")] = False) -> None:
    """Print what many edges need.

    Example: python -m benchmarks.scaling --write
    """
    made = tables(Setting())
    if write:
        put(PAGE, made)
    else:
        print("\n\n".join(f"{name}\n\n{text}" for name, text in made.items()))


if __name__ == "__main__":
    typer.run(main)
