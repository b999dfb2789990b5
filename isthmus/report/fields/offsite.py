"""The emulator that a run was tuned on, and what looks at the true span found meanwhile.

Knows the figures; knows no weights of either.
"""

from typing import Literal

from isthmus.report.fields.block import Amount, Block, Count, Digest, Share
from isthmus.report.fields.score import Score


class Watched(Block):
    """What a look at the true span found after `step` steps on the emulator."""

    step: Count
    loss: Amount
    accuracy: Share | None


class Offsite(Block):
    """The emulator that a run was tuned on.

    `emulator` is its bundle's id, `bundle_bytes` how much that holds, ends included (null where it is not known),
    `blocks` how many of the span's it keeps, `gap` by how many nats per token it was
    worse than the model on its owner's text; null where its owner did not measure that. `watched` are looks at the true
    span, for each of which hidden states of `watched_rows` rows were sent; `watched_untouched` is the score on those
    rows without the adapter, `watched_seconds` what all looks took; their bytes are all there is in
    `cost.wire.by_phase.eval`.
    """

    emulator: Digest
    method: Literal["drop", "share", "rank", "quant"]
    blocks: Count
    bits: Count | None
    parameters: Count
    span_parameters: Count
    weight_bytes: Count
    flops_per_token: Count
    span_flops_per_token: Count
    distilled_steps: Count
    gap: float | None
    watched_rows: Count | None = None
    watched: tuple[Watched, ...] = ()
    watched_untouched: Score | None = None
    watched_seconds: Amount | None = None
    bundle_bytes: Count | None = None
