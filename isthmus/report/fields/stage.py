"""One stage of a run, or beside it: what it cost either side.

Knows the figures; counts nothing. A figure that does not exist, or that nobody told, is null.
"""

from isthmus.ledger.figures import Phase
from isthmus.report.fields.block import Amount, Block, Count


class Stage(Block):
    """What was spent in one phase of the ledger.

    `seconds` are by the clock, where a clock ran for the stage alone; `stored_bytes` are of what came of it: a bundle,
    an adapter, a model. `steps` are of an optimizer. Peaks are of this stage alone, but for those of a node that
    serves, which are since it started and stand in `control`.
    """

    stage: Phase
    steps: Count | None = None
    seconds: Amount | None = None
    stored_bytes: Count | None = None
    up_bytes: Count | None = None
    down_bytes: Count | None = None
    round_trips: Count | None = None
    edge_forward_flops: Count | None = None
    edge_backward_flops: Count | None = None
    edge_forward_s: Amount | None = None
    edge_backward_s: Amount | None = None
    edge_update_s: Amount | None = None
    edge_wait_s: Amount | None = None
    edge_peak_tensor_bytes: Count | None = None
    edge_peak_memory_bytes: Count | None = None
    cloud_forward_flops: Count | None = None
    cloud_backward_flops: Count | None = None
    cloud_forward_s: Amount | None = None
    cloud_backward_s: Amount | None = None
    cloud_update_s: Amount | None = None
    cloud_queue_s: Amount | None = None
    cloud_port_s: Amount | None = None
    cloud_peak_tensor_bytes: Count | None = None
    cloud_peak_memory_bytes: Count | None = None
