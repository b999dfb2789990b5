"""Every command in every file of deploy/ is read by the program that it calls, with each of its flags and values."""

import shutil
from pathlib import Path

import pytest
import yaml

from isthmus.errors import IsthmusError
from tests.deploy.places import Places, of_host
from tests.deploy.trying import SYSTEM, Trial, begun
from tests.deploy.written import DEPLOY, commands, setting, told

FOREIGN = {at: words for at, words in commands().items() if words[0] == "wget"}
"""Health checks inside of images that are not ours."""
TRIED = {at: words for at, words in commands().items() if at not in FOREIGN and words[0] not in SYSTEM}
FOLDERS = ("/cache", "/certs", "/data", "/models", "/runs", "/secret")


@pytest.fixture
def places(tmp_path: Path) -> Places:
    """Every mounted path below a temporary folder, with the settings files of Kubernetes and of a host in place."""
    host = of_host(tmp_path)
    found = Places({**host.paths, **{path: tmp_path / path[1:] for path in FOLDERS}}, host.grpc, host.status)
    for name in ("secret", "certs"):
        (tmp_path / name).mkdir()
    (tmp_path / "secret/key.pem").write_text("a key")
    found.copy(DEPLOY / "kubernetes/serve.yaml", tmp_path / "etc/isthmus/serve.yaml")
    for name in ("cloud.yaml", "reviews.yaml"):
        found.copy(DEPLOY / "systemd" / name, tmp_path / "etc/isthmus" / name)
    return found


@pytest.fixture
def trial(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Trial:
    monkeypatch.chdir(tmp_path)
    return Trial(tmp_path, monkeypatch)


def test_commands_are_found_wherever_they_are_written() -> None:
    sources = {at.split()[0] for at in commands()}
    written_in = {"compose", "README", "isthmus-cloud", "isthmus-edge", "isthmus-cloud.service"}
    assert written_in | {"isthmus-edge@.service", "Deployment/isthmus-cloud", "Job/fetch-model"} <= sources
    assert {at.split()[1] for at in FOREIGN} == {"prometheus", "grafana"}
    assert [words[1] for words in commands().values() if words[0] == "ray"] == ["start"]


@pytest.mark.parametrize("at", [at for at, words in TRIED.items() if words[:2] != ["cloud_node", "certs"]])
def test_a_command_is_accepted_with_every_flag_and_value(at: str, trial: Trial, places: Places) -> None:
    words = places.words(TRIED[at])
    trial.of(words)
    serves = "serve" in words
    assert [settings.listen for settings in trial.served] == [f"0.0.0.0:{places.grpc}"] * serves
    assert [settings.status_port for settings in trial.served] == [places.status] * serves


@pytest.mark.parametrize(
    "at", [at for at, words in TRIED.items() if {"serve", "--method=split", "docker", "kubectl"} & {*words}]
)
def test_a_command_with_a_flag_that_there_is_not_would_be_seen(at: str, trial: Trial, places: Places) -> None:
    with pytest.raises(Exception, match=r"No such option|unrecognized arguments"):
        trial.of([*places.words(TRIED[at]), "--speck"])


def test_a_settings_file_with_a_name_that_there_is_not_would_be_seen(
    trial: Trial, places: Places, tmp_path: Path
) -> None:
    for file, unit in (("cloud.yaml", "isthmus-cloud.service"), ("reviews.yaml", "isthmus-edge@.service")):
        path = tmp_path / "etc/isthmus" / file
        path.write_text(path.read_text() + "speck: 1\n")
        with pytest.raises(IsthmusError, match="no setting 'speck'"):
            trial.of(places.words(setting(unit, "ExecStart").replace("%i", "reviews").split()))


def test_the_environment_of_an_edge_is_names_and_values() -> None:
    lines = (DEPLOY / "systemd/reviews.env").read_text().splitlines()
    assert all(line.startswith("#") or line.partition("=")[0].isidentifier() for line in lines)


def test_the_readme_installs_files_that_there_are_where_the_unit_looks_for_them(tmp_path: Path) -> None:
    installed = {words[-1]: words[-2] for words in told() if words[0] == "install"}
    assert all((DEPLOY.parent / source).is_file() for source in installed.values())
    start = setting("isthmus-edge@.service", "ExecStart").replace("%i", "reviews")
    wanted = {word for word in start.split() if word.endswith(("begin-or-resume", ".yaml"))}
    environment = setting("isthmus-edge@.service", "EnvironmentFile").removeprefix("-").replace("%i", "reviews")
    assert {*wanted, environment, "/etc/systemd/system/isthmus-edge@.service"} == set(installed)
    applied = [word for words in told() if words[0] == "kubectl" for word in words if word.startswith("deploy/")]
    assert all((DEPLOY.parent / path).exists() for path in applied)
    assert {"deploy/kubernetes", "deploy/kubernetes/fetch-model.yaml"} <= set(applied)
    assert {f"deploy/kuberay/{path.name}" for path in (DEPLOY / "kuberay").iterdir()} <= set(applied)


def test_a_run_begins_goes_on_where_it_stopped_and_is_left_alone_when_it_is_complete(tmp_path: Path) -> None:
    run, flags = tmp_path / "first", ["--method", "split", "--data", "a file.jsonl"]
    assert begun(tmp_path, [str(run), *flags]) == ["train", "--out", str(run), *flags]
    run.mkdir()
    (run / "config.yaml").write_text(yaml.safe_dump({"method": "split"}))  # all that a refused command leaves
    assert begun(tmp_path, [str(run), *flags]) == ["train", "--out", str(run), *flags]
    (run / "checkpoints").mkdir()
    assert begun(tmp_path, [str(run), *flags]) == ["train", "--out", str(run), "--resume", *flags]
    shutil.rmtree(run / "checkpoints")
    (run / "run.json").write_text('{\n  "status": "interrupted"\n}')
    assert "--resume" in begun(tmp_path, [str(run), *flags])
    (run / "run.json").write_text('{\n  "status": "complete"\n}')
    assert begun(tmp_path, [str(run), *flags]) == []
