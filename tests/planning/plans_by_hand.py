"""Plans without a model: figures small enough to follow by eye."""

from edge_client.config import TrainConfig
from isthmus.cut import Cut
from isthmus.emulated.recipe import Recipe
from isthmus.planning.figures import Costs, Crossing, SideFlops, Step, Storage, Trained
from isthmus.planning.plan import HOUR_S, Plan
from isthmus.planning.seconds import StepSeconds
from isthmus.planning.workload import Workload

HIDDEN = 64
SHRUNK = {"none": 4, "bf16": 2, "fp16": 2, "int8": 1}


def plan(name: str, trains: int = 1, memory: int = 1, size: float = 1.0, hours: float = 1.0) -> Plan:
    """A run of one step."""
    step = Step(Crossing(size, 0.0, 1.0), SideFlops(1.0, 2.0), SideFlops(3.0, 4.0))
    costs = Costs(Trained(trains), Crossing(), step, step, memory, 1, Storage())
    took = StepSeconds(hours * HOUR_S, 0.0, 0.0, 0.0, 0.0, 0.0)
    return Plan(name, "2:2", f"edge_client train --method {name}", costs, 1, 1, took, took, 0.0)


def costs_by_hand(config: TrainConfig, workloads: list[Workload], recipe: Recipe | None) -> list[Costs]:
    """Costs that grow with what they should grow with: tokens, codec, cut, rank, shares of ports and microbatches."""
    return [_costs(config, workload) for workload in workloads]


def _costs(config: TrainConfig, workload: Workload) -> Costs:
    tokens, cut = sum(workload.lengths), Cut.parse(str(config.cut))
    one_way = float(tokens * HIDDEN * SHRUNK[config.codec])
    ports = {"dlora": 50 * (config.kr_active or 1.0)}.get(config.method, 0.0)
    if config.method in ("offsite", "local"):
        one_way = 0.0
    trips = 0.0 if not one_way else config.microbatches * (1.0 if config.forward_only else 2.0) * (1 + ports)
    ways = 1 if config.forward_only else 2
    crossing = Crossing(one_way * ways + one_way * ports, one_way * ways + one_way * ports, trips)
    blocks = cut.top if config.forward_only else cut.bottom + cut.top
    edge, cloud = SideFlops(1e9 * tokens * (blocks + 1), 1e9 * tokens * blocks), SideFlops(1e10 * tokens, 1e10 * tokens)
    step = Step(crossing, edge, cloud)
    later = Step(Crossing(), edge) if config.forward_only else step
    trains = blocks * (config.rank or 1) * HIDDEN
    memory = 1_000_000 * (blocks + 1) + tokens * HIDDEN * 40 // config.microbatches
    return Costs(Trained(trains), Crossing(100, 5e6, 1), step, later, memory, 9_000_000, Storage(5_000_000, trains * 4))
