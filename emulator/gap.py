"""What an emulator's gap means for its owner: in figures, in a sentence, and whether it is as large as was asked for.

Knows what `emulator.json` says; measures nothing, and knows no files.
"""

from collections.abc import Iterator

from emulator.text import HELD_OUT
from isthmus.emulated.recipe import Distance, Emulator
from isthmus.errors import ModelError
from isthmus.report.verdict import verdict

FEWEST_BITS = 4


def figures(distance: Distance) -> str:
    """The gap, with its interval where it has one."""
    limits = distance.gap_interval
    interval = "" if limits is None else f" (95 % {limits[0]:+z.4f} to {limits[1]:+z.4f})"
    return f"{distance.gap:+z.4f} nats per token{interval}"


def warning(distance: Distance) -> str | None:
    """What to say of a gap that protects nothing, or not for sure; None where the whole interval is above 0."""
    if distance.gap_interval is None:
        return "not known: a single row has no interval"
    match verdict((distance.gap, *distance.gap_interval)):
        case "better":
            return None
        case "worse":
            return "nothing is protected: on this text the model is better with the emulator in it than by itself"
        case "undecided":
            return "nothing is protected, as far as these rows tell: the interval of the gap includes 0"


def check_gap(about: Emulator, least: float | None, stays: str) -> None:
    """Return if an emulator is far enough from its model, or if nobody asked.

    Args:
        about: the emulator.
        least: nats per token that its gap's lower limit must reach.
        stays: what the refusal says of what is left on disk.

    Raises:
        ModelError: it is too near.
    """
    if least is None or about.distance is None:
        return
    interval = about.distance.gap_interval
    if interval is None or interval[0] < least:
        raise ModelError(
            f"the emulator's gap is {figures(about.distance)}, and --minimum-gap asks for {least:g} at its lower "
            f"limit; give {' or '.join(_remedies(about, about.distance, least))}{stays}"
        )


def _remedies(about: Emulator, distance: Distance, least: float) -> Iterator[str]:
    recipe = about.recipe
    if recipe.method == "quant":
        yield "fewer --bits" if recipe.bits != FEWEST_BITS else "another --method, for there are no fewer --bits"
    elif recipe.method != "rank" and len(recipe.kept) == 1:
        yield "another --method, for there is no lower --keep"
    else:
        yield "a lower --keep"
    if about.distillation is not None:
        yield "fewer --steps of distillation"
    if distance.gap >= least and distance.rows < HELD_OUT:
        yield "more --text, which narrows the interval"
