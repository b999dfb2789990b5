"""Figures that are printed wrongly: what is right, why, and what the printed figure is of."""

from collections.abc import Callable
from dataclasses import dataclass

from isthmus.planning.trainable import Prefixes, trainable
from tests.planning.known_counts import IA3, LIALIN, NETWORK, QV, SCALED, SEVEN, WIDE, XU, Cell, Told, lora, prompt
from tests.planning.known_models import outline


@dataclass(frozen=True, eq=False)
class Mistake:
    """A cell that errs.

    Attributes:
        cell: with the setting and the count that are right.
        why: the print is not.
        printed_is: what does give the printed figure; None: nothing does.
    """

    cell: Cell
    why: str
    printed_is: Callable[[], float] | None


def _of(model: str, told: Told, share: float = 1) -> Callable[[], float]:
    return lambda: share * trainable(outline(model), told).total


SELF_ATTENTION = lora(target_modules=r".*\.SelfAttention\.(q|v)")

NO_PROMPT = (
    "The row is of a prefix: 30 keys and values at every attention, which train themselves. A prompt is 30 rows of the "
    "embedding, and the row's scores are not a prompt's."
)
HALVED = (
    "QLoRA's script, `qlora.py`, halves the count that it prints where the frozen weights have 4 bits. The adapter's "
    "do not, and all of them train. That QLoRA trains half as many, as the paper concludes, does not follow."
)


def _prompt(model: str, printed: str) -> Mistake:
    cell = Cell(model, "prompt tuning", "30 tokens", prompt(30), 30 * 1024, (printed,), LIALIN)
    return Mistake(cell, NO_PROMPT, _of(model, Prefixes(30)))


MISTAKES: list[Mistake] = [
    _prompt("T5-large", "4.42M"),
    _prompt("T5-3B", "17.69M"),
    _prompt("T5-11B", "70.78M"),
    Mistake(
        Cell("T5-XL", "prompt tuning", "5 tokens", prompt(5), 5 * 2048, ("20K",), LIALIN),
        "T5-XL is 2,048 wide. 5 tokens are 20K in T5-XXL, which is 4,096 wide.",
        _of("T5-XXL", prompt(5)),
    ),
    Mistake(
        Cell("T5-3B", "LoRA", QV, lora(), 72 * 2 * 8 * (1024 + 4096), ("3.93M",), LIALIN),
        "The print counts 48 of 72 attentions, those of a stack to itself. The rows of T5-large and T5-11B count the "
        "decoder's attention to the encoder too.",
        _of("T5-3B", SELF_ATTENTION),
    ),
    Mistake(
        Cell(
            "T5-3B",
            "prefix tuning",
            NETWORK,
            Prefixes(30, 512),
            3 * (30 * 1024 + 1025 * 512 + 513 * 24 * 2 * 4096),
            ("77.25M",),
            LIALIN,
        ),
        "Keys and values of T5-3B are 4,096 wide. The print is what a prefix of 10 comes to where they are 1,024 wide, "
        "as in T5-large.",
        _of("T5-large", Prefixes(10, 512)),
    ),
    Mistake(
        Cell("T5-11B", "IA3", SCALED, IA3, 24 * (6 * 16384 + 2 * 65536), ("3.48M",), LIALIN),
        "No choice of modules comes to the print: every width of T5-11B is a multiple of 1,024, so that vectors in 24 "
        "blocks come to 3.47M or 3.49M. This setting is the one of T5-large and T5-3B.",
        None,
    ),
    Mistake(
        Cell(
            "LLaMA-7B",
            "QLoRA",
            SEVEN,
            WIDE,
            64 * 32 * (4 * 2 * 4096 + 3 * (4096 + 11008)),
            ("79.9M",),
            XU,
            truncated=True,
        ),
        HALVED,
        _of("LLaMA-7B", WIDE, share=1 / 2),
    ),
    Mistake(
        Cell("LLaMA-13B", "QLoRA", SEVEN, WIDE, 64 * 40 * (4 * 2 * 5120 + 3 * (5120 + 13824)), ("125.2M",), XU),
        HALVED,
        _of("LLaMA-13B", WIDE, share=1 / 2),
    ),
]
