"""The span as a module that stands in the model, and its passes as one differentiable function.

Knows autograd, rows and caches; knows no wire, no optimizer and no data. It returns what the blocks would have.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import Cache

from edge_client.passes import RemoteBackbone, Sequence
from edge_client.port_adapters import PortAdapters, PortWork
from isthmus.architectures import reads_both_ways
from isthmus.blocks import BlockList, call_context, find_cache, stand_for
from isthmus.errors import CutError, NotKeptError
from isthmus.rows import Rows, pack, pad, rows_of_batch
from isthmus.training.outputs import wanted_positions


class _Passes(torch.autograd.Function):
    """Both passes of the remote span as one function, differentiable in the packed hidden states and the adapters."""

    @staticmethod
    def forward(
        context: Any,
        hidden_ND: torch.Tensor,
        remote: RemoteBackbone,
        rows: Rows,
        work: PortWork | None,
        keep: bool,
        *_: torch.Tensor,  # the parameters of `work`
    ) -> torch.Tensor:
        output_KD, sent = remote.forward(hidden_ND, rows, keep, work, context.needs_input_grad[0])
        context.remote, context.sent = remote, sent
        return output_KD

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(context: Any, grad_KD: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        sent = context.sent
        grad_ND = context.remote.backward(sent, grad_KD)
        adapters = sent.work.gradients() if sent.work is not None else []
        return grad_ND if sent.below else None, None, None, None, None, *adapters


class RemoteSpan(nn.Module):
    """Stands at the span's first block; the blocks behind it are pass-throughs.

    Where no block stands above the span, only the positions that reach the head come back.
    """

    def __init__(
        self,
        number: int,
        found: BlockList,
        remote: RemoteBackbone,
        topmost: bool,
        adapters: PortAdapters | None = None,
    ) -> None:
        """Stand at block `number`; `topmost` says that no block is above the span; `adapters` answer at its ports."""
        super().__init__()
        stand_for(self, found.blocks[number])
        self._adapters = adapters
        self._number = number
        self._found = found
        self._remote = remote
        self._topmost = topmost
        self._reads_first = bool(found.new) and reads_both_ways(found.owner.config)

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """What the span's blocks would return for `hidden_states` [B, T, D]."""
        cache = find_cache(args, kwargs)
        if cache is None:
            return self._found.result(self._pass(hidden_states))
        past = cache.get_seq_length(self._number)
        history = _History.extend(cache, self._number, hidden_states)
        if torch.is_grad_enabled() and (hidden_states.requires_grad or self._adapters is not None):
            if past:
                raise CutError("no gradient reaches back through a cache; call the model without past_key_values")
            return self._found.result(self._pass(hidden_states))
        return self._found.result(self._decode(cache, hidden_states, history, past))

    def _pass(self, hidden_BTD: torch.Tensor) -> torch.Tensor:
        context, shape = call_context(), (hidden_BTD.shape[0], hidden_BTD.shape[1])
        wanted_BT = wanted_positions() if self._topmost else None
        mask_BT = context.attention_mask_BT
        if self._reads_first and mask_BT is not None and not bool(mask_BT[:, 0].all()):
            raise CutError("an encoder's head reads the first position of each row; pad on the right")
        rows, index_N = rows_of_batch(shape, mask_BT, context.position_ids_BT, wanted_BT=wanted_BT)
        packed_ND, work = pack(hidden_BTD, index_N), self._begin()
        weights = work.parameters if work is not None else []
        keep = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (packed_ND, *weights))
        output_KD: torch.Tensor = _Passes.apply(  # type: ignore[no-untyped-call]
            packed_ND, self._remote, rows, work, keep, *weights
        )
        if rows.wanted_N is None:
            return pad(output_KD, index_N, shape)
        tokens = torch.arange(rows.tokens) if index_N is None else index_N
        return pad(output_KD, tokens[rows.wanted_N], shape)

    def _begin(self) -> PortWork | None:
        return self._adapters.begin(self._remote.phase) if self._adapters is not None else None

    @torch.no_grad()
    def _decode(self, cache: Cache, hidden_BTD: torch.Tensor, history: "_History", past: int) -> torch.Tensor:
        context, shape = call_context(), (hidden_BTD.shape[0], hidden_BTD.shape[1])
        rows, index_N = rows_of_batch(shape, context.attention_mask_BT, context.position_ids_BT, past)
        sequence: Sequence | None = getattr(cache, "isthmus_sequence", None)
        output_ND: torch.Tensor | None = None
        if past and sequence is not None and history.in_place and len(set(rows.lengths)) == 1:
            try:
                packed_ND = pack(hidden_BTD, index_N)
                output_ND, sequence = self._remote.decode(packed_ND, rows, sequence, self._begin())
            except NotKeptError:
                output_ND = None  # the server was restarted or has dropped it: the edge holds the whole past
        if output_ND is None:
            output_ND, sequence = self._prefill(history, rows, past, shape)
        cache.isthmus_sequence = sequence
        return pad(output_ND, index_N, shape)

    def _prefill(
        self, history: "_History", now: Rows, past: int, shape: tuple[int, int]
    ) -> tuple[torch.Tensor, Sequence]:
        """Begin a sequence with everything so far; only the tokens at hand come back."""
        mask_BT = call_context().attention_mask_BT
        width = past + shape[1]
        if history.hidden_BTD.shape[1] != width:
            raise CutError(
                "the cloud lost this generation, and a sliding cache does not hold its beginning; start over"
            )
        wanted_BT = torch.arange(width).expand(shape[0], width) >= past
        real_BT = torch.ones_like(wanted_BT) if mask_BT is None else mask_BT.bool().cpu()
        starts_B = torch.tensor(now.starts) - real_BT[:, :past].sum(1)
        positions_BT = real_BT.cumsum(1) - 1 + starts_B[:, None]
        rows, index_N = rows_of_batch((shape[0], width), mask_BT, positions_BT, wanted_BT=wanted_BT if past else None)
        return self._remote.decode(pack(history.hidden_BTD, index_N), rows, None, self._begin())


@dataclass
class _History:
    """The span's input so far, kept in its block's own cache entry, so that whatever reorders caches moves it too."""

    hidden_BTD: torch.Tensor
    in_place: bool  # each row's past was made by this same row

    @classmethod
    def extend(cls, cache: Cache, number: int, hidden_BTD: torch.Tensor) -> "_History":
        rows, tokens, _ = hidden_BTD.shape
        made_by = torch.arange(rows, dtype=torch.float32, device=hidden_BTD.device)
        hidden, makers = cache.update(
            hidden_BTD.detach()[:, None], made_by.view(rows, 1, 1, 1).expand(rows, 1, tokens, 1), number
        )
        return cls(hidden[:, 0], bool((makers[:, 0, :, 0] == made_by[:, None]).all()))
