"""docs/benchmarks.md, written from the results.

Knows rows and Markdown; measures nothing.
"""

from collections.abc import Iterable, Mapping, Sequence

from benchmarks import warm_step
from benchmarks.forward_figures import ACCURACY, FIRST, LATER, LOSS, VALIDATION
from benchmarks.forward_rows import METHOD, PREFIX, REFERENCE, VARIANTS
from benchmarks.forward_targets import NAME, change_of
from benchmarks.results import PAGE, Figure, Row, Target

INTRODUCTION = """# Benchmarks

What it costs to train a model whose middle runs on somebody else's machine. This page is written by `make bench`
from `benchmarks/results.jsonl`; do not edit it. Run `make bench` to measure on a machine of your own (it fetches a
model of 135 million parameters at first). It goes on where it stopped: what has a result for the present commit is
skipped. `python -m benchmarks.run --again` measures it afresh, `--only NAME` measures one row. `make
bench-forward-only` and `python -m benchmarks.forward_only` do the same for the forward-only rows.

Edge and cloud are processes of their own on one machine, with mutual TLS between them over loopback. Times are
compared side by side in one run, taking turns, after a round that is not counted. A figure is the median; the least
and the greatest of its repeats stand in brackets.
"""

FORWARD_ONLY, WARM_STEP = "Forward-only", "A warm step"
BEFORE = "before training"
COLUMNS = (
    *(ACCURACY, LOSS, FIRST, LATER, "edge, forward", "edge, backward", "cloud, forward", "cloud, backward"),
    *("edge, process peak", "edge, tensors' peak", "step, epoch 1", "step, later epochs", VALIDATION),
)
READING = (
    "Accuracy and loss stand with 95 % intervals; a change is against "
    f"`{REFERENCE.name}` on the same rows, its interval paired by row. Bytes are encoded tensors of the training "
    "steps, both ways; FLOPs are of all training steps together. The process's peak includes Python, its libraries and "
    "scoring; tensors are weights, gradients and what autograd saved in training. Seconds are medians."
)


def write(rows: Iterable[tuple[str, str, Row]], results: Mapping[str, Row]) -> None:
    """Write the page from (title, method, row) triples, in their order, and the forward-only rows of `results`."""
    known = list(rows)
    compared, warm = results.get(PREFIX + NAME), results.get(PREFIX + warm_step.NAME)
    forward = [(FORWARD_ONLY, "", compared)] if compared is not None else []
    warmed = [(WARM_STEP, warm_step.METHOD, warm)] if warm is not None else []
    parts = [INTRODUCTION, _summary([*known, *forward, *warmed]), *(_section(*each) for each in known)]
    parts += [_forward_only(row, results) for _, _, row in forward]
    parts += [_section(*each, mark="###") for each in warmed]
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text("\n".join(parts), encoding="utf-8")


def _summary(rows: list[tuple[str, str, Row]]) -> str:
    lines = ["| benchmark | target | reached | met |", "|---|---|---|---|"]
    for title, _, row in rows:
        if not row.outcome.targets:
            lines.append(f"| {title} | none set | see below | |")
        lines += [
            f"| {title} | {target.text} | {target.reached} | {'yes' if target.met else '**no**'} |"
            for target in row.outcome.targets
        ]
    return "\n".join(lines) + "\n"


def _section(title: str, method: str, row: Row, mark: str = "##") -> str:
    lines = [f"{mark} {title}", "", method, "", "| figure | |", "|---|---|"]
    lines += [f"| {name} | {figure} |" for name, figure in row.outcome.figures.items()]
    lines += ["", *(_verdict(target) for target in row.outcome.targets)]
    return "\n".join([*lines, "", _origin(row), ""])


def forward_only_table(results: Mapping[str, Row], columns: Sequence[str] = COLUMNS) -> list[list[str]]:
    """Columns of the forward-only rows that were compared last, as cells; the first list is the heading."""
    compared = results[PREFIX + NAME]
    measured = {
        each.name: results[PREFIX + each.name].outcome.figures
        for each in VARIANTS
        if PREFIX + each.name in results and results[PREFIX + each.name].commit == compared.commit
    }
    if not measured:
        return [["row"]]
    first = next(iter(measured.values()))
    heading, before = ["row"], [BEFORE]
    cells = {name: [name] for name in measured}
    for column in columns:
        heading.append(_heading(column, first))
        before.append(_cell(first.get(f"{column} {BEFORE}")))
        for name, figures in measured.items():
            cells[name].append(_cell(figures.get(column)))
        if column in (ACCURACY, LOSS):
            heading.append("change, points" if column == ACCURACY else "change, nats")
            before.append("")
            for name in measured:
                cells[name].append(_cell(compared.outcome.figures.get(change_of(name, column))))
    return [heading, before, *cells.values()]


def _heading(column: str, figures: Mapping[str, Figure]) -> str:
    unit = figures[column].unit if column in figures else ""
    return f"{column}, {unit}" if unit else column


def _cell(figure: Figure | None) -> str:
    return "" if figure is None else figure.bare


def _forward_only(compared: Row, results: Mapping[str, Row]) -> str:
    heading, *rows = (f"| {' | '.join(cells)} |" for cells in forward_only_table(results))
    ruler = "|" + "---|" * (heading.count("|") - 1)
    verdicts = [_verdict(target) for target in compared.outcome.targets]
    lines = [f"## {FORWARD_ONLY}", "", METHOD, "", READING, "", heading, ruler, *rows, "", *verdicts]
    return "\n".join([*lines, "", _origin(compared), ""])


def _origin(row: Row) -> str:
    return f"`{row.command}`, commit {row.commit}, {row.date}, on {row.machine} ({row.machine.versions})."


def _verdict(target: Target) -> str:
    verdict = "met" if target.met else f"missed: {target.reason}"
    return f"- Target: {target.text}. Reached: {target.reached}. {verdict[0].upper()}{verdict[1:]}."
