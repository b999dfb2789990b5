"""A conversation: answers are those of a fresh run of it, come as they are made, and can be stopped."""

import io
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from edge_client.chatting import converse
from edge_client.cli import app
from edge_client.conversation import NO_TEMPLATE, Chat
from edge_client.finished import Using, reassembled
from edge_client.generation import Drawing
from isthmus.errors import UsageError
from isthmus.ledger.record import Ledger
from tests.faults.training import run_here, settings
from tests.harness import Server
from tests.parity.reference import HIDDEN
from tests.using.conftest import TEMPLATE
from tests.using.plain import Plain

NEW_TOKENS = 12
SAID = ["hello there", "and what of it", "why"]


class Talk:
    """What was shown and noted in a conversation of these lines."""

    def __init__(self, run: Path, using: Using, *lines: str, **given: Any) -> None:
        self.pieces: list[str] = []
        console = Console(file=io.StringIO(), width=1000)
        converse(run, using, self._asked(lines), self.show, console, **{"new_tokens": NEW_TOKENS, **given})
        self.noted = console.file.getvalue()  # type: ignore[attr-defined]

    def _asked(self, lines: tuple[str, ...]) -> Iterator[str]:
        self.asked = 0
        for line in lines:
            self.asked += 1
            yield line

    def show(self, text: str) -> None:
        self.pieces.append(text)

    @property
    def answers(self) -> list[str]:
        return "".join(self.pieces).split("\n")[:-1]


@contextmanager
def chatting(run: Path, ledger: Ledger, template: str = TEMPLATE) -> Iterator[Chat]:
    """A conversation whose turns are taken one by one."""
    with reassembled(run, Using(), ledger, Console(quiet=True)) as (_, edge, tuning), edge.phase("generate"):
        edge.tokenizer.chat_template = template
        yield Chat(edge, tuning, NEW_TOKENS)


def silent(text: str) -> None:
    pass


def alternating(said: list[str], answered: list[str]) -> list[tuple[str, str]]:
    """The turns of a conversation, up to the one that is to be answered."""
    turns = [(role, text) for pair in zip(said, answered, strict=False) for role, text in zip(ROLES, pair, strict=True)]
    return [*turns, *(("user", text) for text in said[len(answered) :])]


ROLES = ("user", "assistant")


def test_every_answer_is_that_of_a_fresh_run_of_the_same_conversation(run: Path, plain: Plain) -> None:
    talk = Talk(run, Using(), *SAID, " ", "/new", *SAID[:1], "/quit", "unheard")
    first = talk.answers[:3]
    for number, answer in enumerate(first):
        turns = alternating(SAID[: number + 1], first[:number])
        assert answer == plain.after(plain.conversation(*turns), NEW_TOKENS)
    assert len(set(first)) == 3
    assert talk.answers[3:] == first[:1], "it began anew"
    assert talk.asked == 7, "nothing is heard after /quit"
    assert talk.noted == ""


def test_what_was_run_for_earlier_turns_is_kept_so_that_every_token_crosses_once(run: Path, plain: Plain) -> None:
    ledger = Ledger()
    with chatting(run, ledger) as chat:
        answers = [chat.answer(text, silent) for text in SAID]
    asked = plain.ids(plain.conversation(*alternating(SAID, answers[:2])))
    run_last = min(len(answers[2]), NEW_TOKENS - 1)  # of letters, each a token; nothing comes after the last one
    assert ledger.total("generate", "up_payload_bytes") == 4 * HIDDEN * (len(asked) + run_last)


def test_an_answer_that_the_template_writes_otherwise_is_run_again_as_it_is_written(run: Path, plain: Plain) -> None:
    plain.tokenizer.chat_template = TEMPLATE.replace("m['content']", "m['content'] | upper")
    with chatting(run, Ledger(), plain.tokenizer.chat_template) as chat:
        answers = [chat.answer(text, silent) for text in SAID]
    written = [plain.after(plain.conversation(*alternating(SAID[: n + 1], answers[:n])), NEW_TOKENS) for n in range(3)]
    plain.tokenizer.chat_template = TEMPLATE
    assert answers == written


def test_the_system_is_told_before_everything_and_again_after_beginning_anew(run: Path, plain: Plain) -> None:
    talk = Talk(run, Using(), SAID[0], "/new", SAID[0], system="be brief")
    expected = plain.after(plain.conversation(("system", "be brief"), ("user", SAID[0])), NEW_TOKENS)
    assert talk.answers == [expected, expected]
    assert expected != plain.after(plain.conversation(("user", SAID[0])), NEW_TOKENS)


def test_an_interrupt_stops_the_answer_and_the_conversation_goes_on_with_what_there_is_of_it(
    run: Path, plain: Plain
) -> None:
    class Interrupting(Talk):
        def show(self, text: str) -> None:
            super().show(text)
            if len("".join(self.pieces)) == 3:
                signal.raise_signal(signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    talk = Interrupting(run, Using(), *SAID[:2])
    whole = plain.after(plain.conversation(("user", SAID[0])), NEW_TOKENS)
    stopped, second = talk.answers
    assert stopped == whole[: len(stopped)]
    assert len(stopped) < len(whole)
    assert second == plain.after(plain.conversation(*alternating(SAID[:2], [stopped])), NEW_TOKENS)
    assert signal.getsignal(signal.SIGINT) is before


def test_a_process_that_is_told_to_end_in_an_answer_ends_the_conversation(run: Path) -> None:
    class Ending(Talk):
        def show(self, text: str) -> None:
            super().show(text)
            signal.raise_signal(signal.SIGTERM) if len(self.pieces) == 1 else None

    talk = Ending(run, Using(), *SAID)
    assert len(talk.answers) == talk.asked == 1


def test_answers_come_in_pieces_and_cost_what_costs_says(run: Path) -> None:
    talk = Talk(run, Using(), "/costs", SAID[0], "/costs")
    none, *answer, costs = talk.pieces
    assert len(answer) > 3
    assert none == "0 B up, 0 B down\n"
    assert costs.endswith(" down\n")
    assert costs != none


def test_a_command_that_there_is_not_is_no_turn_and_sends_nothing(run: Path) -> None:
    talk = Talk(run, Using(), "/cost", "/quti", "/costs")
    assert "no command /cost, and nothing was sent: there are /new, /costs and /quit" in talk.noted
    assert "no command /quti" in talk.noted
    assert talk.answers == ["0 B up, 0 B down"]


def test_a_model_without_a_template_goes_on_with_the_text_and_it_is_said_once(
    servers: dict[str, Server], tiny_models: dict[str, Path], rows: Path, tmp_path: Path
) -> None:
    run_here(settings(servers["llama"], rows, steps=1), tmp_path / "run")
    talk = Talk(tmp_path / "run", Using(), "The film ", "/new", "The film ", " and so")
    assert talk.noted.count(NO_TEMPLATE) == 1
    first, again, second = "".join(talk.pieces).split("\n")[:-1]
    plain = Plain(tiny_models["llama"], tmp_path / "run")
    assert first == again == plain.after("The film ", NEW_TOKENS)
    assert second == plain.after(f"The film {first} and so", NEW_TOKENS)
    with pytest.raises(UsageError, match="leave it out"):
        Talk(tmp_path / "run", Using(), system="be brief")


def test_a_classifier_is_refused_before_anything_is_asked(classifier: Path) -> None:
    def asked() -> Iterator[str]:
        pytest.fail("a line was asked for")
        yield ""

    with pytest.raises(UsageError, match="a classifier continues no text"):
        converse(classifier, Using(), asked(), silent, Console(quiet=True))


def test_a_conversation_that_has_grown_too_long_says_what_to_do_and_can_begin_anew(run: Path, plain: Plain) -> None:
    talk = Talk(run, Using(), SAID[0], "word " * 60, SAID[1], "/new", SAID[0])
    assert talk.noted.count("of the 256 that the model takes; begin anew with /new") == 1
    first, second, again = talk.answers
    assert first == again
    assert second == plain.after(plain.conversation(*alternating(SAID[:2], [first])), NEW_TOKENS), "as if unsaid"


def test_drawn_answers_are_those_of_their_seed(run: Path) -> None:
    def drawn(seed: int | None, top_p: float = 1.0) -> list[str]:
        return Talk(run, Using(), *SAID[:2], drawing=Drawing(1.5, top_p, seed)).answers

    assert drawn(1) == drawn(1)
    assert drawn(1) != drawn(2)
    assert drawn(None) != drawn(None)
    assert drawn(3, top_p=1e-6) == Talk(run, Using(), *SAID[:2]).answers, "the likeliest token alone is left"


def test_the_command_takes_turns_from_a_pipe_and_shows_no_prompt(run: Path) -> None:
    given = ["chat", "--run", str(run), "--max-new-tokens", str(NEW_TOKENS)]
    done = CliRunner().invoke(app, given, input="\n".join([*SAID, "/costs"]))
    assert done.exit_code == 0, done.output
    *answers, costs = done.stdout.splitlines()
    assert answers == Talk(run, Using(), *SAID).answers
    assert costs.endswith(" down")


@pytest.mark.parametrize("ending", [KeyboardInterrupt, EOFError])
def test_at_the_prompt_an_interrupt_or_the_end_of_input_ends_the_conversation(
    run: Path, monkeypatch: pytest.MonkeyPatch, ending: type[BaseException]
) -> None:
    typed = iter([SAID[0]])

    def types(_: str) -> str:
        for text in typed:
            return text
        raise ending

    monkeypatch.setattr("builtins.input", types)
    done = CliRunner().invoke(app, ["chat", "--run", str(run), "--max-new-tokens", str(NEW_TOKENS)])
    assert done.exit_code == 0
    assert done.stdout.splitlines() == Talk(run, Using(), SAID[0]).answers


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--seed", "1"], "give --temperature as well"),
        (["--top-p", "0.5"], "give --temperature as well"),
        (["--temperature", "0"], "leave it out for greedy answers"),
        (["--temperature", "1", "--top-p", "1.5"], "outside 0 to 1"),
    ],
)
def test_flags_that_draw_nothing_are_refused(tmp_path: Path, flags: list[str], said: str) -> None:
    done = CliRunner().invoke(app, ["chat", "--run", str(tmp_path), *flags])
    assert isinstance(done.exception, UsageError)
    assert said in str(done.exception)
