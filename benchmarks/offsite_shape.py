"""A step on an 8-block `drop` emulator against LoRA on the whole model, at the shape of OPT-1.3B.

Knows a random model that both share, and how to take turns; what is learnt means nothing here.
"""

from typing import Final

import torch
from transformers import AutoModelForCausalLM, OPTConfig, PreTrainedModel

from benchmarks.batch import RANK, full_batch
from benchmarks.place import ROWS, TOKENS, Place
from benchmarks.results import Figure, Outcome, Target
from benchmarks.warm_step import Side
from edge_client.attaching import Placement, attach
from edge_client.edge_flops import count_edge_flops
from edge_client.edge_model import EdgeModel
from emulator.pair import Pair
from isthmus.blocks import BlockList, find_blocks
from isthmus.cut import Cut
from isthmus.emulated.shrink import make_recipe
from isthmus.ledger.record import Ledger
from isthmus.load import DTYPES, load_tokenizer

NAME = "opt-1.3b-shape"
DTYPE: Final = "bfloat16"
SHAPE = {
    "num_hidden_layers": 24,
    "hidden_size": 2048,
    "word_embed_proj_dim": 2048,
    "ffn_dim": 8192,
    "num_attention_heads": 32,
    "vocab_size": 50272,
    "dropout": 0.0,
}
CUT, KEPT = Cut(2, 2), 8
LEAST_SPEED, MOST_MEMORY = 2.5, 0.5
SPEED, STEP, COMPUTED, MEMORY = "speed", "step", "computed in a step", "tensors' peak"
OFFSITE, WHOLE = "`drop` to 8, LoRA on the ends", "LoRA on the whole model"

METHOD = (
    f"A random model of the shape of OPT-1.3B (24 blocks, hidden size 2048) in {DTYPE}, a batch of {ROWS} rows of "
    f"{TOKENS} real tokens with the loss on the last token of each. LoRA of rank {RANK} on every linear module: of all "
    f"24 blocks, or of the two at each end (cut {CUT}) with {KEPT} of the 20 between them in place of all, as "
    "published. Both stand in one process, share their weights, and take turns, in either order, after one step each "
    "that is not counted; a step is forward, backward and the optimizer's update. Memory is the peak of each side's "
    "own weights, gradients, optimizer state and what autograd saved, as if it stood alone."
)


class Metered(Side):
    """A side that also says what it computes, how fast, and what its tensors take."""

    def __init__(self, model: PreTrainedModel, found: BlockList, place: Place, whole: bool) -> None:
        """LoRA on the ends' blocks, or on all; the tokenizer of the model in `place` is never used."""
        edge = EdgeModel(model, found, CUT, load_tokenizer(place.model), NAME, "", DTYPE)
        tuning = attach(model, found, CUT, Placement("lora", RANK, 2.0 * RANK, ["all-linear"], 0, in_span=whole))
        flops, batch = count_edge_flops(edge, tuning), full_batch(model.config.vocab_size)
        super().__init__(edge, tuning, flops, Ledger(), batch)
        self._stepper.memory.hold("optimizer", self._optimizer.state_bytes)
        rows, tokens = batch.input_ids_BT.shape
        self.weight_bytes = sum(parameter.nbytes for parameter in model.parameters())
        self.flops = sum(one.of(rows, tokens, outputs=batch.counted) for one in (flops.forward, flops.backward))

    def figures(self) -> dict[str, Figure]:
        """Of the steps after the first."""
        speeds = [self._batch.real_tokens / seconds for seconds in self.seconds[1:]]
        return {
            SPEED: Figure.of(speeds, "tokens/s"),
            STEP: Figure.of(self.seconds[1:], "s"),
            COMPUTED: Figure(self.flops / 1e12, "TFLOP"),
            MEMORY: Figure(self._stepper.memory.peak_bytes / 1e9, "GB"),
        }


def measure(place: Place) -> Outcome:
    """Both in turns, after one step of each that is not counted."""
    torch.set_num_threads(place.threads)
    offsite, whole = _sides(place)
    for turn in range(place.repeats + 1):
        for side in (whole, offsite) if turn % 2 else (offsite, whole):
            side.step()
    ratios = [one / other for one, other in zip(whole.seconds[1:], offsite.seconds[1:], strict=True)]
    found = {OFFSITE: offsite.figures(), WHOLE: whole.figures()}
    figures = {f"{side}: {label}": figure for side, each in found.items() for label, figure in each.items()}
    speed, memory = Figure.of(ratios, "times"), found[OFFSITE][MEMORY].value / found[WHOLE][MEMORY].value
    figures |= {"speed, of that on the whole model": speed, "memory, of that on the whole model": Figure(memory, "")}
    return Outcome(figures, (_speed_target(speed, whole.flops / offsite.flops), _memory_target(memory, whole, offsite)))


def _sides(place: Place) -> tuple[Metered, Metered]:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(OPTConfig(**SHAPE), dtype=DTYPES[DTYPE]).requires_grad_(False).eval()
    found = find_blocks(model)
    pair = Pair.of(model, found, make_recipe("drop", CUT, len(found.blocks), KEPT, None, {}))
    return Metered(pair.twin, pair.twin_found, place, whole=False), Metered(model, found, place, whole=True)


def _speed_target(speed: Figure, flops: float) -> Target:
    met = speed.value >= LEAST_SPEED
    reason = f"12 of 24 blocks are left, each step computes {flops:.2f} times less, and the head stays as it is"
    text = f"a step on {KEPT} of 20 blocks is at least {LEAST_SPEED} times as fast as LoRA on the whole model"
    return Target(text, str(speed), met, None if met else reason)


def _memory_target(memory: float, whole: Metered, offsite: Metered) -> Target:
    met = memory <= MOST_MEMORY
    weights = offsite.weight_bytes / whole.weight_bytes
    reason = f"of the weights alone {weights:.2f} are left: the embeddings stay whole"
    return Target(
        f"its tensors take at most {MOST_MEMORY} of the memory", f"{memory:.2f}", met, None if met else reason
    )
