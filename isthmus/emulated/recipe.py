"""What an emulator is made of and how good it is: `emulator.json`, which stands in its bundle.

Knows fields and their limits; knows no modules and no tensors. It comes from a peer, so everything is checked.
"""

from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from isthmus.cut import Cut
from isthmus.errors import BundleError

FILE_NAME = "emulator.json"
MAX_BYTES = 1 << 20

ROUNDING = 1e-6
"""By which figures that say the same may differ."""

Method: TypeAlias = Literal["drop", "share", "rank", "quant"]
Count: TypeAlias = Annotated[int, Field(ge=0, lt=1 << 53)]
Positive: TypeAlias = Annotated[int, Field(ge=1, lt=1 << 53)]
Amount: TypeAlias = Annotated[float, Field(ge=0)]
Digest: TypeAlias = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
ModuleName: TypeAlias = Annotated[str, Field(pattern=r"^[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)*$", max_length=200)]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class Recipe(_Part):
    """Which blocks stand where, and in which form their linear modules are.

    Attributes:
        method: what it was asked to be.
        cut: of the model.
        blocks: for each block of the span in order, the number of the block whose weights stand there; None where
            nothing stands. A block whose weights stand anywhere stands at its own place too.
        ranks: inner sizes of linear modules that became two factors, by their names in the block.
        bits: of each weight of linear modules; None: as they were.
    """

    method: Method
    cut: Annotated[str, Field(pattern=r"^[0-9]{1,5}:[0-9]{1,5}$")]
    blocks: Annotated[tuple[Count | None, ...], Field(min_length=1, max_length=10_000)]
    ranks: Annotated[dict[ModuleName, Positive], Field(max_length=1000)] = {}
    bits: Literal[4, 8] | None = None

    @model_validator(mode="after")
    def _sources_stand_at_their_places(self) -> Self:
        bottom = Cut.parse(self.cut).bottom
        for source in {block for block in self.blocks if block is not None}:
            if not bottom <= source < bottom + len(self.blocks) or self.blocks[source - bottom] != source:
                raise ValueError(f"block {source} is used and does not stand at its own place")
        if not self.kept:
            raise ValueError("nothing stands anywhere")
        return self

    @property
    def kept(self) -> tuple[int, ...]:
        """Numbers of the blocks that have weights here."""
        return tuple(sorted({block for block in self.blocks if block is not None}))


class Distance(_Part):
    """How far an emulator is from its span on text that neither was made with.

    Attributes:
        text: SHA-256 of the file.
        rows, tokens: of it that were measured.
        hidden: mean squared error of the output hidden states over the mean square of the span's own.
        loss: nats per token of the model with the emulator in its middle.
        loss_of_span: of the model itself.
        gap: the capability gap: nats per token by which the emulator is worse than the model; as the two losses have it
            where the file does not say.
        gap_interval: its lower and upper limit at 95 %, row by row; None where a single row was measured.
    """

    text: Digest
    rows: Positive
    tokens: Positive
    hidden: Amount
    loss: Amount
    loss_of_span: Amount
    gap: float = Field(default_factory=lambda known: known["loss"] - known["loss_of_span"])
    gap_interval: tuple[float, float] | None = None

    @model_validator(mode="after")
    def _gap_is_that_of_the_losses(self) -> Self:
        low, high = self.gap_interval or (self.gap, self.gap)
        if abs(self.gap - (self.loss - self.loss_of_span)) > ROUNDING:
            raise ValueError("the gap is not the difference of the losses")
        if not low - ROUNDING <= self.gap <= high + ROUNDING:
            raise ValueError("the gap is outside its interval")
        return self


class CurvePoint(_Part):
    """Distillation after a step: what was minimised there, and the held-out distance where it was measured."""

    step: Count
    loss: Amount
    hidden: Amount
    held_out: Amount | None = None


class Distillation(_Part):
    """How it was distilled: on which text, for how long, at which rate, and how that went."""

    text: Digest
    steps: Positive
    batch_size: Positive
    lr: Amount
    seed: Count
    before: Distance
    curve: Annotated[tuple[CurvePoint, ...], Field(max_length=10_000)]


class Emulator(_Part):
    """The whole of `emulator.json`.

    Attributes:
        parameters, span_parameters: of the emulator and of its span; a quantised weight counts as one.
        weight_bytes: of the emulator's tensors, those of the ends left out.
        flops_per_token, span_flops_per_token: of a forward, attention's share left out.
        distance: None where no text was given to measure it on.
        distillation: None where it was not distilled.
    """

    format: Literal["isthmus-emulator/1"] = "isthmus-emulator/1"
    recipe: Recipe
    parameters: Positive
    span_parameters: Positive
    weight_bytes: Positive
    flops_per_token: Count
    span_flops_per_token: Count
    distance: Distance | None = None
    distillation: Distillation | None = None

    @classmethod
    def parse(cls, content: bytes | str) -> "Emulator":
        """Read the file's content.

        Raises:
            BundleError: it is anything else.
        """
        if len(content) > MAX_BYTES:
            raise BundleError(f"{FILE_NAME} is over {MAX_BYTES} bytes: have the emulator built anew")
        try:
            return cls.model_validate_json(content)
        except ValidationError as error:
            first: dict[str, Any] = dict(error.errors(include_url=False)[0])
            where = ".".join(str(step) for step in first["loc"])
            raise BundleError(f"{FILE_NAME} is malformed ({where}: {first['msg']}): have it built anew") from None

    @classmethod
    def load(cls, directory: Path) -> "Emulator":
        """Read the file of an emulator's folder.

        Raises:
            BundleError: it is missing or malformed.
        """
        try:
            with (directory / FILE_NAME).open("rb") as file:
                return cls.parse(file.read(MAX_BYTES + 1))
        except OSError as error:
            raise BundleError(f"{directory / FILE_NAME} cannot be read ({error.strerror}): name an emulator") from None

    def save(self, directory: Path) -> None:
        """Write the file; the same facts give the same bytes."""
        (directory / FILE_NAME).write_text(self.model_dump_json(indent=1) + "\n", encoding="utf-8")
