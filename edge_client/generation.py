"""Continuing texts with an edge model, one or several at once.

Knows `generate` and tokenizers; the span's key-value cache is the span's own affair.
"""

from collections.abc import Sequence
from typing import Any

import torch

from edge_client.edge_model import EdgeModel, device_of
from edge_client.tuning import Tuning
from isthmus.errors import UsageError

WHOLE_TEXT_AGAIN = "side network: no keys and values are kept, so each token runs the whole text again"


def continued(edge: EdgeModel, tuning: Tuning, prompt: str, new_tokens: int) -> str:
    """What a model adds to `prompt`, greedily, at most `new_tokens` tokens."""
    (added,) = added_to(edge, tuning, [edge.tokenizer(prompt)["input_ids"]], new_tokens)
    return text_of(edge, added)


def added_to(
    edge: EdgeModel, tuning: Tuning, prompts: Sequence[Sequence[int]], new_tokens: int, **settings: Any
) -> list[list[int]]:
    """The tokens that a model adds to each prompt, the end of sequence left out.

    A row's tokens are those that it gets alone. Beside a side network no keys and values are kept: each token runs the
    whole text again.

    Args:
        edge: the model's edge.
        tuning: what is called.
        prompts: token ids; of one length where virtual tokens stand in front, which padding would push away.
        new_tokens: to add to each at most.
        settings: of `generate`, such as how tokens are drawn; greedily unless they say otherwise.

    Raises:
        UsageError: the model is a classifier.
    """
    if edge.found.new:
        raise UsageError("a classifier continues no text; ask it for labels with `edge_client predict`")
    width = max(map(len, prompts))
    # A penalty of what a text holds looks at padding too: a row's own first token is no news to it.
    ids_BT = torch.tensor([[*[ids[0]] * (width - len(ids)), *ids] for ids in prompts])
    mask_BT = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in prompts])
    place = device_of(edge)
    with torch.no_grad():
        output_BT: torch.Tensor = tuning.model.generate(
            input_ids=ids_BT.to(place),
            attention_mask=mask_BT.to(place),
            max_new_tokens=new_tokens,
            use_cache=tuning.side is None,
            **{"do_sample": False, **settings},
        )  # type: ignore[operator]
    ends = _ends_of_sequence(tuning)
    return [_before(ends, ids) for ids in output_BT[:, width:].tolist()]


def text_of(edge: EdgeModel, ids: Sequence[int]) -> str:
    """Tokens as text, without special ones."""
    return str(edge.tokenizer.decode(ids, skip_special_tokens=True))


def longest_text(edge: EdgeModel, tuning: Tuning) -> int | None:
    """Tokens that a text may have together with what is added to it; None: no limit is known."""
    of_model = getattr(edge.model.config.get_text_config(), "max_position_embeddings", None)
    limits = [limit for limit in (edge.row_tokens, of_model) if limit]
    return min(limits) - tuning.virtual_tokens if limits else None


def _ends_of_sequence(tuning: Tuning) -> frozenset[int]:
    ends = getattr(tuning.base.generation_config, "eos_token_id", None)
    return frozenset([ends] if isinstance(ends, int) else ends or ())


def _before(ends: frozenset[int], ids: list[int]) -> list[int]:
    """A row's tokens up to its first end of sequence; what is behind it was made for longer rows."""
    return ids[: next((at for at, token in enumerate(ids) if token in ends), len(ids))]
