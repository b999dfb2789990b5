"""The ways to train that a plan shows side by side, what they are called, and the commands that train so.

Knows settings; plans nothing.
"""

import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from edge_client.config import TrainConfig
from edge_client.peft_methods import METHODS
from edge_client.plan_settings import DECIDING, PlanSettings


@dataclass(frozen=True)
class Way:
    """A way to train.

    Attributes:
        chosen: settings that make it what it is.
        usual: settings of it that stand unless they were told.
    """

    chosen: Mapping[str, Any]
    usual: Mapping[str, Any] = field(default_factory=dict)

    def configured(self, settings: PlanSettings) -> TrainConfig:
        """Its settings with those that were told.

        Raises:
            UsageError: they make no sense together.
        """
        unsaid = {name: value for name, value in self.usual.items() if name not in settings.run}
        return settings.configured({**unsaid, **self.chosen})

    def name(self, settings: PlanSettings) -> str:
        """What it is called, also where what was told does not fit it."""
        told = {name: value for name, value in settings.run.items() if name in NAMING}
        return name_of(self.configured(settings.model_copy(update={"run": told})))


NAMING: Final = ("train", "exchange", "kr_active", "codec")
"""What a way is called by, beside its method."""

WAYS: Final = (
    Way({"method": "split"}),
    Way({"method": "split", "codec": "int8"}),
    Way({"method": "split", "train": "top"}),
    Way({"method": "side"}),
    Way({"method": "dlora", "exchange": "activations", "kr_active": None}),
    Way({"method": "dlora", "exchange": "parameters", "kr_active": None}),
    Way({"method": "dlora", "exchange": "activations"}, {"kr_active": 0.125}),
    Way({"method": "dlora", "exchange": "core", "kr_active": None}),
    Way({"method": "offsite"}),
    Way({"method": "local"}),
)
"""What a newcomer chooses from; the last, the whole model on the edge, is what the others are compared with."""


def name_of(config: TrainConfig) -> str:
    """What a way to train is called in a table: at most 19 characters with shares of at most three digits."""
    if config.method == "local":
        return "local"
    name: str = config.method
    if config.method == "split" and config.train == "top":
        name = "split, top"
    if config.method == "dlora":
        name = "dlora" if config.exchange == "activations" else str(config.exchange)
        name += "" if config.kr_active is None else f", {100 * config.kr_active:.3g} %"
    return name if config.codec == "none" else f"{name}, {config.codec}"


def command_of(config: TrainConfig) -> str:
    """The command that trains so, but for files and the server."""
    words = ["edge_client", "train"]
    for name in DECIDING:
        value, usual = getattr(config, name), TrainConfig.model_fields[name].default
        if name in ("rank", "alpha"):
            usual = METHODS[config.peft].default(name)  # type: ignore[arg-type]
        if not value or value == usual or (name == "peft" and value == "side") or _implied(config, name):
            continue
        flag = f"--{name.replace('_', '-')}"
        for written in _written(value):
            words += [flag, shlex.quote(written)] if written else [flag]
    return " ".join(words)


def _implied(config: TrainConfig, name: str) -> bool:
    if name == "init":
        return config.init == "svd"
    return name == "exchange" and config.method == "dlora" and config.exchange == "activations"


def _written(value: object) -> list[str]:
    """A setting as one flag's values; a mapping is a flag given several times, a switch has none."""
    if value is True:
        return [""]
    if isinstance(value, Mapping):
        return [f"{name}={one}" for name, one in value.items()]
    if isinstance(value, list | tuple):
        return [",".join(map(str, value))]
    return [f"{value:g}" if isinstance(value, float) else str(value)]
