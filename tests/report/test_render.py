"""What people read says what the report says, in plain units and within the terminal."""

import json
from io import StringIO

import pytest
from rich.console import Console

from isthmus.report.fields.cost import Agreement, SideCount
from isthmus.report.fields.run import SideNetwork
from isthmus.report.fields.score import Evaluation, Score
from isthmus.report.ports import COLUMNS
from isthmus.report.render import as_json, charts, markdown, table
from isthmus.report.schema import RunReport
from tests.report.example import caching, dlora, report

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


def charted(run: RunReport, width: int = 80) -> list[str]:
    """The lines of the only chart of a run named "run"."""
    console = Console(width=width, file=StringIO(), color_system=None)
    for chart in charts({"run": run}):
        console.print(chart)
    return console.file.getvalue().splitlines()  # type: ignore[attr-defined,no-any-return]


def strip(run: RunReport, block: int) -> str:
    """What the chart says of a block between its number and its bytes."""
    return next(line.split()[1] for line in charted(run) if line.split()[:1] == [str(block)])


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


PORT_ROWS = {
    "Ports": "4 in 2 blocks",
    "Kill-and-Revive": "1/8 alive, every 10 steps, drop",
    "Chosen by": "importance",
    "Values sent to the cloud": "no",
    "Of it, ports": "21.26 MB /  32.52 MB",
    "Edge adapters at ports": "30.00 GFLOP",
}


@pytest.mark.parametrize(("label", "cell"), PORT_ROWS.items())
def test_ports_and_their_choice_have_rows_and_only_where_a_run_has_them(label: str, cell: str) -> None:
    runs = {"plain": report(), "dlora": dlora({20: (0,)})}
    left = row(drawn(runs), label).removeprefix(f"  {label}")
    assert left.split("   ")[0] == ""
    assert left.strip().startswith("- ")
    assert left.endswith(cell)
    assert f"| {label} | - | {' '.join(cell.split())} |" in markdown(runs)
    assert not any(line.strip().startswith(label) for line in drawn({"run": report()}).splitlines())


def test_what_ports_sent_stands_below_training_that_it_is_part_of() -> None:
    labels = [line.strip()[:12] for line in drawn({"run": dlora()}).splitlines()]
    assert labels[labels.index("Of it, ports") - 1].startswith("Training ")


def test_a_run_with_every_port_says_that_nothing_was_chosen() -> None:
    text = drawn({"run": dlora()})
    assert row(text, "Kill-and-Revive").split()[-1] == "-"
    assert "Chosen by" not in text
    assert "Values sent" not in text


def test_parked_values_are_said_to_have_been_sent() -> None:
    text = drawn({"run": dlora({20: (0,)}, idle="park", left_edge=True)})
    assert row(text, "Kill-and-Revive").endswith("10 steps, park")
    assert row(text, "Values sent to the cloud").endswith(" yes")


@pytest.mark.parametrize(("share", "said"), [(1 / 3, "1/3"), (0.0625, "1/16"), (0.123, "12.3 %"), (1.0, "100 %")])
def test_a_share_is_a_simple_fraction_where_it_is_exactly_one(share: float, said: str) -> None:
    assert f"  {said} alive" in row(drawn({"run": dlora({20: (0,)}, share=share)}), "Kill-and-Revive")


def test_two_runs_with_ports_stand_side_by_side_in_a_hundred_columns() -> None:
    text = drawn({"runs/movies-one": dlora({20: (0,)}), "runs/movies-two": dlora({20: (0,)})})
    assert row(text, "Kill-and-Revive").count("1/8 alive, every 10 steps, drop") == 2
    assert max(map(len, text.splitlines())) <= 100


def test_the_chart_shows_what_was_alive_between_decisions_and_what_each_block_cost_the_top_one_first() -> None:
    assert charted(dlora({20: (0, 1), 30: (2,), 100: ()})) == [
        "",
        "run",
        "Ports alive in steps 1 to 120; a new column at every decision",
        "Bytes and FLOPs include the warm-up and the probes",
        "",
        "                  up    down  adapters",
        "block  alive      MB      MB     GFLOP",
        "   10  █·▒·    20.01   30.02     21.00",
        "    9  ██··     1.25    2.50      9.00",
        "",
        "Of a block's ports:  · none  ░ under 1/3  ▒ under 2/3  ▓ fewer than all  █ all",
        "Alive at the end: none",
    ]


def test_the_chart_names_what_was_alive_at_the_end_in_lines_that_fit() -> None:
    assert charted(dlora({20: (0,), 30: (0, 1, 2)}))[-1] == "Alive at the end: 9 q_proj v_proj; 10 q_proj"
    assert max(map(len, charted(dlora({20: (0, 1, 2, 3)})))) <= 80


def test_without_kill_and_revive_the_chart_says_that_all_were_alive_and_what_each_block_cost() -> None:
    run = dlora()
    assert charted(run)[2] == "Ports alive in steps 1 to 120: all of them throughout"
    assert (strip(run, 9), strip(run, 10)) == ("█", "█")


def test_a_decision_before_the_first_step_or_after_the_last_takes_no_column() -> None:
    run = dlora({0: (0, 1), 60: (3,), 120: ()})
    assert (strip(run, 9), strip(run, 10)) == ("█·", "·▒")


def test_neighbours_share_a_column_where_decisions_are_too_many_for_eighty_characters() -> None:
    run = dlora(dict.fromkeys(range(1, 1_000), (0,)), steps=1_000)
    assert COLUMNS / 2 < len(strip(run, 9)) <= COLUMNS
    assert "a new column at every 23 decisions" in charted(run)[2]
    assert max(map(len, charted(run))) <= 80


def test_a_shared_column_is_as_dark_as_the_share_of_the_blocks_ports_that_were_alive_in_it() -> None:
    alive = [6, 0, 1, 2, 3, 4, 5, *[6] * (COLUMNS - 7)]  # of two ports in three steps
    now = {3 * column + step: (0, 1)[: max(0, k - 2 * step)] for column, k in enumerate(alive) for step in range(3)}
    assert strip(dlora(now, steps=3 * COLUMNS), 9) == "█·░▒▒▓▓" + "█" * (COLUMNS - 7)


def test_in_a_shared_column_long_spans_weigh_more() -> None:
    # nine steps with both ports, then steps with none
    decisions: dict[int, tuple[int, ...]] = dict.fromkeys(range(9, 9 + COLUMNS), ())
    assert strip(dlora(decisions, steps=9 + COLUMNS), 9)[:2] == "▓·"


def test_charts_and_markdown_show_each_run_with_ports_by_name_and_no_other() -> None:
    runs = {"plain": report(), "[bold]a|b[/bold]": dlora(), "none yet": dlora(steps=0), "b": dlora({20: (0,)})}
    assert [chart.plain.splitlines()[1] for chart in charts(runs)] == ["[bold]a|b[/bold]", "b"]
    text = markdown(runs)
    assert text.count("```") == 4
    for chart in charts(runs):
        name, *lines = chart.plain.splitlines()[1:]
        assert "\n".join([f"### Ports: {name}", "", "```text", *lines, "```", ""]) in text
    assert "```" not in markdown({"run": report()})
