"""Which blocks a step's microbatches go through on either side, and what the output layer takes of the edge's FLOPs.

Knows block counts, methods' shapes and a configuration's sizes; knows no seconds and builds no model.
"""

from transformers import PreTrainedConfig

from isthmus.cut import Cut
from isthmus.planning.figures import Leg, SideFlops
from isthmus.planning.seconds import Passes


def passes_of(
    configuration: PreTrainedConfig,
    cut: Cut,
    outputs: int,
    trained: float,
    tensors: int = 0,
    *,
    forward_only: bool = False,
    known: bool = False,
    beside: float = 0.0,
    whole: bool = False,
    legs: tuple[Leg, ...] = (),
    calls: int = 1,
) -> Passes:
    """What each microbatch goes through.

    Args:
        configuration: of the whole model.
        cut: which blocks are whose.
        outputs: positions of a step that reach the output layer.
        trained: values that train.
        tensors: parameters that they are in.
        forward_only: no gradient reaches the span (`--train top`, `side`).
        known: the span's outputs are on the edge already, so that neither it nor what is below it runs.
        beside: further blocks on the edge: an emulator's, or a side network's.
        whole: the span's blocks are on the edge too (`local`).
        legs: of a microbatch.
        calls: models on the edge that are each a call of their own.
    """
    text = configuration.get_text_config()
    blocks = int(text.num_hidden_layers)
    span = len(cut.span(blocks))
    below = 0 if known else cut.bottom
    edge = below + cut.top + beside + (span if whole else 0)
    back = edge - below if forward_only else edge
    there = 0 if whole or known else span
    head = 2.0 * outputs * int(text.hidden_size) * int(text.vocab_size)
    return Passes(
        calls=calls,
        edge_blocks=edge,
        edge_blocks_back=back,
        below=below,
        below_back=0 if forward_only else below,
        cloud_blocks=there,
        cloud_blocks_back=0 if forward_only else there,
        head=SideFlops(head, head),
        trained=trained,
        tensors=tensors,
        legs=() if known else legs,
    )
