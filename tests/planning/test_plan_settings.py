"""What a plan may be told: known names, those of `train` where the method takes them, and nothing that contradicts."""

import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from edge_client.config import TrainConfig
from edge_client.peft_methods import read_options
from edge_client.plan_candidates import tiers
from edge_client.plan_settings import DECIDING, NO_ROWS, NO_SERVER, TAKEN, PlanSettings
from edge_client.plan_ways import WAYS, command_of
from isthmus.errors import CutError, UsageError


def told(**flags: Any) -> PlanSettings:
    return PlanSettings.read(None, {"model": "llama-3-8b", **flags})


def config_of(command: str, method: str) -> TrainConfig:
    """The settings that a command's flags say."""
    words = shlex.split(command.removeprefix("edge_client train ").replace("--deterministic", "--deterministic true"))
    given: dict[str, Any] = {}
    options = []
    for flag, value in zip(words[::2], words[1::2], strict=True):
        if flag == "--peft-option":
            options.append(value)
        else:
            given[flag.removeprefix("--").replace("-", "_")] = value.split(",") if flag == "--targets" else value
    if options:
        given["peft_option"] = read_options(options)
    absent = {"model": "model-of-a-plan"} if method == "local" else {"server": NO_SERVER}
    return TrainConfig.model_validate({"data": NO_ROWS, **absent, **given})


def test_what_decides_costs_are_settings_of_a_run() -> None:
    assert set(DECIDING) <= set(TrainConfig.model_fields)
    assert all(set(names) <= set(DECIDING) for names in TAKEN.values())


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({"server": "x:1"}, "no setting 'server'"),
        ({"length": 1}, "greater than or equal to 2"),
        ({"length": 100, "max_length": 100}, "--length 100 runs rows of 101 tokens; raise --max-length"),
        ({"losses": 300}, "--losses 300 must be fewer"),
        ({"losses": 100, "max_length": 64}, "--losses 100 must be fewer"),
        ({"calibration": Path("c.json"), "threads": 2, "edge": "pi-4"}, "--threads is of a calibrated device"),
        ({"calibration": Path("c.json"), "threads": 2, "edge_tflops": 1.0}, "--threads is of a calibrated device"),
        ({"rows": 5, "tokens": 50}, "--rows and --tokens both"),
        ({"data": Path("f.jsonl"), "rows": 5}, "--data tells lengths"),
        ({"method": "split", "kr_active": 0.5}, "--kr-active decides nothing with --method split"),
        ({"method": "offsite", "codec": "int8"}, "--codec decides nothing with --method offsite"),
        ({"fit": True}, "--fit keeps limits"),
        ({"threads": 2}, "give --calibration"),
        ({"edge_memory": "much"}, "--edge-memory"),
        ({"max_hours": 0.0}, "--max-hours"),
    ],
)
def test_what_makes_no_sense_is_refused_in_one_line(flags: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError) as raised:
        told(**flags)
    assert said in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_cut_that_is_none_is_refused() -> None:
    with pytest.raises(CutError, match="bottom:top"):
        told(cut="two")


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({"method": "nonsense"}, "--method"),
        ({"method": "split", "codec": "zip"}, "--codec"),
        ({"method": "split", "peft": "prefix"}, "prefix"),
        ({"method": "dlora", "kr_period": 3}, "--kr-active"),
        ({"method": "split", "steps": 3, "epochs": 2.0}, "--steps and --epochs contradict"),
        ({"method": "split", "batch_size": 0}, "--batch-size"),
    ],
)
def test_settings_of_a_run_are_checked_as_by_train(flags: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError) as raised:
        told(**flags).configured({})
    assert said in str(raised.value)


def test_a_file_may_tell_what_flags_tell_and_flags_come_first(tmp_path: Path) -> None:
    (tmp_path / "plan.yaml").write_text("length: 100\nmethod: split\nrank: 4\nlink: 4g\n")
    settings = PlanSettings.read(tmp_path / "plan.yaml", {"model": "gpt2", "rank": 16, "link": None})
    assert (settings.length, settings.link, settings.configured({}).rank) == (100, "4g", 16)
    (tmp_path / "plan.yaml").write_text("lenght: 100\n")
    with pytest.raises(UsageError, match="no setting 'lenght'"):
        PlanSettings.read(tmp_path / "plan.yaml", {"model": "gpt2"})


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("max_length: long", "--max-length: Input should be a valid integer"),
        ("steps: [3]", "--steps: Input should be a valid integer"),
        ("method: [split]", "--method: Input should be"),
        ("cut: 2:2", "--cut: Input should be a valid string"),  # YAML reads 122, to the base of 60
        ("peft_option: 3", "--peft-option: Input should be a valid dictionary"),
        ("batch_size: 0", "--batch-size: Input should be greater"),
    ],
)
@pytest.mark.parametrize("fit", [None, True])
def test_what_a_file_tells_wrongly_is_refused_in_one_line(
    tmp_path: Path, line: str, said: str, fit: bool | None
) -> None:
    (tmp_path / "plan.yaml").write_text(f"{line}\n")
    with pytest.raises(UsageError) as raised:
        PlanSettings.read(tmp_path / "plan.yaml", {"model": "gpt2", "length": 20, "fit": fit, "max_hours": 1.0})
    assert str(raised.value).startswith(said)
    assert "\n" not in str(raised.value)


def test_a_number_in_quotes_is_a_number(tmp_path: Path) -> None:
    (tmp_path / "plan.yaml").write_text('max_length: "128"\nbatch_size: "2"\n')
    settings = PlanSettings.read(tmp_path / "plan.yaml", {"model": "gpt2"})
    assert settings.asked_length == 127, "the last of 128 is only predicted"
    assert {one.max_length for tier in tiers(settings, 8) for one in tier} == {128}


def test_long_rows_are_not_cut_unless_told() -> None:
    assert told(length=2048).configured({}).max_length == 2049
    assert told(length=100).configured({}).max_length == 512


def test_what_is_told_goes_to_the_ways_that_take_it() -> None:
    settings = told(kr_active=0.25, rank=4, codec="bf16", peft="lora")
    ways = [way.configured(settings) for way in WAYS]
    assert {way.method: way.codec for way in ways} == {
        "split": "bf16",
        "side": "bf16",
        "dlora": "bf16",
        "offsite": "none",
        "local": "none",
    }
    assert [way.kr_active for way in ways if way.method == "dlora"] == [None, None, 0.25, None]
    assert {way.rank for way in ways if way.peft == "lora"} == {4}


@pytest.mark.parametrize("number", range(len(WAYS)))
def test_the_command_of_a_way_trains_so(number: int) -> None:
    settings = told(targets=["q_proj", "v_proj"], epochs=2.5, batch_size=4, rank=4)
    way = WAYS[number].configured(settings)
    assert config_of(command_of(way), way.method) == way


@pytest.mark.parametrize("flags", [{"train": "top"}, {"method": "side"}])
def test_the_command_of_a_deterministic_run_says_so(flags: dict[str, str]) -> None:
    way = told(**{"method": "split", "deterministic": True, **flags}).configured({})
    assert way.deterministic
    assert "--deterministic" in command_of(way).split()
    assert config_of(command_of(way), way.method) == way


def test_each_setting_of_train_is_a_flag_of_plan_or_the_page_says_that_it_is_none() -> None:
    page = Path("docs/planning.md").read_text()
    (listed,) = re.findall(r"^No flags here: (.*?)\n\n", page, re.DOTALL | re.MULTILINE)
    named = {flag.replace("-", "_") for flag in re.findall(r"`--([a-z-]+)`", listed)}
    others = {"data", "model", "emulator", "threads", "link", "labels"}  # flags of plan's own, and what no flag says
    of_train = {"from_run": "from"}
    missing = {of_train.get(name, name) for name in set(TrainConfig.model_fields) - {*DECIDING, *others}}
    assert named == missing


def test_the_command_of_a_method_with_options_trains_so() -> None:
    way = told(method="split", peft="prompt", peft_option={"num_virtual_tokens": 5}).configured({})
    assert config_of(command_of(way), "split") == way


def test_fitting_tries_what_was_told_alone() -> None:
    settings = told(method="split", cut="1:1", rank=4, codec="int8", batch_size=2, microbatches=1, max_bytes="1GB")
    tried = [config for tier in tiers(settings, 32) for config in tier]
    assert [(one.method, one.train) for one in tried] == [("split", "both"), ("split", "top")]
    assert {(one.cut, one.rank, one.codec, one.batch_size) for one in tried} == {("1:1", 4, "int8", 2)}


def test_fitting_tries_every_method_and_no_cut_that_leaves_no_span() -> None:
    tried = [config for tier in tiers(told(max_bytes="1GB"), 8) for config in tier]
    assert list(dict.fromkeys(one.method for one in tried)) == ["dlora", "split", "side", "offsite"]
    assert {one.cut for one in tried} == {"1:1", "2:2", "0:0", "0:1", "0:2", "0:4"}
    assert {one.codec for one in tried} == {"none", "bf16", "int8"}


def test_fitting_takes_no_smaller_batches_where_steps_are_counted() -> None:
    assert {one.batch_size for tier in tiers(told(steps=10), 8) for one in tier} == {8}
    assert {one.batch_size for tier in tiers(told(epochs=1.0), 8) for one in tier} == {8, 4, 1}


@pytest.mark.parametrize(
    ("flags", "methods"),
    [
        ({"kr_active": 0.3}, {"dlora"}),
        ({"kr_period": 3}, {"dlora"}),
        ({"exchange": "activations"}, {"dlora"}),
        ({"peft": "ia3"}, {"split", "offsite"}),
        ({"train": "top"}, {"split", "offsite"}),
        ({"reduction": 4}, {"side"}),
        ({"codec_port": "int8"}, {"dlora", "side"}),
        ({"codec": "int8"}, {"dlora", "split", "side"}),
        ({"reduction": 4, "rank": 4}, set()),
    ],
)
def test_fitting_leaves_out_methods_that_do_not_take_what_was_told(flags: dict[str, Any], methods: set[str]) -> None:
    assert {one.method for tier in tiers(told(**flags), 8) for one in tier} == methods


@pytest.mark.parametrize(
    "flags",
    [
        {"train": "top"},
        {"reduction": 4},
        {"kr_period": 3},
        {"rank": 4},
        {"microbatches": 4},
        {"codec_gradient": "int8"},
    ],
)
def test_fitting_tries_nothing_without_what_was_told(flags: dict[str, Any]) -> None:
    tried = [config for tier in tiers(told(**flags), 8) for config in tier]
    assert tried
    assert [one for one in tried if any(getattr(one, name) != value for name, value in flags.items())] == []


def test_fitting_leaves_out_what_a_flag_makes_no_sense_with_and_says_why_if_nothing_is_left() -> None:
    tried = [config for tier in tiers(told(codec_gradient="int8"), 8) for config in tier]
    assert {(one.method, one.train) for one in tried} == {("dlora", "both"), ("split", "both")}
    with pytest.raises(UsageError, match="no gradient crosses in such a run"):
        list(tiers(told(codec_gradient="int8", train="top"), 8))
