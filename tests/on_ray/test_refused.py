"""What cannot be meant, or is not there, is told in one line before anything is loaded."""

import socket
from pathlib import Path

import pytest

from isthmus.errors import UnreachableError, UsageError
from tests.harness import run_command

RAY = ("--engine", "ray", "--device", "cpu")


@pytest.mark.parametrize(
    ("flags", "code", "said"),
    [
        (("--stages", "2"), UsageError.exit_code, "are for --engine ray"),
        (("--engine", "ray", "--replicas", "0:1"), UsageError.exit_code, "the least is 1 or more"),
        (("--engine", "ray", "--replicas", "2"), UsageError.exit_code, "not of the form MIN:MAX"),
        ((*RAY, "--stages", "99"), UsageError.exit_code, "more than the span's"),
        (("--engine", "ray", "--address", "auto"), UsageError.exit_code, "say --device cuda or --device cpu"),
    ],
)
def test_what_makes_no_sense_is_refused(
    tiny_models: dict[str, Path], cache: Path, flags: tuple[str, ...], code: int, said: str
) -> None:
    done = run_command(
        "cloud_node", "serve", "--model", tiny_models["llama"], "--listen", "127.0.0.1:0", *flags, cache=cache
    )
    assert done.returncode == code
    assert said in done.stderr
    assert "Traceback" not in done.stderr


def test_an_address_where_nobody_listens_is_told_at_once(tiny_models: dict[str, Path], cache: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    flags = ("--model", tiny_models["llama"], "--listen", "127.0.0.1:0", *RAY, "--address", address)
    done = run_command("cloud_node", "serve", *flags, cache=cache, timeout_s=60)
    assert done.returncode == UnreachableError.exit_code
    assert f"no Ray cluster at {address}" in done.stderr


def test_a_port_that_is_taken_is_told_before_weights_are_loaded(tiny_models: dict[str, Path], cache: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen(1)
        port = str(taken.getsockname()[1])
        serve = ("cloud_node", "serve", "--model", tiny_models["llama"])
        for flags, remedy in (
            (("--listen", f"127.0.0.1:{port}"), "choose another --listen"),
            (("--listen", "127.0.0.1:0", "--status-port", port), "or another port, 0 for a free one"),
        ):
            done = run_command(*serve, *flags, cache=cache)
            assert done.returncode == UsageError.exit_code
            assert remedy in done.stderr
            assert "Traceback" not in done.stderr
