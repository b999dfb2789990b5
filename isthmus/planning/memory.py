"""What a pass keeps for its backward, from shapes alone: a model on the meta device counted as a real one is.

Knows modules on the meta device and `TensorPeak`, which measures runs; knows no side, no method and no settings.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from isthmus.ledger.memory import TensorPeak

FLASH = 1
"""What `torch._fused_sdp_choice` calls an attention that keeps no scores."""


class Keeping:
    """Counts what autograd keeps of passes through modules, whose own parameters and buffers are left out."""

    def __init__(self, model: nn.Module) -> None:
        """Watch a model on the meta device."""
        self._peak = TensorPeak(model)

    @contextmanager
    def counting(self, padded: bool) -> Iterator[None]:
        """Count what is run in here; `padded` says that rows differ in length, so that masks are not all ones."""
        with self._peak.saving(), _AsWithValues(padded):
            yield

    @property
    def kept_bytes(self) -> int:
        """Bytes that are kept now."""
        return self._peak.live_bytes - self._peak.resident_bytes


class _AsWithValues(TorchFunctionMode):
    """Lets the meta device do what a processor would."""

    def __init__(self, padded: bool) -> None:
        super().__init__()
        self._padded = padded

    def __torch_function__(self, func: Any, _: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.Tensor.__bool__ and args[0].is_meta:
            return not self._padded  # families ask whether a mask is all ones, and whether positions follow one another
        if func is torch._grouped_mm and args[0].is_meta:
            product: torch.Tensor = _Grouped.apply(args[0], args[1], kwargs["offs"])  # type: ignore[no-untyped-call]
            return product
        if func is scaled_dot_product_attention and (args[0] if args else kwargs["query"]).is_meta:
            return _attention(*args, **kwargs)
        return func(*args, **kwargs)


def route_as_told(model: nn.Module) -> None:
    """Let experts run as they do where there are values, which `isthmus.blocks.route_by_token` has changed."""
    for module in model.modules():
        config: Any = getattr(module, "config", None)
        if getattr(config, "_experts_implementation", None) is not None:
            config._experts_implementation = "grouped_mm"


class _Grouped(torch.autograd.Function):
    """Each token times its expert's matrix: [N, I] and [E, I, O] to [N, O]. Its backward is never run."""

    @staticmethod
    def forward(context: Any, tokens_NI: torch.Tensor, weights_EIO: torch.Tensor, ends_E: torch.Tensor) -> torch.Tensor:
        wants_tokens, wants_weights, _ = context.needs_input_grad
        kept = ((weights_EIO, wants_tokens), (tokens_NI, wants_weights), (ends_E, True))
        context.save_for_backward(*(tensor for tensor, wanted in kept if wanted))
        return tokens_NI.new_empty(len(tokens_NI), weights_EIO.shape[-1])


def _attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """Attention as torch computes it where there are values: on the meta device it takes the way that keeps all scores.

    Args: as `scaled_dot_product_attention` has them.
    """
    small = [torch.empty(1, one.shape[1], 2, one.shape[3], dtype=one.dtype) for one in (query, key, value)]
    mask = None if attn_mask is None else torch.empty(1, 1, 2, 2, dtype=attn_mask.dtype)
    choose: Any = torch._fused_sdp_choice
    chosen = choose(*small, mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
    if chosen != FLASH:
        return scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = torch.empty_like(attn_mask, dtype=query.dtype)  # torch makes such a one in each block
    attended_BHTD: torch.Tensor
    attended_BHTD, _ = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale
    )
    return attended_BHTD
