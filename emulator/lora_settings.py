"""What `adapter_config.json` of a LoRA adapter may say, before anything of it is believed.

Knows the fields that edges of this project write and those that peft would act on; knows no model and no tensors. It
comes from a peer and is never given to peft, which imports what some of its keys name.
"""

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from isthmus import bundle
from isthmus.adapter_files import PEFT_SETTINGS
from isthmus.emulated.recipe import ModuleName
from isthmus.errors import BundleError

MAX_CONFIG_BYTES = 1 << 20


class LoraSettings(BaseModel):
    """Plain LoRA on modules named exactly; whatever else is asked for is refused by name."""

    model_config = ConfigDict(frozen=True, strict=True, extra="allow", allow_inf_nan=False)

    peft_type: Literal["LORA"]
    task_type: Literal["CAUSAL_LM"]
    r: Annotated[int, Field(ge=1)]
    lora_alpha: Annotated[float, Field(gt=0)]
    target_modules: Annotated[list[ModuleName], Field(min_length=1, max_length=100_000)]
    bias: Literal["none"] = "none"
    init_lora_weights: Literal[True] = True
    megatron_core: Literal["megatron.core"] | None = None
    # These say nothing about the merged weights. The layout goes by the module: the one flag cannot say it for several.
    fan_in_fan_out: bool = False
    lora_dropout: float = 0.0
    qalora_group_size: int = 16
    inference_mode: bool = True
    peft_version: str | None = None
    base_model_name_or_path: str | None = None

    @model_validator(mode="after")
    def _asks_for_nothing_else(self) -> Self:
        for name, value in (self.model_extra or {}).items():
            if value:
                raise ValueError(f"{shown(name)} is set, and plain LoRA alone is plugged in")
        return self

    @classmethod
    def load(cls, adapter: Path) -> "LoraSettings":
        """Read an adapter's file.

        Raises:
            BundleError: it is missing, too large, or asks for anything but plain LoRA on modules named exactly.
        """
        with bundle.open_listed(adapter, PEFT_SETTINGS) as file:
            content = file.read(MAX_CONFIG_BYTES + 1)
        if len(content) > MAX_CONFIG_BYTES:
            raise BundleError(
                f"{adapter / PEFT_SETTINGS} is over {MAX_CONFIG_BYTES} bytes: have the edge save it again"
            )
        try:
            return cls.model_validate_json(content)
        except ValidationError as error:
            first: dict[str, Any] = dict(error.errors(include_url=False)[0])
            where = "".join(f"{step}: " for step in first["loc"])
            reason = where + first["msg"].removeprefix("Value error, ")
            raise BundleError(f"{adapter / PEFT_SETTINGS} is refused ({reason}): have it trained without") from None


def shown(given: object) -> str:
    """A peer's word, short and harmless to a terminal."""
    return repr(given)[:120]
