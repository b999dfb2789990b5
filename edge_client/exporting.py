"""Cores as an ordinary LoRA of `peft`: folded with the factors around them, where the whole model is at hand.

Knows runs that are done and adapter folders; asks no server. Without the model's weights the factors cannot be had, and
a core is of use over the wire only.
"""

from pathlib import Path

import peft
import torch
from rich.console import Console
from safetensors.torch import save_file

from edge_client.adapter_folder import PEFT_METADATA
from edge_client.adapter_settings import save_settings
from edge_client.core import Core
from edge_client.finished import Using, reassembled
from edge_client.port_adapters import CORE_OF
from edge_client.tuning import Tuning
from isthmus.adapter_files import PEFT_WEIGHTS
from isthmus.errors import UsageError
from isthmus.ledger.record import Ledger
from isthmus.report.schema import RunReport


def export_cores(run: Path, model: str | None, out: Path, console: Console, key_file: Path | None = None) -> int:
    """Write a run's cores to `out` as a LoRA that `peft` loads; returns how many modules it has.

    Raises:
        UsageError: the run has no cores, trained a classifier's head beside them, or the whole model is not given.
        IsthmusError: whatever else stands in the way of putting the run's model together.
    """
    if RunReport.load(run).exchange != "core":
        raise UsageError(f"{run} trained no cores: its adapter folder is its export; use {run / 'adapter'}")
    if model is None:
        raise UsageError(
            "the factors around these cores are made of the owner's weights, so they work over the wire only; give "
            "--model DIR_OR_ID if the owner has granted you the whole model"
        )
    if out.exists():
        raise UsageError(f"{out} is there already; choose another --out, or remove it")
    using = Using("local", model=model, key_file=key_file)
    with reassembled(run, using, Ledger(), console) as (_, edge, tuning):
        if tuning.new:
            raise UsageError("a classifier's head trained beside these cores: use them over the wire")
        tensors, config = folded(tuning)
        config.base_model_name_or_path = edge.name
        out.mkdir(parents=True)
        save_file(tensors, out / PEFT_WEIGHTS, metadata=PEFT_METADATA)
        save_settings(config, out)
    return len(config.target_modules or ())


@torch.no_grad()
def folded(tuning: Tuning) -> tuple[dict[str, torch.Tensor], peft.LoraConfig]:
    """What `peft` has in its file and its settings for cores whose modules are all here: down, and up times core."""
    tensors: dict[str, torch.Tensor] = {}
    names = [name.removesuffix(f".{CORE_OF}.weight") for name in tuning.held()]
    for name in names:
        core = tuning.base.get_submodule(f"{name}.{CORE_OF}")
        if not isinstance(core, Core):
            raise UsageError(f"{name} has no core")
        up_OR = core.get_buffer("up_OR").float() @ core.weight * core.scale
        tensors[f"base_model.model.{name}.lora_A.weight"] = core.get_buffer("down_RI").float().cpu().contiguous()
        tensors[f"base_model.model.{name}.lora_B.weight"] = up_OR.cpu().contiguous()
    rank = tuning.rank or 0
    config = peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=rank,
        lora_alpha=rank,
        target_modules=names,
        fan_in_fan_out=getattr(tuning.base.get_submodule(names[0]), "nf", None) is not None,
        inference_mode=True,
    )
    return tensors, config
