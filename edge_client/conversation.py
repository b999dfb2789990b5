"""A conversation with a model: turns to tokens, answers shown as they come.

Knows chat templates and `generate`; knows no run, no terminal and no commands.

What the model has kept of earlier turns is kept on, here and on the cloud, as long as the conversation's tokens begin
with the very tokens that it was kept of. A template may write an answer otherwise than it was made, and then the whole
conversation runs again: an answer is that of a fresh run of the same conversation.
"""

import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import DynamicCache
from transformers.generation import BaseStreamer, StoppingCriteria, StoppingCriteriaList

from edge_client.edge_model import EdgeModel
from edge_client.generation import WHOLE_TEXT_AGAIN, Drawing, added_to, longest_text, refuse_classifier, text_of
from edge_client.questions import Questions
from edge_client.tuning import Tuning
from isthmus.errors import LimitError, UsageError

NO_TEMPLATE = "the model has no chat template: each turn is appended to the text, which the model continues"

Show = Callable[[str], None]
"""Takes text as it comes."""


class Chat:
    """A conversation by the model's chat template, or a text that goes on where it has none."""

    def __init__(
        self,
        edge: EdgeModel,
        tuning: Tuning,
        new_tokens: int,
        system: str | None = None,
        drawing: Drawing | None = None,
    ) -> None:
        refuse_classifier(edge)
        self._templated = bool(edge.tokenizer.chat_template)
        if system is not None and not self._templated:
            raise UsageError("--system needs a chat template, which the model lacks; leave it out")
        self._edge = edge
        self._tuning = tuning
        self._new_tokens = new_tokens
        self._questions = Questions(edge.tokenizer, sys.maxsize, sys.maxsize)
        self._before = [_turn("system", system)] if system is not None else []
        self._drawing = drawing
        if drawing is not None:
            _seed(drawing)
        self.begin_anew()

    @property
    def notes(self) -> list[str]:
        """What somebody who begins should know."""
        asides = {NO_TEMPLATE: not self._templated, WHOLE_TEXT_AGAIN: self._tuning.side is not None}
        return [text for text, applies in asides.items() if applies]

    def begin_anew(self) -> None:
        """Forget what was said."""
        self._turns = list(self._before)
        self._kept: tuple[DynamicCache, list[int]] | None = None

    def answer(self, text: str, show: Show, asked: Sequence[int] = ()) -> str:
        """Answer a turn and keep both in the conversation; an empty answer leaves it as it was.

        Args:
            text: of the turn.
            show: is given the answer as it comes, and a line's end.
            asked: stops the answer once it is not empty any more.

        Raises:
            LimitError: the conversation is longer than the model or the server takes.
            DataError: the chat template refuses it.
        """
        turns = [*self._turns, _turn("user", text)]
        ids = self._tokens(turns)
        limit = longest_text(self._edge, self._tuning)
        room = self._new_tokens if limit is None else min(self._new_tokens, limit - len(ids))
        if room < 1:
            raise LimitError(
                f"with this turn the conversation has {len(ids)} tokens of the {limit} that the model takes; "
                "begin anew with /new, or say it in fewer words"
            )
        shown = _Shown(self._edge, show)
        answer = text_of(
            self._edge,
            self._added(ids, room, streamer=shown, stopping_criteria=StoppingCriteriaList([_Stopped(asked)])),
        )
        shown.finish(answer)
        if answer:
            self._turns = [*turns, _turn("assistant", answer)]
        return answer

    def _tokens(self, turns: list[dict[str, str]]) -> list[int]:
        if self._templated:
            return list(self._questions.answering(turns).ids)
        return list(self._questions.after("".join(turn["content"] for turn in turns), "text").ids)

    def _added(self, ids: list[int], room: int, **passed: Any) -> list[int]:
        """The tokens of an answer; keys and values of those before it are taken from the turns before, and kept."""
        if self._tuning.side is not None or self._tuning.virtual_tokens:
            return added_to(self._edge, self._tuning, [ids], room, self._drawing, **passed)[0]
        cache, held = self._kept or (None, [])
        self._kept = None  # an error leaves it halfway
        if cache is None or ids[: len(held)] != held or len(ids) == len(held):
            cache = DynamicCache(config=self._edge.model.config)
        passed["past_key_values"] = cache
        (added,) = added_to(self._edge, self._tuning, [ids], room, self._drawing, **passed)
        if not any(cache.is_sliding):  # which forgets its beginning
            self._kept = cache, [*ids, *added][: cache.get_seq_length()]
        return added


def _turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def _seed(drawing: Drawing) -> None:
    if drawing.seed is None:
        torch.seed()
    else:
        torch.manual_seed(drawing.seed)


class _Shown(BaseStreamer):  # type: ignore[misc]
    """Shows tokens as text; half a character waits for its other half."""

    def __init__(self, edge: EdgeModel, show: Show) -> None:
        self._edge = edge
        self._show = show
        self._ids: list[int] | None = None
        self._length = 0

    def put(self, value: torch.Tensor) -> None:
        """Take the prompt, and then one token after another."""
        if self._ids is None:
            self._ids = []
            return
        self._ids += value.tolist()
        text = text_of(self._edge, self._ids)
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):
            self._show_rest(text)

    def end(self) -> None:
        """Nothing: the whole answer comes by `finish`."""

    def finish(self, text: str) -> None:
        """Show what is left of the whole answer, and end the line."""
        self._show_rest(text + "\n")

    def _show_rest(self, text: str) -> None:
        self._show(text[self._length :])
        self._length = len(text)


class _Stopped(StoppingCriteria):  # type: ignore[misc]
    """Stops between two tokens, when the user has asked to."""

    def __init__(self, asked: Sequence[int]) -> None:
        self._asked = asked

    def __call__(self, input_ids: torch.Tensor, *_: object, **__: object) -> torch.Tensor:
        return torch.full((len(input_ids),), bool(self._asked), device=input_ids.device)
