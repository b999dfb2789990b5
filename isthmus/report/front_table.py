"""The fronts of several runs as a table: what each cost, how good it became, and who dominates it.

Knows fronts and units; computes none.
"""

from isthmus.report.front_plots import told
from isthmus.report.fronts import Cost, Group, Point
from isthmus.report.grid import Cell, Grid, cell
from isthmus.report.units import NONE


def front_grid(group: Group) -> Grid:
    """A row for each run that is in the group's pictures, the best first; a cost at which it is dominated is greyed."""
    costs = [front.cost for front in group.fronts]
    points = {(point.run, front.cost): point for front in group.fronts for point in front.points}
    best_first = sorted(points.values(), key=lambda point: point.quality, reverse=group.measure == "accuracy")
    runs = list(dict.fromkeys(point.run for point in best_first))
    heads = ("Run", group.measure.capitalize(), *(cost[0].upper() + cost[1:] for cost in costs), "Dominated by")
    return Grid(heads, [_row(run, group, costs, points) for run in runs])


def _row(run: str, group: Group, costs: list[Cost], points: dict[tuple[str, Cost], Point]) -> list[Cell]:
    own = {cost: points[run, cost] for cost in costs if (run, cost) in points}
    quality = next(iter(own.values()))
    figures = [
        cell(told(cost, own[cost].cost), bool(own[cost].beaten_by)) if cost in own else Cell(NONE, greyed=True)
        for cost in costs
    ]
    everywhere = all(point.beaten_by for point in own.values())
    return [Cell(run, everywhere), cell(_quality(quality, group)), *figures, _beaten(own)]


def _quality(point: Point, group: Group) -> str:
    if group.measure == "loss":
        return f"{point.quality:.4f}"
    interval = (
        f" [{100 * point.interval[0]:.1f},\N{NO-BREAK SPACE}{100 * point.interval[1]:.1f}]" if point.interval else ""
    )
    return f"{100 * point.quality:.1f} %{interval}"


def _beaten(own: dict[Cost, Point]) -> Cell:
    if any(point.reference for point in own.values()):
        return Cell("a reference: the whole model is on the edge")
    said = [f"in {cost}: {', '.join(point.beaten_by)}" for cost, point in own.items() if point.beaten_by]
    return Cell("; ".join(said) or "no run", greyed=not said)
