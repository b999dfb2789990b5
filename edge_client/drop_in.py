"""A Hugging Face model whose middle runs on a cloud node, for whoever brings a training loop of their own.

Knows how to connect and what such a model cannot do; trains nothing. Loops, `peft`, `Trainer` and `generate` work on it
as on any other model: what they call is the model's own class, and the span is one module in it.
"""

import os
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NoReturn

from transformers import PreTrainedModel

from edge_client.assemble import connect as assemble
from edge_client.config import CodecName, TrainConfig
from edge_client.edge_model import EdgeModel
from isthmus.errors import UsageError
from isthmus.ledger.record import Ledger
from isthmus.settings import validated


def connect(
    address: str,
    *,
    cut: str | None = None,
    labels: int | Sequence[str] | None = None,
    certs: str | Path | None = None,
    insecure: bool = False,
    dtype: Literal["float32", "bfloat16"] = "float32",
    device: str = "auto",
    codec: CodecName = "none",
    codec_gradient: CodecName | None = None,
    deterministic: bool = False,
    patience: float = 120.0,
    ledger: Ledger | None = None,
) -> PreTrainedModel:
    """The model behind a cloud node, its ends here, frozen, and its span there.

    The model's `edge` (an `EdgeModel`) holds its tokenizer, its cut and the line to the cloud; the line is closed with
    `model.edge.close()`, when the model is collected, and at exit. Several forwards may be under way before their
    backwards; a backward whose activations the cloud no longer has sends their input again.

    Args:
        address: HOST:PORT of a `cloud_node serve`.
        cut: one of those on offer, such as `"2:2"`; None where there is only one.
        labels: how many a classifier of texts or pictures shall tell apart, or their names. Its head is made here,
            frozen like the rest until it is told to train (see `head`). None: a language model, or a bare encoder.
        certs: the folder that the model's owner issued; None on loopback without certificates.
        insecure: speak in plaintext to another machine.
        dtype: of the ends.
        device: of the ends.
        codec: how hidden states are encoded.
        codec_gradient: how gradients are; None: as hidden states.
        deterministic: have the cloud compute each request alone.
        patience: seconds without any progress after which a lost line is given up.
        ledger: where to count what crosses; None: in one of its own, which nobody reads.

    Raises:
        IsthmusError: whatever stands in the way, each with its remedy.
    """
    given = {
        "method": "split",
        "data": os.devnull,  # the loop's own affair
        "server": address,
        "cut": cut,
        "labels": tuple(range(labels)) if isinstance(labels, int) else labels,
        "certs": certs,
        "insecure": insecure,
        "dtype": dtype,
        "device": device,
        "codec": codec,
        "codec_gradient": codec_gradient,
        "deterministic": deterministic,
        "patience": patience,
    }
    edge = assemble(validated(TrainConfig, given), ledger or Ledger(), lambda *_: None)
    model: Any = edge.model
    model.edge = edge
    model.save_pretrained = _refuse_to_save
    if edge.link is not None:
        weakref.finalize(model, edge.link.close)
    return edge.model


def modules(model: PreTrainedModel, *names: str) -> list[str]:
    """The full names of the modules on the edge whose last name is one of `names`: for `target_modules`.

    With them, what `peft` saves names what was trained and nothing else, and loads into the whole model as it is.

    Raises:
        UsageError: the model is not one of `connect`, or a name is no module of the ends.
    """
    edge = getattr(model, "edge", None)
    if not isinstance(edge, EdgeModel):
        raise UsageError("this model was not made by edge_client.connect")
    found = [name for name, _ in model.named_modules() if name.rpartition(".")[2] in names]
    missing = set(names) - {name.rpartition(".")[2] for name in found}
    if missing:
        raise UsageError(f"no module on the edge is called {', '.join(sorted(missing))}")
    return found


def head(model: PreTrainedModel) -> list[str]:
    """The names of the modules of a classifier's head, which its owner does not have: for `modules_to_save`.

    Raises:
        UsageError: the model is not one of `connect`, or no classifier.
    """
    edge = getattr(model, "edge", None)
    if not isinstance(edge, EdgeModel) or not edge.found.new:
        raise UsageError("this model is no classifier of edge_client.connect; give that labels")
    return list(edge.found.new)


def _refuse_to_save(*_: Any, **__: Any) -> NoReturn:
    raise UsageError(
        "the middle of this model is elsewhere, so it cannot be saved as a whole; save what you trained, "
        "with save_pretrained of the peft model, or the state_dict of its trainable parameters"
    )
