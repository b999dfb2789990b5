"""The page's chapters: rows of runs that are compared with each other, and the figures that are shown of them.

Knows names and words; measures nothing.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from benchmarks import (
    dlora_figures,
    dlora_rows,
    forward_rows,
    methods_chapters,
    offsite_figures,
    offsite_importances,
    offsite_rows,
    offsite_shape,
    offsite_targets,
    overlap,
    warm_step,
)
from benchmarks.forward_figures import FIRST, LATER, VALIDATION
from benchmarks.offsite_figures import EMULATOR, TUNED, WITH_STEPS, stage_of
from benchmarks.page import Chapter
from benchmarks.results import Figure, Row
from benchmarks.scores import ACCURACY, LOSS, change_of
from benchmarks.series import Measured


@dataclass(frozen=True)
class Front(Chapter):
    """Rows in the order of one column, the greatest first; what was compared of a row stands in its columns.

    Attributes:
        by: the column; rows without it, which the others are compared with, come before.
        last: how names begin of rows that come after all others.
    """

    by: str
    last: str

    def compared(self, results: Mapping[str, Row]) -> Row | None:
        """The comparison, without what stands in columns of its own."""
        row = super().compared(results)
        if row is None:
            return None
        own = {change_of(name, column) for name in self.rows for column in self.columns if column not in _SCORES}
        below = {name: figure for name, figure in row.outcome.figures.items() if name not in own}
        return replace(row, outcome=replace(row.outcome, figures=below))

    def measured(self, results: Mapping[str, Row]) -> Measured:
        """The rows that were compared, in order, and what was found of each by comparing."""
        compared = super().compared(results)
        found = {} if compared is None else compared.outcome.figures
        rows = {
            name: {**figures, **_of_row(name, found, self.columns)}
            for name, figures in super().measured(results).items()
        }

        def place(name: str) -> tuple[bool, float]:
            figure = rows[name].get(self.by)
            return name.startswith(self.last), -figure.value if figure is not None else float("-inf")

        return {name: rows[name] for name in sorted(rows, key=place)}


_SCORES = (ACCURACY, LOSS)


def _of_row(name: str, found: Mapping[str, Figure], columns: tuple[str, ...]) -> dict[str, Figure]:
    labels = (column for column in columns if column not in _SCORES)
    return {label: found[change_of(name, label)] for label in labels if change_of(name, label) in found}


FORWARD_ONLY = Chapter(
    title="Forward-only",
    method=forward_rows.METHOD,
    reading=(
        "Accuracy and loss stand with 95 % intervals; a change is against "
        f"`{forward_rows.REFERENCE.name}` on the same rows, its interval paired by row. Bytes are encoded tensors of "
        "the training steps, both ways; FLOPs are of all training steps together. The process's peak includes Python, "
        "its libraries and scoring; tensors are weights, gradients and what autograd saved in training. Seconds are "
        "medians."
    ),
    prefix=forward_rows.PREFIX,
    rows=tuple(variant.name for variant in forward_rows.VARIANTS),
    columns=(
        *(ACCURACY, LOSS, FIRST, LATER, "edge, forward", "edge, backward", "cloud, forward", "cloud, backward"),
        *("edge, process peak", "edge, tensors' peak", "step, epoch 1", "step, later epochs", VALIDATION),
    ),
    beside=(("A warm step", warm_step.METHOD, warm_step.NAME),),
)

DLORA = Chapter(
    title="DLoRA and Kill-and-Revive",
    method=dlora_rows.METHOD,
    reading=(
        f"Accuracy and loss stand with 95 % intervals; a change is against `{dlora_rows.ALL}` of the same seed on the "
        "same rows, its interval paired by row. Means over seeds are below the table: a held-out row counts once, with "
        "the mean of its differences over the seeds, and the interval is of these runs on other rows, not of other "
        "seeds. Bytes are gRPC messages as serialised, both ways; bytes, round trips and FLOPs are of all training "
        "steps, so warm-up, probes and the span's own boundary are in them. The edge's FLOPs are those of its ends, "
        "its head and its adapters, the adapters at ports among them. Memory is the peak of the edge's weights, "
        "gradients and what autograd saved in training. Seconds are medians over the steps; on the slow line "
        f"(`--link {dlora_rows.LINK}`) over {dlora_rows.SLOW_STEPS} steps of another run, where those ports are alive "
        "from the start that were alive at the end of the row's own."
    ),
    prefix=dlora_rows.PREFIX,
    rows=tuple(variant.name for variant in dlora_rows.VARIANTS),
    columns=(
        *(ACCURACY, LOSS, dlora_figures.BYTES, dlora_figures.TRIPS, dlora_figures.EDGE, dlora_figures.PORTS),
        *(dlora_figures.CLOUD, dlora_figures.MEMORY, dlora_figures.STEP, dlora_figures.SLOW),
    ),
    beside=(("Overlap of microbatches", overlap.METHOD, overlap.NAME),),
)

OFFSITE = Front(
    title="Offsite-Tuning",
    method=offsite_rows.METHOD,
    reading=(
        "A front of gain against what the edge pays: rows with the greatest share of the gain come first, each with "
        "its own speed, memory and bytes. Accuracy and loss are those of the adapter plugged into the true model, or "
        "tuned there (`split`), with 95 % intervals; a change is against the untouched model on the same rows (for "
        "rows on product reviews, their own), its interval paired by row, as is every difference. The gain is that of "
        "`split` in accuracy; the interval of a share of it is that of the difference from `split`, whose gain is "
        "taken as it was found. Protection is the owner's: what is plugged in less what the tuned emulator does by "
        "itself, which is all that the edge has. Speed, memory (weights, gradients and what autograd saved) and FLOPs "
        f"are of the edge in tuning alone, the emulator's included; for `{offsite_rows.Variant().name}` the span runs "
        "in another process on the same cores. What crossed are gRPC messages of the steps, both ways. The folder to "
        "fetch holds emulator and ends; building includes distilling. The targets are of one emulator, which was "
        "chosen on the validation rows. The losses of the other stages are in `benchmarks/results.jsonl`."
    ),
    prefix=offsite_rows.PREFIX,
    rows=tuple(variant.name for variant in offsite_rows.VARIANTS),
    columns=(
        *(ACCURACY, LOSS, offsite_targets.SHARE, *offsite_targets.LESS_SPLIT),
        *(offsite_figures.SPEED, offsite_figures.MEMORY, offsite_figures.EDGE, offsite_figures.BUNDLE),
        *(offsite_figures.ADAPTER, offsite_figures.CROSSED),
        *(stage_of(EMULATOR, ACCURACY), stage_of(TUNED, ACCURACY), offsite_figures.PROTECTION),
        *(stage_of(WITH_STEPS, ACCURACY), offsite_targets.SHARE_WITH_STEPS, *offsite_targets.STEPS_LESS_SPLIT),
        *(offsite_figures.CROSSED_AFTER, offsite_figures.GAP, offsite_figures.DISTANCE),
        *(offsite_figures.BUILD, offsite_figures.MINUTES),
    ),
    beside=(
        ("Offsite-Tuning at the shape of OPT-1.3B", offsite_shape.METHOD, offsite_shape.NAME),
        ("Importances found on emulators", offsite_importances.METHOD, offsite_importances.NAME),
    ),
    by=offsite_targets.SHARE,
    last="products:",
)

CHAPTERS = (*methods_chapters.CHAPTERS, FORWARD_ONLY, DLORA, OFFSITE)
