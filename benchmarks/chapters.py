"""The page's chapters: rows of runs that are compared with each other, and the figures that are shown of them.

Knows names and words; measures nothing.
"""

from benchmarks import dlora_figures, dlora_rows, forward_rows, overlap, warm_step
from benchmarks.forward_figures import FIRST, LATER, VALIDATION
from benchmarks.page import Chapter
from benchmarks.scores import ACCURACY, LOSS

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
    beside=("A warm step", warm_step.METHOD, warm_step.NAME),
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
    beside=("Overlap of microbatches", overlap.METHOD, overlap.NAME),
)

CHAPTERS = (FORWARD_ONLY, DLORA)
