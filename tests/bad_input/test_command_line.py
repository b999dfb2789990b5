"""What a user can get wrong on a command line: one line on standard error that says what to do, and an exit code."""

import json
import socket
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from transformers import T5Config

import cloud_node.cli
import edge_client.cli
from isthmus.errors import CutError, DataError, ModelError, RunError, UnreachableError, UsageError
from tests.harness import Server, run_command, save_tiny_model, write_rows

MAINS = {"edge_client": edge_client.cli.main, "cloud_node": cloud_node.cli.main}


@dataclass
class Outcome:
    """How a command ended."""

    exit_code: int
    out: str
    error: str


Run = Callable[..., Outcome]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], cache: Path) -> Run:
    """Run a command's entry point in this process."""

    def go(*arguments: object) -> Outcome:
        name, *rest = map(str, arguments)
        monkeypatch.setattr(sys, "argv", [name, *rest])
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            MAINS[name]()
        out, error = capfd.readouterr()
        return Outcome(int(ended.value.code or 0), out, error)

    return go


def refused(outcome: Outcome, exit_code: int, *words: object) -> None:
    """The command failed with this code and one line that holds these words."""
    lines = [line for line in outcome.error.splitlines() if line.startswith(("edge_client: ", "cloud_node: "))]
    assert outcome.exit_code == exit_code, outcome
    assert len(lines) == 1, outcome.error
    assert outcome.error.splitlines()[-1] == lines[0], "something follows the line"
    assert "Traceback" not in outcome.error
    assert [word for word in map(str, words) if word not in lines[0]] == [], lines[0]


def alone(outcome: Outcome) -> None:
    """Nothing but the line was printed."""
    assert len(outcome.error.splitlines()) == 1, outcome.error
    assert outcome.out == ""


@pytest.fixture
def config(tmp_path: Path) -> Callable[[str], Path]:
    def write(text: str) -> Path:
        path = tmp_path / "config.yaml"
        path.write_text(text)
        return path

    return write


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["edge_client", "train", "--out", "x", "--bogus"], ["--bogus", "edge_client train --help"]),
        (["edge_client", "train", "--out", "x", "--steps", "many"], ["--steps", "integer"]),
        (["edge_client", "train", "--method", "split"], ["--out"]),
        (["edge_client", "bogus"], ["bogus", "edge_client --help"]),
        (["edge_client", "report"], ["runs", "edge_client report --help"]),
        (["edge_client", "generate", "--run", "x", "--prompt", "y", "--max-new-tokens", "0"], ["--max-new-tokens"]),
        (["edge_client", "prefetch", "--data", "x"], ["--server HOST:PORT"]),
        (["edge_client", "prefetch", "--server", "h:1"], ["--data is needed"]),
        (["edge_client", "prefetch", "--train", "top"], ["--train", "edge_client prefetch --help"]),
        (["cloud_node", "serve", "--bogus"], ["--bogus", "cloud_node serve --help"]),
        (["cloud_node", "serve", "--threads", "two"], ["--threads", "integer"]),
        (["cloud_node", "certs", "issue"], ["--name", "cloud_node certs issue --help"]),
        (["cloud_node", "bogus"], ["bogus", "cloud_node --help"]),
    ],
)
def test_flags_that_do_not_exist_or_do_not_fit_are_named(run: Run, arguments: list[str], words: list[str]) -> None:
    outcome = run(*arguments)
    refused(outcome, UsageError.exit_code, *words)
    alone(outcome)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--method", "telepathy"], ["--method", "split", "local"]),
        ([], ["--method is needed"]),
        (["--method", "split"], ["--server HOST:PORT"]),
        (["--method", "split", "--server", "127.0.0.1:1", "--model", "m"], ["--model", "--method local"]),
        (["--method", "local"], ["--model DIR_OR_ID", "--cut"]),
        (["--method", "local", "--model", "m", "--cut", "two"], ["cut 'two'", "bottom:top"]),
        (["--method", "split", "--server", "h:1", "--steps", "3", "--epochs", "1"], ["--steps", "--epochs", "one"]),
        (["--method", "split", "--server", "h:1", "--rank", "0"], ["--rank", "greater than or equal to 1"]),
        (["--method", "split", "--server", "h:1", "--lr", "-1"], ["--lr", "greater than 0"]),
        (["--method", "split", "--server", "h:1", "--codec", "zip"], ["--codec", "int8"]),
        (["--method", "split", "--server", "h:1", "--peft", "magic"], ["--peft", "lora"]),
        (["--method", "split", "--server", "h:1", "--train", "bottom"], ["--train", "both", "top"]),
        (["--method", "side"], ["--method side", "--server HOST:PORT"]),
        (["--method", "side", "--server", "h:1", "--peft", "lora"], ["--method side", "leave out --peft lora"]),
        (["--method", "split", "--server", "h:1", "--peft", "side"], ["--peft side", "--method side"]),
        (["--method", "side", "--server", "h:1", "--train", "top"], ["side network", "leave out --train top"]),
        (
            ["--method", "local", "--model", "m", "--cut", "1:1", "--peft", "side", "--train", "top"],
            ["side network", "leave out --train top"],
        ),
        (["--method", "side", "--server", "h:1", "--reduction", "5"], ["--reduction", "4, 8 or 16"]),
        (["--method", "side", "--server", "h:1", "--tap-every", "0"], ["--tap-every", "greater than or equal to 1"]),
        (["--method", "side", "--server", "h:1", "--tap-width", "0"], ["--tap-width", "greater than or equal to 1"]),
        (["--method", "side", "--server", "h:1", "--codec-port", "zip"], ["--codec-port", "int8"]),
        (["--method", "split", "--server", "h:1", "--cache-limit", "0"], ["--cache-limit", "greater than or equal"]),
        (["--method", "split", "--server", "nowhere"], ["nowhere", "HOST:PORT"]),
        (["--method", "split", "--server", "127.0.0.1:99999"], ["127.0.0.1:99999", "HOST:PORT"]),
        (["--method", "split", "--server", "gpu.example.org:7070"], ["gpu.example.org", "--certs DIR", "--insecure"]),
        (
            ["--method", "split", "--server", "127.0.0.1:1", "--certs", "c", "--insecure"],
            ["--certs", "--insecure", "one"],
        ),
    ],
)
def test_settings_of_a_run_that_make_no_sense_are_refused_before_anything_starts(
    run: Run, tmp_path: Path, flags: list[str], words: list[str]
) -> None:
    outcome = run("edge_client", "train", "--out", tmp_path / "run", "--data", "rows.jsonl", *flags)
    refused(outcome, UsageError.exit_code, *words)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ([], ["--model is needed"]),
        (["--model", "m", "--cut", "two"], ["--cut", "bottom:top", "2:2"]),
        (["--model", "m", "--cut", "1:1", "--cut", "1:1"], ["--cut", "twice"]),
        (["--model", "m", "--listen", "7070"], ["HOST:PORT"]),
        (["--model", "m", "--listen", "0.0.0.0:7070"], ["--certs DIR", "cloud_node certs init", "--insecure"]),
        (["--model", "m", "--listen", "[::]:7070"], ["--certs DIR", "--insecure"]),
        (["--model", "m", "--certs", "c", "--insecure"], ["--certs", "--insecure", "one"]),
        (["--model", "m", "--dtype", "int4"], ["--dtype", "bfloat16"]),
        (["--model", "m", "--activation-budget", "-1"], ["--activation-budget", "greater than or equal to 0"]),
    ],
)
def test_settings_of_a_node_that_make_no_sense_are_refused_before_anything_starts(
    run: Run, flags: list[str], words: list[str]
) -> None:
    outcome = run("cloud_node", "serve", *flags)
    refused(outcome, UsageError.exit_code, *words)
    alone(outcome)


@pytest.mark.parametrize(
    ("command", "known"),
    [(("edge_client", "train", "--out", "x"), "batch_size"), (("cloud_node", "serve"), "activation_budget")],
)
def test_a_configuration_file_is_held_to_its_keys(
    run: Run, config: Callable[[str], Path], command: tuple[str, ...], known: str
) -> None:
    file = config("speed: 11\n")
    refused(run(*command, "--config", file), UsageError.exit_code, file, "'speed'", "known are", known)
    refused(run(*command, "--config", config("- a\n- b\n")), UsageError.exit_code, "name: value")
    refused(run(*command, "--config", config("a: [1\nb: }")), UsageError.exit_code, "is not YAML")
    refused(run(*command, "--config", file.with_name("none.yaml")), UsageError.exit_code, "none.yaml")


def test_a_model_that_cannot_be_served_is_named(run: Run, tmp_path: Path, tiny_models: dict[str, Path]) -> None:
    def serve(model: object, *flags: str) -> Outcome:
        return run("cloud_node", "serve", "--model", model, "--listen", "127.0.0.1:0", *flags)

    empty = tmp_path / "empty"
    empty.mkdir()
    refused(serve(empty), ModelError.exit_code, empty, "config.json", "saved Hugging Face model")
    (empty / "config.json").write_text("{}")
    refused(serve(empty), ModelError.exit_code, "safetensors", "save_pretrained")
    refused(serve(tmp_path / "not" / "there"), ModelError.exit_code, "check the path")
    (empty / "config.json").write_text("nonsense")
    (empty / "model.safetensors").write_bytes(b"nonsense")
    refused(serve(empty), ModelError.exit_code, "config.json", "cannot be read")

    T5Config().save_pretrained(empty)
    refused(serve(empty), ModelError.exit_code, "t5", "encoder-decoder", "use a decoder")
    refused(serve(tiny_models["llama"], "--cut", "3:3"), CutError.exit_code, "3:3", "6 blocks", "less than 6")
    refused(serve(tiny_models["llama"], "--device", "abacus"), UsageError.exit_code, "abacus", "cpu")


def test_weights_that_are_torn_are_named(run: Run, tmp_path: Path) -> None:
    place = tmp_path / "torn"
    save_tiny_model(place, "llama")
    weights = place / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    outcome = run("cloud_node", "serve", "--model", place, "--cut", "1:1", "--listen", "127.0.0.1:0")
    refused(outcome, ModelError.exit_code, place)


LINES = {
    '{"text": "fine and long enough"}\n{"text": oops}\n': (":2:", "is not JSON"),
    '{"text": "fine and long enough"}\n\n{"txt": "x"}\n': (":3:", "'txt'", '"prompt"'),
    '{"prompt": "a", "choices": ["b", "c"], "answer": 2}\n': (":1:", '"answer"', "0 to 1"),
    '["text"]\n': (":1:", "is not a JSON object"),
    '{"text": "x", "label": 1}\n': ("label", "rows"),  # too few to train on, one too many to score
    "": ("holds no rows",),
    "\n \n": ("holds no rows",),
}


@pytest.mark.parametrize("content", LINES)
def test_malformed_data_is_named_by_file_and_line(
    run: Run, tmp_path: Path, tiny_models: dict[str, Path], content: str
) -> None:
    data = tmp_path / "rows.jsonl"
    data.write_text(content)
    local = ("--method", "local", "--model", tiny_models["llama"], "--cut", "1:1", "--steps", 1)
    outcome = run("edge_client", "train", "--out", tmp_path / "run", "--data", data, *local)
    refused(outcome, DataError.exit_code, data, *LINES[content])
    good = write_rows(tmp_path / "good.jsonl")
    outcome = run("edge_client", "train", "--out", tmp_path / "other", "--data", good, "--eval-data", data, *local)
    refused(outcome, DataError.exit_code, data, *LINES[content])


def test_a_model_that_diverged_is_told_in_one_line_and_the_report_says_what_was_spent(
    run: Run, tmp_path: Path, tiny_models: dict[str, Path], rows: Path
) -> None:
    local = ("--method", "local", "--model", tiny_models["llama"], "--cut", "1:1", "--steps", 1)
    diverging = ("--lr", "1e30", "--alpha", "1e12", "--targets", "lm_head")
    train = ("edge_client", "train", *local, *diverging, "--data", rows, "--threads", 1, "--out")
    outcome = run(*train, tmp_path / "scored", "--eval-data", rows)
    refused(outcome, RunError.exit_code, "not finite", "lower --lr")
    report = json.loads((tmp_path / "scored" / "run.json").read_text())
    assert (report["status"], report["steps"], report["eval"]["after"]["loss"]) == ("failed", 1, None)
    assert report["eval"]["before"]["loss"] > 0
    assert report["cost"]["edge"]["backward_flops"] > 0
    assert run(*train, tmp_path / "saved").exit_code == 0
    outcome = run("edge_client", "evaluate", "--run", tmp_path / "saved", "--data", rows)
    refused(outcome, RunError.exit_code, "not finite", "lower --lr")


def test_data_that_is_not_there_is_named(run: Run, tmp_path: Path, tiny_models: dict[str, Path]) -> None:
    local = ("--method", "local", "--model", tiny_models["llama"], "--cut", "1:1")
    outcome = run("edge_client", "train", "--out", tmp_path / "run", "--data", tmp_path / "none.jsonl", *local)
    refused(outcome, DataError.exit_code, "none.jsonl", "check the path")


def test_an_adapter_that_would_train_nothing_is_refused(
    run: Run, tmp_path: Path, tiny_models: dict[str, Path], rows: Path
) -> None:
    def train(cut: str, *flags: str) -> Outcome:
        local = ("--method", "local", "--model", tiny_models["llama"], "--cut", cut, "--steps", 1)
        return run("edge_client", "train", "--out", tmp_path / "run", "--data", rows, *local, *flags)

    refused(train("1:1", "--targets", "q_proj,z_proj"), UsageError.exit_code, "'z_proj'", "known are", "q_proj")
    refused(train("1:1", "--peft", "bitfit"), UsageError.exit_code, "no biases", "--peft lora")
    refused(train("0:0", "--peft", "full"), UsageError.exit_code, "no blocks", "--peft lora")
    refused(train("1:1", "--peft", "full", "--targets", "q_proj"), UsageError.exit_code, "--targets", "--peft lora")
    refused(train("3:3"), CutError.exit_code, "3:3", "6 blocks", "less than 6")


def test_a_command_that_was_refused_can_be_corrected_and_given_again(
    run: Run, tmp_path: Path, tiny_models: dict[str, Path], rows: Path
) -> None:
    command = ("edge_client", "train", "--out", tmp_path / "run", "--data", rows, "--steps", 1, "--method", "local")
    local = ("--model", tiny_models["llama"], "--cut", "1:1", "--threads", 1)
    refused(run(*command, *local, "--targets", "z_proj"), UsageError.exit_code, "'z_proj'")
    corrected = run(*command, *local, "--targets", "q_proj")
    assert corrected.exit_code == 0, corrected.error
    refused(
        run(*command, *local, "--targets", "q_proj"), RunError.exit_code, "holds a run already", "--resume", "--out"
    )


def test_a_cut_that_is_not_offered_is_named_with_those_that_are(
    run: Run, tmp_path: Path, servers: dict[str, Server], rows: Path
) -> None:
    remote = ("--method", "split", "--server", servers["llama"].address, "--cut", "2:2")
    outcome = run("edge_client", "train", "--out", tmp_path / "run", "--data", rows, *remote)
    refused(outcome, CutError.exit_code, "2:2", "1:1, 2:0, 0:2, 0:0")


def test_taps_that_do_not_fit_the_span_are_refused(
    run: Run, tmp_path: Path, servers: dict[str, Server], rows: Path
) -> None:
    def train(*flags: str) -> Outcome:
        side = ("--method", "side", "--server", servers["llama"].address, "--steps", 1, "--threads", 1)
        return run("edge_client", "train", "--out", tmp_path / "run", "--data", rows, *side, *flags)

    refused(train("--cut", "1:1", "--tap-width", "8"), UsageError.exit_code, "4 blocks", "every 4", "--tap-every")
    refused(train("--cut", "1:1", "--tap-every", "1"), UsageError.exit_code, "width of 64", "1 to 32")
    fitting = ("--cut", "1:1", "--tap-every", "1", "--tap-width", "8")
    refused(train(*fitting, "--reduction", "16", "--targets", "q_proj"), UsageError.exit_code, "--targets", "side")


def test_training_above_a_span_that_nothing_is_above_is_refused(
    run: Run, tmp_path: Path, servers: dict[str, Server], rows: Path
) -> None:
    top = (
        "--method",
        "split",
        "--train",
        "top",
        "--server",
        servers["llama"].address,
        "--cut",
        "2:0",
        "--peft",
        "full",
    )
    outcome = run("edge_client", "train", "--out", tmp_path / "run", "--data", rows, *top)
    refused(outcome, UsageError.exit_code, "no blocks there", "--peft lora")


@pytest.mark.parametrize("command", ["train", "prefetch"])
def test_a_cache_that_is_no_directory_is_named(
    run: Run, tmp_path: Path, servers: dict[str, Server], rows: Path, command: str
) -> None:
    file = tmp_path / "file"
    file.write_text("")
    settings = ("--method", "split", "--server", servers["llama"].address, "--cut", "1:1", "--data", rows)
    train = ("--train", "top", "--out", tmp_path / "run") if command == "train" else ()
    refused(run("edge_client", command, *settings, *train, "--cache", file), RunError.exit_code, file, "--cache")


def test_nothing_is_prefetched_for_a_run_whose_outputs_change(
    run: Run, config: Callable[[str], Path], rows: Path
) -> None:
    prefetch = ("edge_client", "prefetch", "--server", "127.0.0.1:1", "--data", rows)
    refused(run(*prefetch, "--method", "local"), UsageError.exit_code, "--method local")
    refused(run(*prefetch, "--config", config("train: both\n")), UsageError.exit_code, "--train top")
    refused(run(*prefetch, "--cache-limit", 0), UsageError.exit_code, "--cache-limit")
    refused(run(*prefetch, "--method", "side", "--tap-every", 0), UsageError.exit_code, "--tap-every")


@pytest.mark.parametrize(
    "command", [("report",), ("evaluate", "--data", "x", "--run"), ("generate", "--prompt", "x", "--run")]
)
def test_a_directory_without_a_run_is_named(run: Run, tmp_path: Path, command: tuple[str, ...]) -> None:
    refused(run("edge_client", *command, tmp_path), RunError.exit_code, tmp_path)


def test_reports_that_cannot_be_read_or_made_are_refused(run: Run, tmp_path: Path) -> None:
    report = tmp_path / "run.json"
    report.write_text(json.dumps({"schema": "isthmus-run/999"}))
    refused(run("edge_client", "report", tmp_path), RunError.exit_code, report, "isthmus-run/999", "isthmus-run/1")
    report.write_text(json.dumps({"schema": "isthmus-run/1"}))
    refused(run("edge_client", "report", tmp_path), RunError.exit_code, report)
    report.write_text("{")
    refused(run("edge_client", "report", tmp_path), RunError.exit_code, report, "not JSON")


def test_resuming_nothing_is_refused(run: Run, tmp_path: Path) -> None:
    outcome = run("edge_client", "train", "--resume", "--out", tmp_path / "none")
    refused(outcome, RunError.exit_code, "holds no run", "check the path")


def test_real_processes_end_with_the_same_line_and_code(
    tmp_path: Path, tiny_models: dict[str, Path], servers: dict[str, Server], rows: Path, cache: Path
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        nowhere = f"127.0.0.1:{listener.getsockname()[1]}"
    train = (
        "edge_client",
        "train",
        "--method",
        "split",
        "--data",
        rows,
        "--out",
        tmp_path / "run",
        "--server",
        nowhere,
    )
    done = run_command(*train, cache=cache)
    refused(Outcome(done.returncode, done.stdout, done.stderr), UnreachableError.exit_code, nowhere, "nothing listens")
    taken = servers["llama"].address
    serve = ("cloud_node", "serve", "--model", tiny_models["llama"], "--cut", "1:1", "--listen", taken)
    done = run_command(*serve, cache=cache)
    refused(Outcome(done.returncode, done.stdout, done.stderr), UsageError.exit_code, taken, "choose another --listen")
