"""What `predict` writes: each row as it was with the answer that it gets alone, whatever else happens meanwhile."""

import io
import json
import math
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from edge_client import predicting
from edge_client.cli import app
from edge_client.finished import Using, continue_prompt, evaluate, reassembled
from edge_client.generation import added_to
from edge_client.predicting import Predicted, predict
from isthmus.adapter_files import PEFT_WEIGHTS
from isthmus.errors import DataError, RunError, UsageError
from isthmus.ledger.record import Ledger
from tests.faults.training import run_here, settings
from tests.harness import Server
from tests.using.plain import Plain

NEW_TOKENS = 9
QUIET = Console(quiet=True)
PROMPTS = ["a gem", "dull", "the film was so", "no", "quick and odd and fine", "why", "slow", "bad", "x", "I did not"]


def line(**row: object) -> str:
    return json.dumps(row)


MIXED = [
    *(line(id=number, prompt=prompt) for number, prompt in enumerate(PROMPTS)),
    line(text="Once upon a time"),
    '  {"prompt" :"1.0e1\\u00e9", "weight": 1.50e+1, "nested": {"b": [1,  2]}, "label": null, "completion": 7}\r',
    "",
    line(prompt="good:", choices=[" no", " yes", " perhaps not"], id="c"),
    line(messages=[{"role": "system", "content": "be kind"}, {"role": "user", "content": "hello"}]),
    line(messages=[{"role": "user", "content": "and?"}, {"role": "assistant", "content": "that is left out"}]),
    line(prompt="odd:", choices=[" no", " yes"], answer=1),
]
"""Rows of every shape, written in several ways."""


def written(path: Path, *lines: str) -> Path:
    path.write_text("".join(f"{each}\n" for each in lines))
    return path


def answers(path: Path) -> list[dict[str, Any]]:
    return [json.loads(each) for each in path.read_text().splitlines()]


def by(plain: Plain, row: dict[str, Any], new_tokens: int = NEW_TOKENS) -> str:
    """The plain model's own answer to a row alone."""
    if "choices" in row:
        likelihoods = [plain.likelihood(row["prompt"], choice) for choice in row["choices"]]
        return str(row["choices"][likelihoods.index(max(likelihoods))])
    if "messages" in row:
        turns = [(turn["role"], turn["content"]) for turn in row["messages"]]
        return plain.after(plain.conversation(*(turns[:-1] if turns[-1][0] == "assistant" else turns)), new_tokens)
    return plain.after(row.get("prompt") or row["text"], new_tokens)


@pytest.mark.parametrize("batch_size", [1, 4, 64])
def test_every_row_gets_the_answer_that_the_whole_model_gives_it_alone_and_stays_as_it_was(
    run: Path, node: Server, plain: Plain, tmp_path: Path, batch_size: int
) -> None:
    data, out = written(tmp_path / "rows.jsonl", *MIXED), tmp_path / "out.jsonl"
    done = predict(run, data, out, Using("remote", node.address), QUIET, NEW_TOKENS, batch_size)
    lines = [each.strip() for each in MIXED if each]
    assert done.rows == len(lines)
    assert min(done.up_bytes, done.down_bytes) > 0 == done.shortened
    found = out.read_text().splitlines()
    assert [each[: len(row) - 1] + "}" for each, row in zip(found, lines, strict=True)] == lines
    for answer, row in zip(answers(out), map(json.loads, lines), strict=True):
        assert answer.keys() - row.keys() == {"prediction"} | ({"probabilities"} if "choices" in row else set())
        assert answer["prediction"] == by(plain, row), row
    lengths = {len(answer["prediction"]) for answer in answers(out) if "choices" not in answer}
    assert len({answer["prediction"] for answer in answers(out)}) > 5, "constant answers compare nothing"
    assert len(lengths) > 1, "no answer ended before the others of its batch"


def test_an_answer_ends_where_its_row_ends_whatever_fills_the_batch_behind_it(run: Path, plain: Plain) -> None:
    with reassembled(run, Using(), Ledger(), QUIET) as (_, edge, tuning):
        added = added_to(edge, tuning, [plain.ids(prompt) for prompt in PROMPTS], NEW_TOKENS)
    assert [plain.tokenizer.decode(ids) for ids in added] == [plain.after(prompt, NEW_TOKENS) for prompt in PROMPTS]
    assert len(set(map(len, added))) > 1


def test_the_choices_are_scored_as_evaluate_scores_them(
    run: Path, node: Server, plain: Plain, rows: Path, tmp_path: Path
) -> None:
    out, using = tmp_path / "out.jsonl", Using("remote", node.address)
    predict(run, rows, out, using, QUIET)
    found = answers(out)
    right = [row["choices"].index(row["prediction"]) == row["answer"] for row in found]
    assert 0 < sum(right) < len(right)
    assert sum(right) / len(right) == evaluate(run, rows, using, QUIET).score.accuracy
    for row in found[:4]:
        likelihoods = [plain.likelihood(row["prompt"], choice) for choice in row["choices"]]
        shares = [math.exp(value) / sum(map(math.exp, likelihoods)) for value in likelihoods]
        assert row["probabilities"] == pytest.approx(shares, rel=1e-4)
        assert row["prediction"] == row["choices"][shares.index(max(shares))]


def test_what_was_written_before_anything_died_is_kept_and_only_the_rest_is_asked_for(
    run: Path, node: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, using = written(tmp_path / "rows.jsonl", *MIXED), Using("remote", node.address)
    undisturbed, out = tmp_path / "undisturbed.jsonl", tmp_path / "out.jsonl"
    predict(run, data, undisturbed, using, QUIET, NEW_TOKENS, 1)
    calls, added_to = iter(range(100)), predicting.added_to

    def dies(*given: Any) -> Any:
        if next(calls) == 9:
            raise MemoryError("in the tenth batch")
        return added_to(*given)

    with monkeypatch.context() as patch:
        patch.setattr(predicting, "added_to", dies)
        with pytest.raises(MemoryError):
            predict(run, data, out, using, QUIET, NEW_TOKENS, 1)
    kept = out.read_bytes()
    assert kept.count(b"\n") >= 8
    assert undisturbed.read_bytes().startswith(kept)
    out.write_bytes(kept[:-7])
    resumed = predict(run, data, out, using, QUIET, NEW_TOKENS, 1, resume=True)
    assert out.read_bytes() == undisturbed.read_bytes()
    assert resumed.present == kept.count(b"\n") - 1
    assert resumed.present + resumed.rows == sum(bool(each) for each in MIXED)


def test_a_file_that_is_done_needs_no_server_to_go_on(run: Path, talker: Path, tmp_path: Path) -> None:
    data, out = written(tmp_path / "rows.jsonl", MIXED[0]), tmp_path / "out.jsonl"
    predict(run, data, out, Using("local", model=str(talker)), QUIET, 2)
    before = out.read_bytes()
    done = predict(run, data, out, Using("local", model=str(tmp_path / "gone")), QUIET, 2, resume=True)
    assert done == Predicted(0, 1, 0, 0.0, 0, 0)
    assert out.read_bytes() == before


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"new_tokens": 3}, "was begun with --max-new-tokens 2, not 3: go on with the same"),
        ({"using": Using()}, "was begun with --span local, not remote: go on with the same"),
        ({"adapter": b"another"}, "was begun with adapter [0-9a-f]{64}, not [0-9a-f]{64}: go on with the same"),
        ({"note": None}, "holds answers, but .*made-by.json does not tell what made them; choose another --out"),
        ({"note": "[3]"}, "holds answers, but .*made-by.json does not tell what made them; choose another --out"),
    ],
    ids=["tokens", "span", "adapter", "unknown", "unreadable"],
)
def test_answers_are_not_gone_on_with_by_what_did_not_make_them(
    run: Path, talker: Path, tmp_path: Path, change: dict[str, Any], said: str
) -> None:
    own, using = tmp_path / "run", Using("local", model=str(talker))
    shutil.copytree(run, own)
    data, out = written(tmp_path / "rows.jsonl", line(prompt="a"), line(prompt="b")), tmp_path / "out.jsonl"
    note = tmp_path / "out.jsonl.made-by.json"
    predict(own, written(tmp_path / "first.jsonl", line(prompt="a")), out, using, QUIET, 2)
    before = out.read_bytes()
    if "adapter" in change:
        (own / "adapter" / PEFT_WEIGHTS).write_bytes(change["adapter"])
    if "note" in change:
        note.unlink() if change["note"] is None else note.write_text(change["note"])
    with pytest.raises(UsageError, match=said):
        predict(own, data, out, change.get("using", using), QUIET, change.get("new_tokens", 2), resume=True)
    assert out.read_bytes() == before


def test_what_made_an_earlier_file_of_the_name_says_nothing_of_a_new_one(
    run: Path, talker: Path, tmp_path: Path
) -> None:
    data, out = written(tmp_path / "rows.jsonl", line(prompt="a")), tmp_path / "out.jsonl"
    for new_tokens in (2, 3):
        out.unlink(missing_ok=True)
        predict(run, data, out, Using("local", model=str(talker)), QUIET, new_tokens, resume=True)
    done = predict(run, data, out, Using("local", model=str(talker)), QUIET, 3, resume=True)
    assert done.present == 1


@pytest.mark.parametrize(
    ("there", "resume", "said"),
    [
        (['{"prompt": "a", "prediction": "b"}'], False, "go on with --resume, or choose another --out"),
        (['{"prompt": "a", "prediction": "b"}', '{"prompt": "other", "prediction": "b"}'], True, "out.jsonl:2 is no"),
        (['{"prompt": "a"}'], True, "out.jsonl:1 is no answer to a row"),
        (['{"prompt": "a", "prediction": "b'], True, "out.jsonl:1 is no answer to a row"),
        (['{"prompt": "a", "prediction": "b"}', '{"prompt": "c", "prediction": "b"}', "{}"], True, "out.jsonl:3 is no"),
    ],
)
def test_what_is_there_and_is_not_this_commands_is_refused_and_left_alone(
    run: Path, talker: Path, tmp_path: Path, there: list[str], resume: bool, said: str
) -> None:
    data = written(tmp_path / "rows.jsonl", line(prompt="a"), line(prompt="c"))
    out = written(tmp_path / "out.jsonl", *there)
    with out.open("a") as file:
        file.write('{"torn')
    before = out.read_bytes()
    with pytest.raises(UsageError, match=said):
        predict(run, data, out, Using("local", model=str(talker)), QUIET, 2, resume=resume)
    assert out.read_bytes() == before


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ('{"id": 3}', "has no key that asks anything"),
        ("{}", "has no key that asks anything"),
        ('{"prompt": "a", "text": "b"}', "'prompt', 'text', which is no shape"),
        ('{"text": "a", "choices": ["b", "c"]}', "'choices', 'text', which is no shape"),
        ('{"prompt": ""}', '"prompt" is empty'),
        ('{"prompt": "a", "choices": ["b"]}', '"choices" is not a list of at least two strings'),
        ('{"prompt": "a", "prediction": "b"}', "'prediction' already"),
        ('{"prompt": "a", "probabilities": []}', "'probabilities' already"),
        ('{"messages": []}', '"messages" is not a list of turns'),
        ('{"messages": [{"role": "assistant", "content": "a"}]}', "no assistant turn after"),
        ('{"messages": [{"role": "system", "content": "a"}]}', "no user's turn at its end"),
        ('{"messages": [{"role": "user"}]}', 'exactly "role" and "content"'),
        ('{"prompt": "a"', "is not JSON"),
        ('["a"]', "is not a JSON object"),
        ('{"prompt": "a", "id": 1, "id": 2}', "the key 'id' twice"),
    ],
)
def test_a_row_that_asks_nothing_is_refused_by_its_line_before_anything_is_written(
    run: Path, talker: Path, tmp_path: Path, row: str, said: str
) -> None:
    data, out = written(tmp_path / "rows.jsonl", line(prompt="a"), "", row), tmp_path / "out.jsonl"
    with pytest.raises(DataError) as refused:
        predict(run, data, out, Using("local", model=str(talker)), QUIET, 2)
    assert str(refused.value).startswith(f"{data}:3: ")
    assert said in str(refused.value)
    assert not out.exists() or not out.read_bytes()


def test_a_row_whose_scores_are_not_finite_is_named_by_its_line(
    run: Path, talker: Path, plain: Plain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    @contextmanager
    def poisoned(*given: Any) -> Iterator[Any]:
        with reassembled(*given) as (config, edge, tuning):
            with torch.no_grad():
                edge.model.get_input_embeddings().weight[plain.ids("Q")] = math.nan
            yield config, edge, tuning

    monkeypatch.setattr(predicting, "reassembled", poisoned)
    asked = [line(prompt=prompt, choices=[" no", " yes"]) for prompt in ("a", "long ago it was", "b Q", "c", "Q", "d")]
    data = written(tmp_path / "rows.jsonl", line(prompt="x"), "", *asked)
    with pytest.raises(RunError, match=f"^{data}:5: the likelihoods of its choices are not finite; train with a lower"):
        predict(run, data, tmp_path / "out.jsonl", Using("local", model=str(talker)), QUIET, 2)


def test_a_file_without_rows_is_told_in_a_line(run: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no rows"):
        predict(run, written(tmp_path / "rows.jsonl", ""), tmp_path / "out.jsonl", Using(), QUIET)


def test_a_long_prompt_loses_its_beginning_and_it_is_said_how_many_did(
    run: Path, node: Server, plain: Plain, tmp_path: Path
) -> None:
    long = "word after word " * 20
    data, out = written(tmp_path / "rows.jsonl", line(prompt=long), line(prompt="short")), tmp_path / "out.jsonl"
    said = Console(file=io.StringIO(), width=200)
    done = predict(run, data, out, Using("remote", node.address), said, NEW_TOKENS)
    assert done.shortened == 1
    assert "1 of 2 rows are too long and lose the beginning" in said.file.getvalue()  # type: ignore[attr-defined]
    kept = 256 - NEW_TOKENS
    assert answers(out)[0]["prediction"] == plain.after(plain.ids(long)[-kept:], NEW_TOKENS)
    with pytest.raises(UsageError, match="lower it"):
        predict(run, data, tmp_path / "other.jsonl", Using("remote", node.address), QUIET, 255)


def test_of_a_classifiers_long_row_the_end_is_lost_and_said_to_be(
    classifier: Path, node: Server, tmp_path: Path
) -> None:
    begun = "a gem " * 60
    data = written(tmp_path / "rows.jsonl", *(line(text=begun + end) for end in ("", "dull " * 9)))
    said, out = Console(file=io.StringIO(), width=200), tmp_path / "out.jsonl"
    assert predict(classifier, data, out, Using(), said).shortened == 2
    assert "2 of 2 rows are too long and lose the end of their text" in said.file.getvalue()  # type: ignore[attr-defined]
    first, second = answers(out)
    assert first["probabilities"] == second["probabilities"]


@pytest.mark.parametrize(
    "way",
    [{"peft": "prompt"}, {"method": "side", "reduction": 4, "tap_every": 2, "tap_width": 24}],
    ids=["virtual-tokens", "side"],
)
def test_batches_beside_a_side_network_or_behind_virtual_tokens_give_what_each_row_gets_alone(
    node: Server, rows: Path, tmp_path: Path, way: dict[str, Any]
) -> None:
    run, out, said = tmp_path / "run", tmp_path / "out.jsonl", Console(file=io.StringIO(), width=200)
    run_here(
        settings(node, rows, steps=2, lr=0.3, **{"cache": tmp_path / "kept"} if "method" in way else {}, **way), run
    )
    data = written(tmp_path / "rows.jsonl", *(line(prompt=prompt) for prompt in PROMPTS))
    predict(run, data, out, Using(), said, NEW_TOKENS, 4)
    alone = [continue_prompt(run, prompt, NEW_TOKENS, Using(), QUIET).text for prompt in PROMPTS[:6]]
    assert [row["prediction"] for row in answers(out)][:6] == alone
    assert ("each token runs the whole text again" in said.file.getvalue()) == ("method" in way)  # type: ignore[attr-defined]


def test_the_command_says_what_was_done_and_what_crossed(run: Path, node: Server, tmp_path: Path) -> None:
    data, out = written(tmp_path / "rows.jsonl", *MIXED[:3]), tmp_path / "out.jsonl"
    given = ["predict", "--run", str(run), "--data", str(data), "--out", str(out), "--max-new-tokens", "3"]
    done = CliRunner().invoke(app, [*given, "--span", "remote", "--server", node.address])
    assert done.exit_code == 0, done.output
    assert done.stdout.startswith("3 rows answered, ")
    assert f"rows/s: {out}\n" in done.stdout
    assert done.stdout.endswith(" down\n")
    assert "predict" in done.stderr
    assert "3/3" in done.stderr
    assert len(answers(out)) == 3
    again = CliRunner().invoke(app, given)
    assert "go on with --resume" in str(again.exception)
