"""What people read says what the report says, in plain units and within the terminal."""

import json
from io import StringIO

import pytest
from rich.console import Console

from isthmus.report.render import as_json, markdown, table
from isthmus.report.schema import Agreement, Evaluation, RunReport, Score, SideCount, SideNetwork
from tests.report.example import caching, report

FIGURES = [
    *("80.1 %", "[77.5, 82.5]", "87.4 %", "[+4.9, +9.7]", "+7.3", "0.4815", "0.3127", "0.2986"),
    *("1.20 kB", "170.20 MB", "83.90 MB", "84.10 MB", "612 B", "2.30 kB", "0.34 %", "1.50 MB", "240", "agree"),
    *("3.12 TFLOP", "4.56 TFLOP", "5.89 TFLOP", "5.77 TFLOP", "49.00 GFLOP"),
    *("61.25 s", "82.50 s", "114.30 s", "48.50 s", "51.75 s", "0.50 s", "258.04 s", "141.3"),
    *("312.00 MB", "911.00 MB", "420.00 MB", "230,400", "4,718,592", "925.31 kB", "PEFT format", "36,450"),
]


def drawn(reports: dict[str, RunReport], width: int = 100) -> str:
    console = Console(width=width, file=StringIO(), color_system=None)
    console.print(table(reports))
    return console.file.getvalue()  # type: ignore[attr-defined,no-any-return]


def row(text: str, label: str) -> str:
    return next(line for line in text.splitlines() if line.strip(" |").startswith(label))


@pytest.mark.parametrize("figure", FIGURES)
def test_each_figure_stands_in_the_table_and_in_the_markdown(figure: str) -> None:
    assert figure in drawn({"run": report()})
    assert figure in markdown({"run": report()})


def test_two_runs_stand_side_by_side_in_a_hundred_columns() -> None:
    text = drawn({"runs/movies-split": report(), "runs/movies-dlora": report(steps=9_999_999, method="dlora")})
    assert max(map(len, text.splitlines())) <= 100
    assert row(text, "Method").split() == ["Method", "split", "dlora"]
    assert row(text, "Steps").split() == ["Steps", "120", "9,999,999"]
    assert "…" not in text


def test_what_does_not_exist_is_a_dash() -> None:
    nothing = Evaluation(rows=None, before=Score(loss=None, accuracy=None), after=Score(loss=0.0, accuracy=None))
    text = drawn({"run": report(eval=nothing, cut=None)})
    for label in ("Cut", "Rows scored", "Accuracy before", "Accuracy after", "Change", "Loss before", "Cloud process"):
        assert row(text, label).split()[-1] == "-"
    assert row(text, "Loss after").split()[-1] == "0.0000"


def test_a_phase_in_which_nothing_crossed_takes_no_line() -> None:
    assert "Generating" not in drawn({"run": report()})
    assert "Evaluating" in drawn({"run": report()})


FORWARD_ONLY = [
    ({"train": "top"}, "split, top: no gradient crosses"),
    ({"method": "side"}, "side: no gradient crosses"),
]


@pytest.mark.parametrize(("changed", "method"), FORWARD_ONLY)
def test_a_run_whose_gradients_never_cross_says_so_on_one_line_beside_another(
    changed: dict[str, str], method: str
) -> None:
    text = drawn({"runs/movies-one": report(**changed), "runs/movies-two": report(**changed)})
    assert row(text, "Method").count(method) == 2
    assert max(map(len, text.splitlines())) <= 100


def test_a_run_whose_gradients_cross_or_that_has_no_wire_claims_nothing() -> None:
    for changed in ({"train": "both"}, {"train": None}, {"method": "local", "train": "top"}):
        assert "gradient" not in drawn({"run": report(**changed)})


def test_rows_from_the_cache_count_training_and_scoring_and_stand_only_where_a_run_has_a_cache() -> None:
    assert "cache" not in drawn({"run": report()})
    text = drawn({"cached": caching((1_200, 700), (34, 66)), "plain": report(), "idle": caching((0, 0), (0, 0))}, 120)
    assert row(text, "Kept rows, sent before").split("   ")[-1].strip() == "-"
    assert "1,234 of 2,000 (62 %)" in row(text, "Kept rows, sent before")
    assert "| Kept rows, sent before | - | 1,234 of 2,000 (62 %) |" in markdown(
        {"plain": report(), "cached": caching((1_200, 700), (34, 66))}
    )


def test_a_side_network_is_said_in_its_sizes_and_only_where_a_run_has_one() -> None:
    side = SideNetwork(reduction=8, tap_every=4, tap_width=64, taps=6)
    assert row(drawn({"run": report(method="side", side=side)}), "Side network").endswith("1/8 wide, 6 taps of 64")
    assert "Side network" not in drawn({"run": report()})


def test_disagreeing_counts_are_said_in_bytes() -> None:
    agreement = Agreement(
        edge=SideCount(sent_bytes=1_000, received_bytes=50),
        cloud=SideCount(sent_bytes=20, received_bytes=3_000),
        equal=False,
        unchecked_streams=2,
    )
    assert "differ by 2,030 B, 2 unchecked" in drawn({"run": report(agreement=agreement)})
    assert "not checked" in drawn({"run": report(agreement=None)})


def test_json_is_exact_one_run_as_itself_and_several_by_name() -> None:
    one, other = report(), report(seed=8)
    assert RunReport.model_validate_json(as_json({"a": one})) == one
    both = json.loads(as_json({"a": one, "b": other}))
    assert RunReport.model_validate_json(json.dumps(both["b"])) == other


def test_names_that_look_like_markup_stay_names() -> None:
    assert "[bold]x|y[/bold]" in drawn({"[bold]x|y[/bold]": report()})
    assert "| x\\|y |" in markdown({"x|y": report()})
