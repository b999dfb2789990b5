"""The rows that compare methods, PEFT choices and cuts: which they are, and in which order they are measured.

Knows names and command lines; how a row is carried out and what it came to stands in modules of its own. The order is
such that a stop at any time leaves a table that says something: every method first, then the other domains, then what
trains, then where the model is cut.
"""

from dataclasses import dataclass
from typing import Final, Literal

from benchmarks.methods_data import BATCH, HELD_OUT, TOKENS
from benchmarks.place import CUT
from demo.reviews import Domain

DTYPE: Final = "bfloat16"
WARM_UP = 5
DOMAINS: tuple[Domain, ...] = ("movies", "tweets", "products", "news")
LOW_RANK, IN_SPAN, SIDE, WHOLE_MODEL, VECTORS, PROMPTS, WEIGHTS = "1e-3", "3e-3", "3e-3", "3e-4", "1e-2", "3e-2", "1e-4"
"""Learning rates."""

METHOD = (
    f"SmolLM2-135M (30 blocks) in {DTYPE} on both sides, each row a `cloud_node serve` process and an `edge_client "
    "train` process of its own with mutual TLS over loopback; one seed; codec bf16 unless a row says int8. Each row "
    f"sees {TOKENS:,} tokens of its domain once (whole batches of {BATCH} rows, so up to a batch more: about 260 "
    "reviews in 32 steps), few enough that a row takes a minute or two on two idle cores, enough that tuning shows; "
    f"{WARM_UP} steps warm the learning rate up. Scored on {HELD_OUT:,} held-out rows of the same domain, on the true "
    "span, over the wire (`local`: in the process). Nothing was chosen by held-out rows. A row's name is "
    "domain/method/what trains/cut. `lora` is of rank 8, alpha 16, on every linear module of the blocks at the ends, "
    "but for `dlora`, where it is on q and v of every block, those of the span at ports; `dlora-1/8` keeps an eighth "
    "of these alive by Kill-and-Revive. `top` is `split --train top`. `offsite` is tuned on an emulator that keeps "
    "0.75 of each linear module's parameters as two factors, calibrated on texts of the news domain (for the news "
    "rows: of products), then plugged in. `side` is a network an eighth as wide beside the model. Rates are those of "
    f"the other chapters where they have one ({LOW_RANK} for matrices of low rank, {IN_SPAN} in the span and for "
    f"`side`, {WHOLE_MODEL} for LoRA in nearly all blocks), and else one for each kind, set beforehand and not "
    f"searched: {VECTORS} for vectors (ia3, ln-tuning), {PROMPTS} for prompts, {WEIGHTS} for whole weights. A method "
    "that does badly here may have been given a bad rate. All run one epoch, where `top` and `side` show half of what "
    "they can: later epochs cross nothing. `bitfit` has no row, since the model has no biases, and bottleneck "
    "adapters have none, since there is no such method here."
)


@dataclass(frozen=True)
class Variant:
    """A row.

    Attributes:
        method: how it is called in the name; its flags are those of `METHODS`.
        peft: what trains.
        cut: where the model is cut.
        domain: of the data.
    """

    method: str
    peft: str = "lora"
    cut: str = CUT
    domain: Domain = "movies"

    @property
    def name(self) -> str:
        """What the row is called."""
        return f"{self.domain}/{self.method}/{self.peft}/{self.cut}"

    @property
    def reference(self) -> "Variant":
        """The row of its domain that others are compared with."""
        return Variant("split", domain=self.domain)

    @property
    def place(self) -> Literal["served", "here", "emulated"]:
        """Where the span is while it trains."""
        return "here" if self.method == "local" else "emulated" if self.method == "offsite" else "served"

    def flags(self) -> list[object]:
        """What it says to `edge_client train`, but for where model, span and data are."""
        own = METHODS[self.method]
        codec = [] if "--codec" in own or self.place != "served" else ["--codec", "bf16"]
        cut = [] if self.place == "emulated" else ["--cut", self.cut]
        return [*own, *cut, *self._trains(), *codec, "--batch-size", BATCH, "--warmup-steps", WARM_UP, "--seed", 0]

    def _trains(self) -> list[object]:
        if self.method == "side":
            return ["--lr", SIDE]
        if self.method.startswith("dlora"):
            return [*_LORA, "--targets", "q_proj,v_proj", "--lr", IN_SPAN]
        if self.cut == NEARLY_ALL:
            return [*_LORA, "--targets", "all-linear", "--lr", WHOLE_MODEL]
        return list(PEFT[self.peft])


_LORA = ("--rank", 8, "--alpha", 16)
METHODS: dict[str, tuple[object, ...]] = {
    "split": ("--method", "split"),
    "top": ("--method", "split", "--train", "top"),
    "side": ("--method", "side"),
    "dlora-1/8": ("--method", "dlora", "--kr-active", 0.125),
    "dlora": ("--method", "dlora"),
    "offsite": ("--method", "offsite"),
    "split-int8": ("--method", "split", "--codec", "int8"),
    "local": ("--method", "local"),
}


def _peft(name: str, rate: str, *own: object) -> tuple[object, ...]:
    return ("--peft", name, "--lr", rate, *own)


PEFT: dict[str, tuple[object, ...]] = {
    "lora": _peft("lora", LOW_RANK, *_LORA, "--targets", "all-linear"),
    "dora": _peft("dora", LOW_RANK, *_LORA, "--targets", "all-linear"),
    "ia3": _peft("ia3", VECTORS),
    "ln-tuning": _peft("ln-tuning", VECTORS),
    "prompt": _peft("prompt", PROMPTS),
    "full": _peft("full", WEIGHTS),
    "adalora": _peft("adalora", LOW_RANK, *_LORA, "--targets", "all-linear"),
    "head": _peft("head", WEIGHTS),
}
NEARLY_ALL = "15:14"
CUTS = ("1:1", "4:4", "2:0", "0:2", "8:8")

BY_METHOD = tuple(Variant(method, "side" if method == "side" else "lora") for method in METHODS)
BY_DOMAIN = tuple(Variant(row.method, row.peft, domain=domain) for domain in DOMAINS[1:] for row in BY_METHOD)
BY_PEFT = tuple(Variant("split", peft) for peft in PEFT if peft != "lora")
BY_CUT = (
    *(Variant("split", cut=cut) for cut in CUTS),
    *(Variant("top", cut=cut) for cut in ("0:4", "0:8")),
    Variant("side", "side", "0:0"),
    Variant("local", cut=NEARLY_ALL),
)
CROSSED = (
    *(Variant("top", peft) for peft in ("ln-tuning", "full")),
    *(Variant("offsite", peft) for peft in ("ln-tuning", "full")),
    *(Variant("dlora-1/8", domain="movies", cut="0:0"), Variant("offsite", cut="4:4")),
)
VARIANTS = (*BY_METHOD, *BY_DOMAIN, *BY_PEFT, *BY_CUT, *CROSSED)
"""In the order in which they are measured."""
