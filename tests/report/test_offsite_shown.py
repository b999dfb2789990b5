"""The table of offsite tuning on the terminal, as Markdown and as JSON, and the commands for rows that are missing."""

import hashlib
import json
import shlex
from io import StringIO
from pathlib import Path
from types import SimpleNamespace

from rich.console import Console
from typer.main import get_command
from typer.testing import CliRunner

from edge_client.cli import app
from edge_client.config import TrainConfig
from edge_client.outcome import Outcome
from edge_client.runs import RunDirectory
from isthmus.report import evaluated as beside
from isthmus.report.evaluated import Evaluated, Kept
from isthmus.report.fields.offsite import Watched
from isthmus.report.fields.score import Score
from isthmus.report.gains import in_words
from isthmus.report.offsite import tables
from isthmus.report.render import as_json, markdown, offsite_tables
from isthmus.report.schema import RunReport
from isthmus.report.units import size
from isthmus.training.scoring import Scores
from tests.report.example import costing, report, settings
from tests.report.offsite_example import (
    EMULATED,
    FULL,
    PLUGGED,
    ZERO,
    alone,
    carried_on,
    evaluated,
    everything,
    kept,
    offsite,
    per_row,
    score,
    scored,
    spending,
    table,
)

PLACING = "--peft lora --rank 8 --alpha 32.0 --targets q_proj,v_proj --dropout 0.05"
STEPPING = (
    "--lr 0.002 --schedule cosine --warmup-steps 3 --clip-norm 0.5 --batch-size 6 --max-length 96 --seed 7 "
    "--dtype float32"
)
NEW = "--data ROWS --eval-data HELD-OUT --out NEW"


def drawn(runs: dict[str, RunReport], width: int) -> list[str]:
    console = Console(width=width, file=StringIO(), color_system=None)
    for shown in offsite_tables(runs, kept(runs)):
        console.print(shown)
    return console.file.getvalue().splitlines()  # type: ignore[attr-defined,no-any-return]


def test_a_row_takes_one_line_of_a_hundred_columns_and_two_of_eighty() -> None:
    wide, narrow = drawn(everything(), 100), drawn(everything(), 80)
    line = next(line for line in wide if line.startswith("tuned on the emulator"))
    assert line.split()[4:] == [
        *("75.5", "[72.7,78.1]", "0.4200"),
        *("12.0", "T", "911", "MB", "312", "MB", "250.0"),
    ]
    assert "tuned on the        75.5 [72.7,78.1]  0.4200  12.0 T   911 MB   312 MB     250.0" in narrow
    assert "emulator" in [line.rstrip() for line in narrow]
    huge = {**alone(), "on": carried_on(PLUGGED, score(86.8, 13.3), 12_345)}
    huge["off"] = spending(huge["off"], 987_654_321_000, 876_543 * 10**12, 12_345.6)
    for width in (100, 80):
        assert not any("…" in line or len(line) > width for line in drawn(huge, width))


def test_terminal_and_markdown_say_the_emulator_every_sentence_and_every_command() -> None:
    runs = everything()
    said = in_words(table(runs))
    emulator = "rank, 26 blocks, 160 MB, 33 % of the span's FLOPs, gap +0.257 nats per token (owner's public text)"
    text, lines = markdown(runs, kept(runs)), " ".join(drawn(runs, 500))
    for one in (*said, emulator):
        assert one in text
        assert one in lines
    assert "| plugged in | 84.0 [81.6,86.1] | 0.3600 | 12.0 T | 911 MB | 312 MB | 250.0 |" in text
    assert "| plugged in | 160 MB | 0 B | - | 0 B | - |" in text
    assert "| true span throughout | 170 MB | 168 MB | 43.0 MB | 0 B | 381 MB |" in text
    for command in table(alone()).missing:
        assert f": `{command}`" in markdown(alone(), kept(alone()))
        assert f": {command} " in " ".join(drawn(alone(), 500)) + " "
    assert "Missing" not in text
    assert "Offsite" not in markdown({"full": scored(ZERO, FULL)})


def test_a_missing_row_has_the_command_that_would_make_it_and_a_filled_one_none() -> None:
    assert not table(everything()).missing
    scoring = "edge_client evaluate --run runs/off --data HELD-OUT"
    split = "edge_client train --method split"
    assert table(alone()).missing == {
        f"{scoring} --span remote --server HOST:PORT --untouched": ["untouched model"],
        f"{scoring} --span remote --server HOST:PORT": ["plugged in"],
        f"{split} --from runs/off --server HOST:PORT --steps N {STEPPING} {NEW}": ["plus N true steps"],
        f"{split} --server HOST:PORT --cut 2:2 {PLACING} --steps 100 {STEPPING} {NEW}": ["true span throughout"],
    }
    served = list(table(alone(server="cloud:7070", train="top")).missing)
    assert served[1] == f"{scoring} --span remote"
    assert f"--server cloud:7070 --cut 2:2 {PLACING} --train top --steps" in served[3]
    cut_short = table({"off": offsite(EMULATED, score(None, None))}).missing
    assert next(iter(cut_short.items())) == ("edge_client train --resume --out runs/off", ["tuned on the emulator"])


def test_a_run_without_held_out_rows_is_compared_with_nothing_and_says_what_to_do() -> None:
    nothing = score(None, None)
    bare = scored(ZERO, FULL, eval_data=None)
    made = table({"off": offsite(nothing, nothing, eval_data=None), "full": bare})
    again, *others = made.missing.items()
    train = f"edge_client train --method offsite --emulator DIR --cut 2:2 {PLACING} --steps 100 {STEPPING}"
    assert again == (
        f"{train} --data ROWS --eval-data HELD-OUT --out SCORED",
        ["untouched emulator", "tuned on the emulator"],
    )
    assert [labels for _, labels in others] == [
        *(["untouched model"], ["plugged in"], ["plus N true steps"], ["true span throughout"])
    ]
    assert all("--run SCORED" in command or "--method split" in command for command, _ in others)
    assert {one.score for one in made.rows} == {None}


def test_the_printed_command_is_taken_and_makes_the_same_tuning(tmp_path: Path) -> None:
    """Every flag of it exists, and its settings are those of the run."""
    command = list(table(alone(settings=settings(targets=("q_proj", "a b")))).missing)[-1]
    (tmp_path / "rows.jsonl").write_bytes(b"")
    filled = command.replace("ROWS", str(tmp_path / "rows.jsonl")).replace("HOST:PORT", "h:1")
    _, _, *words = shlex.split(filled)
    train = get_command(app).commands["train"]  # type: ignore[attr-defined]
    given = train.make_context("train", words).params
    given["targets"] = given["targets"].split(",")
    config = TrainConfig.model_validate({name: given[name] for name in TrainConfig.model_fields if given.get(name)})
    told = Outcome._settings(SimpleNamespace(config=config))  # type: ignore[arg-type]
    assert told == settings(targets=("q_proj", "a b"), data=hashlib.sha256(b"").hexdigest())
    assert (config.rank, config.seed, config.steps, config.cut, config.dtype) == (8, 7, 100, "2:2", "float32")


def looking(run: RunReport) -> RunReport:
    """The run with looks that sent what a run on the true span sends to be scored."""
    return costing(run, wire={"by_phase": scored(ZERO, FULL).cost.wire.by_phase})


def test_looks_at_the_true_span_are_shown_with_what_they_sent() -> None:
    points = Watched(step=0, loss=0.48, accuracy=0.78), Watched(step=1_000, loss=0.36, accuracy=None)
    emulator = alone()["off"].offsite
    assert emulator is not None
    found = {"watched": points, "watched_rows": 128, "watched_untouched": ZERO, "watched_seconds": 27.34}
    runs = {"off": looking(alone(offsite=emulator.model_copy(update=found))["off"])}
    text, lines = markdown(runs, kept(runs)), drawn(runs, 80)
    sent = "hidden states of 128 rows were sent for each (43.0 MB and 27.3 s in all):"
    assert sent in text
    assert sent in " ".join(" ".join(lines).split())
    for cells in (("untouched", "78.0", "0.4800"), ("0", "78.0", "0.4800"), ("1,000", "-", "0.3600")):
        assert f"| {' | '.join(cells)} |" in text
        assert list(cells) in [line.split() for line in lines]
    assert "Looks at" not in markdown(alone(), kept(alone()))
    assert "Looks at" not in " ".join(drawn(alone(), 80))


def test_looks_are_neither_evaluating_nor_training_in_the_columns_of_runs() -> None:
    emulator = alone()["off"].offsite
    assert emulator is not None
    found = {"watched": (Watched(step=0, loss=0.48, accuracy=None),), "watched_seconds": 27.34}
    off, full = looking(alone(offsite=emulator.model_copy(update=found))["off"]), scored(ZERO, FULL)
    text, crossed = markdown({"off": off, "full": full}), full.cost.wire.by_phase.eval
    evaluated = f"{size(crossed.up_bytes)} / {size(crossed.down_bytes)}"
    assert f"| Evaluating | 0 B / 0 B | {evaluated} |" in text
    assert f"| Looks at the true span | {evaluated} | - |" in text
    assert "| Looks, not in it | 27.34 s | - |" in text
    assert "Looks" not in markdown({"full": scored(ZERO, FULL)})


def test_a_fetch_that_was_spared_says_how_much_is_here() -> None:
    emulator = alone()["off"].offsite
    assert emulator is not None
    cached = emulator.model_copy(update={"bundle_bytes": 275_000_000})
    runs = {name: spending(run, 0, 1, 1.0) for name, run in alone(offsite=cached).items()}
    assert "| tuned on the emulator | 275 MB (already here) | 0 B |" in markdown(runs, kept(runs))
    on = {**runs, "on": carried_on(PLUGGED, FULL)}
    assert "| plus 10 true steps | 7.00 MB + 275 MB (already here) | 0 B |" in markdown(on, kept(on))
    older = {"off": spending(alone()["off"], 0, 1, 1.0)}
    assert "| tuned on the emulator | already here | 0 B |" in markdown(older, kept(older))


def test_a_reference_that_was_not_the_same_tuning_is_named_as_such() -> None:
    other = settings(learning_rate=0.1, batch_size=7, targets=None, data="11" * 32)
    runs = {**everything(), "full": scored(ZERO, FULL, steps=100, settings=other, seed=8)}
    unlike = (
        "full, on the true span throughout, was not the same tuning: seed 8 where this one had 7, learning rate 0.1 "
        "where this one had 0.002, batch size 7 where this one had 6, targets the usual where this one had "
        "q_proj,v_proj, other training rows."
    )
    said = in_words(table(runs))
    assert said[1] == unlike
    assert said[2].startswith("Tuning on the true span throughout gained (accuracy +9.4 points [")
    assert said[2].endswith("), but by another tuning: no share of it is told.")
    assert not any("about" in sentence for sentence in said)
    assert unlike in markdown(runs, kept(runs))
    assert unlike in json.loads(as_json(runs, kept(runs)))["offsite_tables"]["off"]["words"]
    assert not any("same tuning" in sentence or "known" in sentence for sentence in in_words(table(everything())))
    older = {**everything(), "full": scored(ZERO, FULL, steps=100, settings=None)}
    _, silent, share, *_ = in_words(table(older))
    assert silent.startswith("Whether full had the same learning rate, batch size and training rows")
    assert "plugging in has about 64 % in accuracy" in share


def test_of_references_the_one_that_was_tuned_alike_is_taken() -> None:
    runs = {
        **alone(),
        "other rows": scored(ZERO, FULL, steps=100, settings=settings(data="11" * 32)),
        "alike": scored(ZERO, FULL, steps=110),
    }
    assert table(runs).throughout.runs == ("alike",)


def test_a_command_quotes_a_path_that_a_shell_would_split() -> None:
    (made,) = tables(alone(), {"off": Kept("my runs/off")})
    assert "edge_client train --method split --from 'my runs/off' " in " ".join(made.missing)


def test_json_keeps_todays_runs_and_has_the_table_beside_them() -> None:
    runs = everything()
    both, one = json.loads(as_json(runs, kept(runs))), json.loads(as_json(alone(), kept(alone())))
    made = both.pop("offsite_tables")
    assert {name: RunReport.model_validate_json(json.dumps(run)) for name, run in both.items()} == runs
    assert list(made) == ["off"]
    assert [found["score"] and found["score"]["loss"] for found in made["off"]["rows"]] == [
        *(0.48, 0.6, 0.42, 0.36, 0.32, 0.31)
    ]
    assert made["off"]["rows"][2]["wire_bytes"] == 160_000_000
    assert made["off"]["emulator"]["emulator"] == "e0" * 32
    assert made["off"]["words"] == list(in_words(table(runs)))
    commands = {found["command"] for found in one.pop("offsite_tables")["off"]["rows"]}
    assert commands == {None, *table(alone()).missing}
    assert RunReport.model_validate_json(json.dumps(one)) == alone()["off"]
    assert as_json({"a": report()}) == json.dumps(report().model_dump(mode="json"), indent=2)


def scores(of: Score) -> Scores:
    return Scores(**per_row(of).model_dump(), real_tokens=1, padded_tokens=1)


def test_the_command_reads_what_the_runs_that_it_is_given_have_beside_their_reports(tmp_path: Path) -> None:
    for name, run in everything().items():
        (tmp_path / name).mkdir()
        run.save(tmp_path / name)
        RunDirectory(tmp_path / name).write_scores(scores(run.eval.before), scores(run.eval.after))
    late = evaluated(score(85, 0.35)).model_dump(exclude={"per_row"})
    beside.append(tmp_path / "off", Evaluated(**late), per_row(score(85, 0.35)))
    shown = CliRunner().invoke(app, ["report", *(str(tmp_path / name) for name in everything())])
    assert "plugged in             85.0 [82.7,87.1]  0.3500  12.0 T" in shown.output
    assert "plugged in 160 MB 0 B 40.0 MB 0 B 200 MB" in " ".join(shown.output.split())
    assert shown.output.index("Accuracy before") < shown.output.index("off, tuned on an emulator")
    assert "Plugging in gained over the untouched model: accuracy +7.0 points [+5." in shown.output
    file = CliRunner().invoke(app, ["report", str(tmp_path / "off" / "run.json"), "--format", "md"])
    assert "| plugged in | - |" in file.output
    assert f"edge_client evaluate --run {tmp_path / 'off'} --data HELD-OUT" in file.output
