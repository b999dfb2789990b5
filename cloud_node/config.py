"""What `cloud_node serve` is told: flags over a configuration file, checked.

Knows names, types and which combinations make sense; starts nothing.
"""

from pathlib import Path
from typing import Annotated, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from cloud_node.policy.rules import read_policy
from isthmus.cut import Cut
from isthmus.errors import UsageError
from isthmus.trust.address import is_loopback, split_address

Quantize: TypeAlias = Literal["int8", "nf4"]
"""Weights of the span's linear modules: LLM.int8 (Dettmers et al., 2022), or 4-bit NormalFloat (QLoRA, 2023)."""


class ServeConfig(BaseModel):
    """Settings of a cloud node; each is a flag and a key of the configuration file."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str
    cut: Annotated[list[str], Field(min_length=1)] = ["2:2"]
    listen: str = "127.0.0.1:7070"
    device: str = "auto"
    dtype: Literal["float32", "bfloat16"] = "float32"
    quantize: Quantize | None = None
    certs: Path | None = None
    insecure: bool = False
    policy: Path | None = None
    activation_budget: Annotated[int, Field(ge=0)] = 4 << 30
    threads: Annotated[int, Field(ge=1)] | None = None
    grace: Annotated[float, Field(ge=0)] = 30.0
    emulators: Path | None = None
    submissions: Path | None = None
    signers: Path | None = None
    rounds: Path | None = None
    round_wait: Annotated[float, Field(gt=0)] = 60.0
    engine: Literal["inprocess", "ray"] = "inprocess"
    stages: Annotated[int, Field(ge=1)] = 1
    replicas: str = "1:1"
    address: str | None = None
    status_port: Annotated[int, Field(ge=0, le=65535)] | None = None
    status_host: Annotated[str, Field(min_length=1)] | None = None
    audit: Path | None = None
    log_format: Literal["text", "json"] = "text"
    log_level: Literal["debug", "info", "warning"] = "info"

    @field_validator("cut")
    @classmethod
    def _cuts_parse(cls, cuts: list[str]) -> list[str]:
        if len({Cut.parse(cut) for cut in cuts}) < len(cuts):
            raise UsageError("a cut is named twice")
        return cuts

    @field_validator("replicas")
    @classmethod
    def _replicas_parse(cls, replicas: str) -> str:
        least, colon, most = replicas.partition(":")
        if not (colon and least.isdecimal() and most.isdecimal()):
            raise UsageError(f"{replicas!r} is not of the form MIN:MAX, such as 1:4")
        if not 1 <= int(least) <= int(most):
            raise UsageError(f"{replicas}: the least is 1 or more, and the most no less than that")
        return replicas

    @model_validator(mode="after")
    def _ray_is_asked_for(self) -> "ServeConfig":
        if self.engine != "ray" and (self.stages > 1 or self.replicas != "1:1" or self.address is not None):
            raise UsageError("--stages, --replicas and --address are for --engine ray; give it with them")
        return self

    @model_validator(mode="after")
    def _status_has_a_port(self) -> "ServeConfig":
        if self.status_host is not None and self.status_port is None:
            raise UsageError("--status-host says where the status page is served; give --status-port with it")
        if self.status_port and self.status_port == split_address(self.listen)[1]:
            raise UsageError(f"--listen and --status-port both ask for port {self.status_port}; choose another for one")
        return self

    @model_validator(mode="after")
    def _safe_to_listen(self) -> "ServeConfig":
        if self.certs is not None and self.insecure:
            raise UsageError("--certs and --insecure contradict each other; give one")
        host, _ = split_address(self.listen)
        if self.certs is None and not self.insecure and not is_loopback(host):
            raise UsageError(
                f"{host} can be reached from other machines: give --certs DIR "
                "(made by `cloud_node certs init`), or --insecure to serve in plaintext all the same"
            )
        return self

    @model_validator(mode="after")
    def _policy_reads(self) -> "ServeConfig":
        if self.policy is not None:
            read_policy(self.policy)  # before anything is loaded
        return self

    @model_validator(mode="after")
    def _rounds_are_of_certificates(self) -> "ServeConfig":
        if self.rounds is not None and self.certs is None:
            raise UsageError("--rounds needs --certs: edges sign the keys that hide what they send")
        return self

    @model_validator(mode="after")
    def _signers_are_known_by_certificates(self) -> "ServeConfig":
        if self.signers is not None and (self.submissions is None or self.certs is None):
            raise UsageError("--signers says who may sign submissions; give --submissions and --certs with it")
        if self.submissions is not None and self.certs is not None and self.signers is None:
            raise UsageError(
                "--submissions needs --signers, the folder of the keys that edges sign with: "
                "the one that `cloud_node certs issue` fills is certs/authority/issued"
            )
        for folder, flag in ((self.emulators, "--emulators"), (self.signers, "--signers")):
            if folder is not None and not folder.is_dir():
                raise UsageError(f"{flag}: there is no folder {folder}")
        return self

    @property
    def least_and_most_replicas(self) -> tuple[int, int]:
        """Between how many copies of the span are run."""
        least, _, most = self.replicas.partition(":")
        return int(least), int(most)

    @property
    def cuts(self) -> list[Cut]:
        """The cuts offered."""
        return [Cut.parse(cut) for cut in self.cut]
