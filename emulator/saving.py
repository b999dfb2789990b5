"""Rewrite a whole model into a folder of its own, which says where it is from.

Knows a model's files and one trial run; knows no adapters, and nothing of what changes the weights.
"""

import json
import shutil
from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import Any, Protocol

import torch
from rich.console import Console
from safetensors import SafetensorError
from transformers import PreTrainedModel

from emulator.changes import Changed
from emulator.folder import appearing, refuse_taken
from isthmus import __version__
from isthmus.architectures import reads_both_ways
from isthmus.blocks import find_blocks
from isthmus.classifier import Head
from isthmus.errors import BundleError, UsageError
from isthmus.load import DTYPES, load_trimmed
from isthmus.training.progress import meter
from isthmus.weights import COMPANIONS

ORIGIN, ORIGIN_FORMAT = "plugged_in.json", "isthmus-plugged-in/1"
"""What says where a plugged-in model is from; it is no part of the model, and no bundle made of it has it."""

PROBED = 16
"""Tokens, spread over the vocabulary, that a plugged-in model is tried on."""


class Checked(Protocol):
    """An adapter that was checked against a model."""

    @property
    def model(self) -> str:
        """Digest of the model."""

    @property
    def labels(self) -> int | None:
        """Of a classifier; None: it is none."""

    @property
    def bundle(self) -> str | None:
        """Id of its manifest; None where there is none."""

    @property
    def signer(self) -> str | None:
        """Fingerprint of the key that it was checked against; None where none was given."""


def rewrite(
    model: Path, out: Path, adapter: Checked, change: Callable[[PreTrainedModel], Changed], console: Console
) -> Changed:
    """Write the whole model as `change` leaves it, in its own dtype, with tokenizer and what else stands beside it.

    The folder appears whole or not at all. A classifier's adapter makes a classifier.

    `plugged_in.json` says where the model is from: digest of the model that was changed (`model_digest`), id of the
    adapter's bundle (`adapter`; null: it has no manifest), SHA-256 of the public key that it was checked against
    (`signer`; null: against none) and the version that did it (`isthmus`).

    Raises:
        BundleError: `change` does, or what the model then makes of a few tokens is not finite.
        ModelError: the model cannot be read.
        UsageError: `out` holds something, or cannot be written.
    """
    out = out.resolve()
    refuse_taken(out)
    with meter(console, "merge", 3) as progress:
        head = None if adapter.labels is None else Head(adapter.labels)
        whole, _ = load_trimmed(model, "auto", find_blocks, head=head)
        progress.update(1, "merging")
        changed = change(whole)
        progress.update(2, "saving")
        _save(whole, model, out, adapter)
        progress.update(3)
    return changed


def _save(whole: PreTrainedModel, model: Path, out: Path, adapter: Checked) -> None:
    origin = {
        "format": ORIGIN_FORMAT,
        "model_digest": adapter.model,
        "adapter": adapter.bundle,
        "signer": adapter.signer,
        "isthmus": __version__,
    }
    try:
        with appearing(out) as folder:
            whole.save_pretrained(folder)
            for name in COMPANIONS:
                if name != "config.json" and (model / name).is_file():
                    shutil.copyfile(model / name, folder / name)
            (folder / ORIGIN).write_text(json.dumps(origin, indent=1) + "\n", encoding="utf-8")
            probe(whole)
    except (OSError, SafetensorError) as error:
        raise UsageError(f"{out} cannot be written ({error}); make room, or name another folder with --out") from None


@torch.no_grad()
def probe(whole: PreTrainedModel) -> None:
    """Run a model once, in a type that it can be served in, which it is in afterwards.

    Values can each be finite and yet overflow where they meet.

    Raises:
        BundleError: a hidden state or a logit is not finite.
    """
    if whole.dtype not in DTYPES.values():
        whole.float()
    made = whole(**_probing(whole), output_hidden_states=True)
    if not all(tensor.isfinite().all() for tensor in (*made.hidden_states, made.logits)):
        raise BundleError(
            "with these tuned ends what the model gives is not finite: have the ends tuned again, with less --lr"
        )


def _probing(whole: PreTrainedModel) -> dict[str, Any]:
    """One row of tokens from all over the vocabulary, or one picture."""
    if whole.main_input_name == "pixel_values":
        shape_CHW = (whole.config.num_channels, whole.config.image_size, whole.config.image_size)
        return {"pixel_values": torch.linspace(-1, 1, prod(shape_CHW), dtype=whole.dtype).view(1, *shape_CHW)}
    vocabulary = whole.get_input_embeddings().num_embeddings
    ids_BT = torch.arange(PROBED)[None] * vocabulary // PROBED
    return {"input_ids": ids_BT} | ({} if reads_both_ways(whole.config) else {"use_cache": False})
