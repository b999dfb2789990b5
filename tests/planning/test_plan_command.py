"""`edge_client plan` as it is called: for every model that is shipped, within limits, and where it must refuse."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from click.testing import Result
from typer.testing import CliRunner

from edge_client.cli import app
from edge_client.config import TrainConfig
from edge_client.plan_costs import CostsOfRuns
from edge_client.plan_settings import PlanSettings
from edge_client.planned import Planned
from isthmus.errors import CutError, IsthmusError, LimitError, ModelError
from isthmus.planning.calibration import Measured
from isthmus.planning.configurations import find, read, shipped
from isthmus.planning.workload import Workload
from tests.harness import save_tiny_model
from tests.planning.test_calibration import calibration

SCHEMA = Path(__file__).parents[2] / "docs" / "plan.schema.json"
ENCODERS = [name for name in shipped() if name.startswith("roberta")]
BOTH = [name for name in shipped() if name.startswith("t5")]
DECODERS = [name for name in shipped() if name not in (*ENCODERS, *BOTH)]


def plan(*words: str) -> Result:
    return CliRunner().invoke(app, ["plan", *words], env={"COLUMNS": "100"})


def refusal(*words: str) -> IsthmusError:
    error = plan(*words).exception
    assert isinstance(error, IsthmusError), error
    assert "\n" not in str(error)
    return error


@pytest.fixture
def tiny(tmp_path: Path) -> str:
    save_tiny_model(tmp_path / "model", "llama")
    return str(tmp_path / "model")


@pytest.mark.parametrize("model", DECODERS)
def test_every_shipped_model_that_can_be_trained_can_be_planned(model: str) -> None:
    done = plan("--model", model, "--method", "split", "--link", "4g", "--json")
    assert done.exit_code == 0, done.exception
    told = json.loads(done.stdout)
    jsonschema.Draft202012Validator(json.loads(SCHEMA.read_text())).validate(told)
    text = read(find(model)).get_text_config()
    crossing = told["plans"][0]["costs"]["first"]["crossing"]
    one_way = 8 * 256 * text.hidden_size * 4  # rows, tokens, values of 4 bytes; both passes cross each way
    assert crossing["up_bytes"] == pytest.approx(2 * one_way, rel=0.01)
    assert crossing["round_trips"] == 2
    assert told["plans"][0]["run"]["hours"] > 0
    weights = told["plans"][0]["costs"]["edge_peak_tensor_bytes"] + told["plans"][0]["costs"]["cloud_peak_tensor_bytes"]
    assert weights > 4 * 10 * text.num_hidden_layers * text.hidden_size**2  # of blocks alone, which have more than 10


@pytest.mark.parametrize("model", BOTH)
def test_an_encoder_decoder_is_refused_by_name(model: str) -> None:
    error = refusal("--model", model)
    assert isinstance(error, CutError)
    assert "t5 is an encoder-decoder" in str(error)


@pytest.mark.parametrize("model", ENCODERS)
def test_a_model_without_a_next_token_is_refused_by_name(model: str) -> None:
    error = refusal("--model", model)
    assert isinstance(error, ModelError)
    assert "roberta predicts no next token" in str(error)


def test_without_a_method_all_of_a_model_stand_side_by_side(tiny: str) -> None:
    done = plan("--model", tiny, "--cut", "1:1", "--length", "20", "--tap-every", "1", "--tap-width", "8", "--json")
    assert done.exit_code == 0, done.exception
    told = json.loads(done.stdout)
    by_name = {one["name"]: one for one in told["plans"]}
    assert [*by_name, *told["refused"]] == [
        *("split", "split, int8", "split, top", "side", "dlora", "parameters", "dlora, 12.5 %", "core"),
        *("offsite", "local"),
    ]
    up = {name: one["costs"]["first"]["crossing"]["up_bytes"] for name, one in by_name.items()}
    assert up["offsite"] == up["local"] == 0 < up["split, top"] < up["split"] < up["dlora"]
    assert by_name["split, top"]["costs"]["later"]["crossing"]["up_bytes"] == 0


def test_a_way_that_the_model_does_not_allow_is_named_with_its_reason_and_the_others_are_planned(tiny: str) -> None:
    done = plan("--model", tiny, "--cut", "1:1", "--length", "20", "--tap-every", "50", "--tap-width", "8")
    assert done.exit_code == 0, done.exception
    assert "side: a span of 4 blocks has no tap at every 50 blocks; lower --tap-every" in " ".join(done.stdout.split())


def test_the_best_plan_within_limits_is_shown_with_the_command_that_trains_so(tiny: str) -> None:
    words = ["--model", tiny, "--length", "20", "--rows", "40", "--cut", "1:1", "--rank", "4", "--batch-size", "8"]
    done = plan(*words, "--fit", "--max-bytes", "1GB")
    assert done.exit_code == 0, done.exception
    assert "no limit binds" in done.stdout
    assert "train so: edge_client train --method dlora --cut 1:1" in " ".join(done.stdout.split())
    told = json.loads(plan(*words, "--fit", "--max-bytes", "1GB", "--json").stdout)
    whole = told["plans"][0]["run"]["up_bytes"] + told["plans"][0]["run"]["down_bytes"]
    assert told["fit"]["used"]["max_bytes"] == pytest.approx(whole / 1e9)
    tight = json.loads(plan(*words, "--fit", "--max-bytes", str(int(whole * 0.9)), "--json").stdout)
    assert tight["plans"][0]["command"] != told["plans"][0]["command"]
    assert "max_bytes" in tight["fit"]["binding"]


def test_fitting_takes_a_cut_that_leaves_a_span_where_none_was_told(tmp_path: Path) -> None:
    configuration = read(find("gpt2")).to_dict() | {"n_layer": 4, "n_embd": 64, "n_head": 4, "vocab_size": 256}
    (tmp_path / "config.json").write_text(json.dumps(configuration))
    words = ["--model", str(tmp_path), "--length", "20", "--rows", "40", "--fit", "--max-bytes", "1GB"]
    done = plan(*words, "--batch-size", "8", "--json")
    assert done.exit_code == 0, done.exception
    assert json.loads(done.stdout)["plans"][0]["cut"] == "1:1"
    assert "cut 2:2 leaves the cloud none" in str(refusal(*words, "--cut", "2:2"))
    assert "cut 2:2 leaves the cloud none" in str(refusal("--model", str(tmp_path), "--length", "20"))


@pytest.mark.parametrize(
    ("limit", "value"), [("--max-bytes", "1kB"), ("--max-hours", "1e-9"), ("--edge-memory", "1kB")]
)
def test_a_limit_that_no_plan_keeps_is_named_with_how_much_is_missing(tiny: str, limit: str, value: str) -> None:
    words = ["--model", tiny, "--length", "20", "--method", "split", "--cut", "1:1", "--rank", "4", "--codec", "none"]
    error = refusal(*words, "--batch-size", "4", "--microbatches", "1", "--fit", limit, value)
    assert isinstance(error, LimitError)
    assert f"{limit} " in str(error)
    assert "times too small: the least that any of 2 plans takes is" in str(error)


@pytest.fixture
def calibrated(tmp_path: Path) -> Callable[..., str]:
    def written(**changes: Any) -> str:
        (tmp_path / "here.json").write_text(calibration(**changes).to_json())
        return str(tmp_path / "here.json")

    return written


def test_another_model_than_was_calibrated_with_is_warned_of_in_one_line(
    tiny: str, calibrated: Callable[..., str]
) -> None:
    text = read(find(tiny)).get_text_config()
    alike = Measured(model_type=text.model_type, hidden_size=text.hidden_size, dtype="float32")
    words = ["--model", tiny, "--method", "local", "--cut", "1:1", "--length", "20", "--calibration"]
    assert plan(*words, calibrated(model=alike)).stderr == ""
    for other in ({"model_type": "gpt2"}, {"hidden_size": 7}, {"dtype": "bfloat16"}):
        file = calibrated(model=alike.model_copy(update=other))
        done = plan(*words, file, "--json")
        json.loads(done.stdout)
        (line,) = [one for one in done.stderr.splitlines() if one]
        assert line.startswith("warning: ")
        assert str(next(iter(other.values()))) in line
        assert plan(*words, file, "--edge", "pi-4").stderr == ""
    in_bfloat16 = plan(*words, calibrated(model=alike), "--dtype", "bfloat16").stderr
    assert f"this is {text.model_type} {text.hidden_size} wide in bfloat16" in in_bfloat16


def test_threads_of_a_file_that_has_no_device_are_refused(tiny: str, calibrated: Callable[..., str]) -> None:
    file = calibrated(speeds={}, model=None)
    words = ["--model", tiny, "--method", "local", "--cut", "1:1", "--length", "20", "--calibration", file]
    assert plan(*words).exit_code == 0
    assert "has only a line" in str(refusal(*words, "--threads", "2"))


def test_what_is_placed_once_and_changed_costs_what_it_would_cost_placed_anew(tiny: str) -> None:
    configuration, workload = read(find(tiny)), Workload((20,) * 8, (19,) * 8, 80)
    together = CostsOfRuns(configuration, "float32")
    told = PlanSettings.read(None, {"model": tiny, "cut": "1:1", "length": 20})
    configs: list[TrainConfig] = [
        told.configured({"method": method, "codec": codec, "microbatches": parts, **more})
        for method, more in [
            ("dlora", {}),
            ("dlora", {"kr_active": 0.25}),
            ("split", {}),
            ("side", {"tap_every": 1, "tap_width": 8}),
        ]
        for codec, parts in [("none", 1), ("int8", 2)]
    ]
    for config in configs:
        assert together(config, [workload], None) == [Planned(config, configuration).costs(workload)], config
