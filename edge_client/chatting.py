"""Talking with a run's model: lines in, answers and what else they ask for out.

Knows runs and the lines' commands; knows no terminal, and nothing of how an answer is made.
"""

import re
import signal
from collections.abc import Iterable
from pathlib import Path

from rich.console import Console

from edge_client.conversation import Chat, Show
from edge_client.finished import Using, reassembled
from edge_client.generation import Drawing
from isthmus.errors import DataError, LimitError
from isthmus.ledger.record import Ledger
from isthmus.report.units import size
from isthmus.training.stopping import stopping

MISTYPED = re.compile(r"/\w+")
"""What is rather a command than a turn."""


def converse(
    run: Path,
    using: Using,
    lines: Iterable[str],
    show: Show,
    console: Console,
    new_tokens: int = 256,
    system: str | None = None,
    drawing: Drawing | None = None,
) -> None:
    """Answer lines, each a turn, until they end or one is `/quit`; `/new` begins anew, `/costs` shows what crossed.

    Ctrl-C during an answer stops it; the conversation goes on with what there is of it.

    Args:
        run: directory of the run.
        using: how the run's model is put together again.
        lines: what is said, asked for one after another.
        show: where answers go.
        console: where anything else is shown.
        new_tokens: of an answer at most.
        system: what the model is told before the conversation.
        drawing: how tokens are drawn; None: greedily.

    Raises:
        UsageError: the model is a classifier; or `system` is given and the model has no chat template.
        IsthmusError: whatever else stands in the way, each with its remedy.
    """
    ledger = Ledger()
    with reassembled(run, using, ledger, console) as (_, edge, tuning), edge.phase("generate"):
        chat = Chat(edge, tuning, new_tokens, system, drawing)
        for note in chat.notes:
            _note(console, note)
        for line in lines:
            match line.strip():
                case "":
                    pass
                case "/quit":
                    return
                case "/new":
                    chat.begin_anew()
                case "/costs":
                    up, down = (size(ledger.total("generate", way)) for way in ("up_bytes", "down_bytes"))
                    show(f"{up} up, {down} down\n")
                case said if MISTYPED.fullmatch(said):
                    _note(console, f"no command {said}, and nothing was sent: there are /new, /costs and /quit")
                case _ if _answer(chat, line, show, console) == signal.SIGTERM:
                    return


def _answer(chat: Chat, line: str, show: Show, console: Console) -> int | None:
    """Answer a turn; the signal that stopped the answer, if one did."""
    with stopping() as asked:
        try:
            if not chat.answer(line, show, asked):
                _note(console, "no answer came; the turn is left out of the conversation")
        except (DataError, LimitError) as error:
            _note(console, str(error))
    return asked[0] if asked else None


def _note(console: Console, text: str) -> None:
    console.print(text, markup=False, highlight=False, soft_wrap=True)
