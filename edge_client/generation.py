"""Continuing texts with an edge model, one or several at once.

Knows `generate` and tokenizers; the span's key-value cache is the span's own affair. A model's files say where a text
ends, and nothing else of how it is made: they are a peer's, and answers are made as the user asked.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel

from edge_client.edge_model import EdgeModel, device_of
from edge_client.tuning import Tuning
from isthmus.errors import ModelError, UsageError

WHOLE_TEXT_AGAIN = "side network: no keys and values are kept, so each token runs the whole text again"
MOST_ENDS = 64
"""Tokens that may end a text."""


@dataclass(frozen=True)
class Drawing:
    """How tokens are drawn.

    Attributes:
        temperature: that logits are divided by.
        top_p: probability of the likeliest tokens that are drawn from.
        seed: of the draws; None: another each time.
    """

    temperature: float
    top_p: float = 1.0
    seed: int | None = None


def continued(edge: EdgeModel, tuning: Tuning, prompt: str, new_tokens: int) -> str:
    """What a model adds to `prompt`, greedily, at most `new_tokens` tokens."""
    (added,) = added_to(edge, tuning, [edge.tokenizer(prompt)["input_ids"]], new_tokens)
    return text_of(edge, added)


def added_to(
    edge: EdgeModel,
    tuning: Tuning,
    prompts: Sequence[Sequence[int]],
    new_tokens: int,
    drawing: Drawing | None = None,
    **passed: Any,
) -> list[list[int]]:
    """The tokens that a model adds to each prompt, the end of sequence left out.

    A row's tokens are those that it gets alone. Beside a side network no keys and values are kept: each token runs the
    whole text again.

    Args:
        edge: the model's edge.
        tuning: what is called.
        prompts: token ids; of one length where virtual tokens stand in front, which padding would push away.
        new_tokens: to add to each at most.
        drawing: how tokens are drawn; None: greedily.
        passed: to `generate`, such as what shows tokens as they come.

    Raises:
        UsageError: the model is a classifier.
        ModelError: the model's files end texts in what is no token.
    """
    refuse_classifier(edge)
    ends, width, place = _ends_of_sequence(tuning.base), max(map(len, prompts)), device_of(edge)
    settings = _settings(ends, new_tokens, drawing, keep=tuning.side is None)
    ids_BT = torch.tensor([[0] * (width - len(ids)) + list(ids) for ids in prompts])
    mask_BT = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in prompts])
    with torch.no_grad(), _by_nothing_but(settings, tuning.base):
        output_BT: torch.Tensor = tuning.model.generate(
            input_ids=ids_BT.to(place), attention_mask=mask_BT.to(place), generation_config=settings, **passed
        )  # type: ignore[operator]
    return [_before(ends, ids) for ids in output_BT[:, width:].tolist()]


def refuse_classifier(edge: EdgeModel) -> None:
    """Let a model pass that can continue a text.

    Raises:
        UsageError: it is a classifier.
    """
    if edge.found.new:
        raise UsageError("a classifier continues no text; ask it for labels with `edge_client predict`")


def text_of(edge: EdgeModel, ids: Sequence[int]) -> str:
    """Tokens as text, without special ones."""
    return str(edge.tokenizer.decode(ids, skip_special_tokens=True))


def longest_text(edge: EdgeModel, tuning: Tuning) -> int | None:
    """Tokens that a text may have together with what is added to it; None: no limit is known."""
    of_model = getattr(edge.model.config.get_text_config(), "max_position_embeddings", None)
    limits = [limit for limit in (edge.row_tokens, of_model) if limit]
    return min(limits) - tuning.virtual_tokens if limits else None


def _settings(ends: list[int], new_tokens: int, drawing: Drawing | None, keep: bool) -> GenerationConfig:
    """All that decides an answer; of tokens that are drawn `generate` would take the 50 likeliest by itself."""
    drawn: dict[str, Any] = {"do_sample": False}
    if drawing is not None:
        drawn = {"do_sample": True, "temperature": drawing.temperature, "top_p": drawing.top_p, "top_k": 0}
    return GenerationConfig(eos_token_id=ends or None, max_new_tokens=new_tokens, use_cache=keep, **drawn)


@contextmanager
def _by_nothing_but(settings: GenerationConfig, model: PreTrainedModel) -> Iterator[None]:
    """In here the model has no settings but these: `generate` fills with the model's own what it is not told."""
    own, model.generation_config = model.generation_config, settings
    try:
        yield
    finally:
        model.generation_config = own


def _ends_of_sequence(model: PreTrainedModel) -> list[int]:
    named = getattr(model.generation_config, "eos_token_id", None)
    ends = named if isinstance(named, list) else [] if named is None else [named]
    tokens = range(model.config.get_text_config().vocab_size)
    if len(ends) > MOST_ENDS or not all(type(end) is int and end in tokens for end in ends):
        raise ModelError(
            f"the model's eos_token_id is not one to {MOST_ENDS} of its {len(tokens)} tokens; "
            "have its owner correct generation_config.json"
        )
    return ends


def _before(ends: list[int], ids: list[int]) -> list[int]:
    """A row's tokens up to its first end of sequence; what is behind it was made for longer rows."""
    return ids[: next((at for at, token in enumerate(ids) if token in ends), len(ids))]
