"""The outside of the packages is fixed: their commands and flags, what they import, and what they never do."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from tests.commands.tree import APPS, commands, path_name
from tests.harness import ENVIRONMENT

ROOT = Path(__file__).parents[2]
PACKAGES = ("isthmus", "cloud_node", "edge_client", "emulator")

SURFACE = {
    "cloud_node": "",
    "cloud_node health": "--certs --json --server --timeout",
    "cloud_node merge": "--adapter --json --model --out --signer --threads",
    "cloud_node plug-in": "--adapter --device --emulator --eval-data --json --model --out --signer --threads",
    "cloud_node serve": "--activation-budget --address --audit --certs --config --cut --device --dtype --emulators "
    "--engine --grace --insecure --listen --log-format --log-level --model --policy --quantize --replicas "
    "--round-wait --rounds --signers --stages --status-host --status-port --submissions --threads",
    "cloud_node certs": "",
    "cloud_node certs init": "--days --dir --hours --san",
    "cloud_node certs issue": "--days --dir --hours --name --san --usage",
    "cloud_node certs list": "--dir --json",
    "cloud_node certs retire": "--dir",
    "cloud_node certs revoke": "--dir --name",
    "cloud_node certs rotate": "--days --dir --hours --name --revoke-old --san --signing-key",
    "cloud_node audit": "",
    "cloud_node audit usage": "--format --from --to FILE",
    "cloud_node audit verify": "--expect --json FILE",
    "cloud_node policy": "",
    "cloud_node policy check": "--json FILE",
    "cloud_node models": "",
    "cloud_node models fetch": "--to NAME",
    "cloud_node emulator": "",
    "cloud_node emulator build": "--batch-size --bits --certs --cut --device --distill --json --keep --lr --max-length "
    "--method --minimum-gap --model --out --resume --seed --steps --text --threads",
    "cloud_node emulator evaluate": "--device --emulator --json --max-length --model --text --threads",
    "edge_client": "",
    "edge_client train": "--alpha --batch-size --cache --cache-limit --certs --checkpoint-every --clip --clip-norm "
    "--codec --codec-gradient --codec-port --cohort --config --cut --data --deterministic --device --dropout --dtype "
    "--emulator --epochs --eval-batch-size --eval-data --exchange --from --init --insecure --join --key-file "
    "--kr-active --kr-criterion --kr-idle --kr-period --kr-scores --kr-warmup --link --lr --max-length --method "
    "--microbatches --model --out --patience --peft --peft-option --rank --reduction --resume --round-every "
    "--round-patience "
    "--sample --schedule --seal --seed "
    "--server --steps "
    "--tap-every --tap-width --targets --threads --train --warmup-steps --watch",
    "edge_client prefetch": "--cache --cache-limit --certs --codec --codec-port --config --cut --data "
    "--deterministic --device --dtype --eval-batch-size --eval-data --insecure --json --key-file --max-length "
    "--method --patience --seal --server --tap-every --tap-width --threads",
    "edge_client importances": "--batch-size --certs --cut --data --device --dtype --emulator --insecure "
    "--max-length --method --model --out --rank --seed --server --steps --targets --threads",
    "edge_client evaluate": "--certs --data --insecure --json --key-file --model --run --server --span --threads "
    "--untouched",
    "edge_client generate": "--certs --insecure --json --key-file --max-new-tokens --model --prompt --run --server "
    "--span --threads",
    "edge_client predict": "--batch-size --certs --data --insecure --key-file --max-new-tokens --model --out --resume "
    "--run --server --span --threads",
    "edge_client chat": "--certs --insecure --key-file --max-new-tokens --model --run --seed --server --span --system "
    "--temperature --threads --top-p",
    "edge_client export": "--key-file --model --out --run",
    "edge_client submit": "--certs --insecure --json --key-file --run --server",
    "edge_client unseal": "--answers --key-file --out --run",
    "edge_client reseal": "--key-file --new-key-file --run",
    "edge_client wipe": "--run --with-cache",
    "edge_client seal-key": "--out",
    "edge_client calibrate": "--certs --cut --device --dtype --insecure --json --model --out --server --threads",
    "edge_client doctor": "--certs --insecure --json --server",
    "edge_client emulators": "--certs --insecure --json --server",
    "edge_client report": "--costs --format --out RUNS",
    "edge_client plan": "--alpha --batch-size --calibration --cloud --cloud-dtype --cloud-tflops --codec "
    "--codec-gradient --codec-port --config --cut --data --deterministic --dropout --dtype --edge --edge-memory "
    "--edge-tflops --emulator --epochs --exchange --fit --init --json --kr-active --kr-criterion --kr-idle --kr-period "
    "--kr-warmup --length --link --losses --max-bytes --max-hours --max-length --method --microbatches --model --peft "
    "--peft-option --rank --reduction --rows --steps --tap-every --tap-width --targets --threads --tokens --train",
}
"""Every command and flag. A new one is a decision: change this list with it."""

PROMISED = {
    "cloud_node serve": "--model --cut --listen --device --dtype --certs --insecure --activation-budget --config "
    "--emulators",
    "cloud_node emulator build": "--model --cut --method --keep --distill --steps --out",
    "cloud_node plug-in": "--model --adapter --out",
    "cloud_node certs init": "--san",
    "cloud_node certs issue": "--name --san",
    "cloud_node models fetch": "--to NAME",
    "edge_client train": "--method --server --data --eval-data --out --resume --peft --rank --alpha --targets --train "
    "--model --cut --steps --epochs --batch-size --microbatches --lr --seed --deterministic --codec --codec-gradient "
    "--codec-port --dtype --device --max-length --warmup-steps --schedule --clip-norm --link --certs --insecure "
    "--config --exchange --kr-active --kr-period --kr-idle --kr-scores --emulator --from --watch",
    "edge_client prefetch": "--server --data --eval-data --cut --codec --codec-port --certs --insecure --config --json",
    "edge_client evaluate": "--run --data --span --server --json",
    "edge_client generate": "--run --prompt",
    "edge_client export": "--out --run",
    "edge_client submit": "--run --server",
    "edge_client report": "RUNS --format --out",
    "edge_client plan": "--model --method --cut --link --json --fit --edge-memory --max-bytes --max-hours",
}
"""Names that scripts elsewhere rely on: none of these may ever be renamed."""


def sources(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def test_the_commands_and_their_flags_are_exactly_those_listed() -> None:
    found = {path_name(path): flags for name in APPS for path, flags in commands(name).items()}
    assert found == {path: frozenset(flags.split()) for path, flags in SURFACE.items()}


def test_the_names_that_scripts_rely_on_are_there() -> None:
    found = {path_name(path): flags for name in APPS for path, flags in commands(name).items()}
    assert {path: set(flags.split()) - found[path] for path, flags in PROMISED.items()} == {
        path: set() for path in PROMISED
    }


def imported(tree: ast.AST) -> set[str]:
    """Top-level names of all modules that a file imports, wherever in it."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module.partition(".")[0])
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize(
    ("package", "never"),
    [
        ("isthmus", {"cloud_node", "edge_client", "emulator"}),
        ("cloud_node", {"edge_client"}),
        ("edge_client", {"cloud_node", "emulator", "ray"}),
        ("emulator", {"cloud_node", "edge_client", "ray"}),
    ],
)
def test_neither_side_knows_the_other(package: str, never: set[str]) -> None:
    for path in sources(package):
        assert not imported(ast.parse(path.read_text())) & never, path


def test_an_edge_runs_without_the_server_and_its_packages() -> None:
    program = "import sys, edge_client.cli, edge_client.train; print(*sorted(sys.modules))"
    done = subprocess.run([sys.executable, "-c", program], env=ENVIRONMENT, capture_output=True, text=True, check=True)
    loaded = {name.partition(".")[0] for name in done.stdout.split()}
    assert "edge_client" in loaded
    assert not loaded & {"cloud_node", "emulator", "ray", "gguf"}
