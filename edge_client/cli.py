"""The command line of the data owner: `edge_client train`, and what comes before it.

Knows flags and what to print; everything else is called.
"""

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from edge_client import calibrate_cli, doctor_cli, export_cli, finished_cli, plan_cli, sealing_cli, using_cli
from edge_client.finished_cli import SealKey
from edge_client.terminal import console_of_progress, quiet, show, width
from isthmus import command
from isthmus.errors import UsageError
from isthmus.report import evaluated
from isthmus.settings import read_settings, read_yaml

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


@app.callback()
def _root() -> None:
    """Train on private data a model whose middle stays on somebody else's server."""


@app.command("train")
def train_command(
    out: Annotated[Path, typer.Option(help="directory of the run")],
    method: Annotated[
        str | None, typer.Option(help="split, dlora, side, offsite, or local (the whole model here, as a reference)")
    ] = None,
    data: Annotated[Path | None, typer.Option(help="training rows, JSON Lines")] = None,
    eval_data: Annotated[Path | None, typer.Option(help="held-out rows, scored before and after")] = None,
    server: Annotated[str | None, typer.Option(help="HOST:PORT of the cloud node")] = None,
    certs: Annotated[Path | None, typer.Option(help="folder of this edge's certificate")] = None,
    insecure: Annotated[bool | None, typer.Option("--insecure", help="plaintext to another machine")] = None,
    model: Annotated[str | None, typer.Option(help="local: directory or id of the whole model")] = None,
    cut: Annotated[str | None, typer.Option(help="bottom:top; one that the server offers [its first]")] = None,
    emulator: Annotated[
        str | None, typer.Option(help="offsite: its folder, or name or id of one that --server offers [the only one]")
    ] = None,
    watch: Annotated[
        int | None,
        typer.Option(help="offsite: steps between looks at the true span, which send hidden states [0: none]"),
    ] = None,
    from_run: Annotated[
        Path | None, typer.Option("--from", help="run whose adapter this one begins with, placed as there")
    ] = None,
    train: Annotated[
        str | None, typer.Option(help="both ends, or top: no gradient crosses (hides labels, not text)")
    ] = None,
    peft: Annotated[
        str | None,
        typer.Option(help="method on the ends: lora, ia3, prompt, full, ... (docs/methods.md) [lora]"),
    ] = None,
    peft_option: Annotated[
        list[str] | None, typer.Option(help="NAME=VALUE of the method's configuration in peft; may be repeated")
    ] = None,
    rank: Annotated[int | None, typer.Option(help="LoRA's r, or what the method has for it [8, or peft's]")] = None,
    alpha: Annotated[float | None, typer.Option(help="LoRA's alpha, or what the method has for it [16]")] = None,
    targets: Annotated[str | None, typer.Option(help="modules with an adapter: q_proj,v_proj or all-linear")] = None,
    dropout: Annotated[float | None, typer.Option(help="share of adapters' inputs dropped in training [0]")] = None,
    exchange: Annotated[
        str | None,
        typer.Option(help="dlora: what crosses for adapters in the span: activations [that], core or parameters"),
    ] = None,
    init: Annotated[str | None, typer.Option(help="core: what stands around cores, svd or random [svd]")] = None,
    kr_active: Annotated[float | None, typer.Option(help="dlora: share of the span's adapters kept alive [1]")] = None,
    kr_period: Annotated[int | None, typer.Option(help="dlora: steps between killing and reviving [10]")] = None,
    kr_warmup: Annotated[int | None, typer.Option(help="dlora: first steps, in which all are alive [5]")] = None,
    kr_idle: Annotated[
        str | None, typer.Option(help="dlora: drop killed adapters, or park their values on the cloud [drop]")
    ] = None,
    kr_criterion: Annotated[
        str | None, typer.Option(help="dlora: importance, gradient, random or top [importance]")
    ] = None,
    kr_scores: Annotated[Path | None, typer.Option(help="dlora: JSON file of importances found elsewhere")] = None,
    reduction: Annotated[int | None, typer.Option(help="side: how much narrower its network is: 4, 8, 16 [8]")] = None,
    tap_every: Annotated[int | None, typer.Option(help="side: a tap at every n-th block of the span [4]")] = None,
    tap_width: Annotated[int | None, typer.Option(help="side: values a token of each tap [64]")] = None,
    steps: Annotated[int | None, typer.Option(help="optimizer steps")] = None,
    epochs: Annotated[float | None, typer.Option(help="passes over the data [1]")] = None,
    batch_size: Annotated[int | None, typer.Option(help="rows per step [8]")] = None,
    microbatches: Annotated[int | None, typer.Option(help="parts of a batch in flight at once [1]")] = None,
    eval_batch_size: Annotated[int | None, typer.Option(help="rows per scoring request [32]")] = None,
    lr: Annotated[float | None, typer.Option(help="peak learning rate [1e-3]")] = None,
    schedule: Annotated[str | None, typer.Option(help="linear, cosine or constant [linear]")] = None,
    warmup_steps: Annotated[int | None, typer.Option(help="steps of linear warm-up [0]")] = None,
    clip_norm: Annotated[float | None, typer.Option(help="largest gradient norm [1.0]")] = None,
    max_length: Annotated[int | None, typer.Option(help="tokens of a row; longer ones are cut [512]")] = None,
    seed: Annotated[int | None, typer.Option(help="of adapter values and data order [0]")] = None,
    deterministic: Annotated[bool | None, typer.Option("--deterministic", help="same seed, same bits")] = None,
    codec: Annotated[str | None, typer.Option(help="hidden states: none, bf16, fp16 or int8 [none]")] = None,
    codec_gradient: Annotated[str | None, typer.Option(help="gradients [as --codec]")] = None,
    codec_port: Annotated[str | None, typer.Option(help="what crosses at taps and ports [as --codec]")] = None,
    cache: Annotated[Path | None, typer.Option(help="folder of kept outputs, for top and side [the user's]")] = None,
    cache_limit: Annotated[str | None, typer.Option(help="its greatest size, such as 500MB [20GiB]")] = None,
    dtype: Annotated[str | None, typer.Option(help="of the ends: float32 or bfloat16 [float32]")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu or cuda [auto]")] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads [all cores]")] = None,
    checkpoint_every: Annotated[int | None, typer.Option(help="steps between checkpoints [50]")] = None,
    join: Annotated[
        str | None, typer.Option(help="name of rounds in which edges average what they changed (docs/rounds.md)")
    ] = None,
    round_every: Annotated[int | None, typer.Option(help="join: steps in a round [50]")] = None,
    cohort: Annotated[int | None, typer.Option(help="join: the fewest edges to be averaged with [3]")] = None,
    clip: Annotated[float | None, typer.Option(help="join: the most that a value may change in a round [1.0]")] = None,
    round_patience: Annotated[float | None, typer.Option(help="join: seconds to wait for the others [3600]")] = None,
    patience: Annotated[float | None, typer.Option(help="seconds to wait for a lost server [120]")] = None,
    link: Annotated[
        str | None, typer.Option(help="slow the line to 4g, satellite, ..., or RTT:UPMBIT:DOWNMBIT, to try it")
    ] = None,
    sample: Annotated[str | None, typer.Option(help="a prompt to continue after training")] = None,
    seal: Annotated[
        bool | None, typer.Option("--seal", help="encrypt on disk what holds data or trained values (docs/sealing.md)")
    ] = None,
    key_file: SealKey = None,
    resume: Annotated[bool, typer.Option("--resume", help="go on with the run in --out")] = False,
    config: Annotated[Path | None, typer.Option(help="YAML file with the same names as the flags")] = None,
) -> None:
    """Train an adapter; the run's directory gets config, metrics, ledger, checkpoints, adapter and run.json.

    Example: edge_client train --method split --server 127.0.0.1:7070 --certs certs/edge-a --data reviews.jsonl
    --eval-data held-out.jsonl --steps 100 --out runs/first
    """
    flags = {name: value for name, value in locals().items() if name not in ("out", "resume", "config")}
    flags["targets"] = targets.split(",") if targets is not None else None
    with quiet():
        from edge_client.config import TrainConfig
        from edge_client.peft_methods import read_options
        from edge_client.runs import RunDirectory

        flags["peft_option"] = read_options(peft_option) if peft_option else None
        run = RunDirectory(out)
        given = read_yaml(config) if config is not None else {}
        given |= {name: value for name, value in flags.items() if value is not None}
        if resume:
            settings = run.config().resumed(given)
        elif given.get("from_run") is not None:
            settings = TrainConfig.begun_from(RunDirectory(Path(given["from_run"])).placed(), given)
        else:
            settings = read_settings(TrainConfig, config, flags)
        with command.importing():
            from edge_client.train import train as carry_out

        report = carry_out(settings, run, resume, console_of_progress())
    typer.echo()
    show({out.name: report}, {out.name: evaluated.read(out)}, Console(width=width()))
    for made in report.samples:
        typer.echo(f"sample: {made.prompt}[{made.text}]")
    typer.echo(f"adapter: {run.adapter}    report: {out / 'run.json'}")


@app.command("prefetch")
def prefetch_command(
    data: Annotated[Path | None, typer.Option(help="the run's training rows, JSON Lines")] = None,
    server: Annotated[str | None, typer.Option(help="HOST:PORT of the cloud node")] = None,
    eval_data: Annotated[Path | None, typer.Option(help="the run's held-out rows")] = None,
    method: Annotated[str | None, typer.Option(help="what for: split, with --train top, or side [split]")] = None,
    certs: Annotated[Path | None, typer.Option(help="folder of this edge's certificate")] = None,
    insecure: Annotated[bool | None, typer.Option("--insecure", help="plaintext to another machine")] = None,
    cut: Annotated[str | None, typer.Option(help="bottom:top; one that the server offers [its first]")] = None,
    tap_every: Annotated[int | None, typer.Option(help="side: a tap at every n-th block of the span [4]")] = None,
    tap_width: Annotated[int | None, typer.Option(help="side: values a token of each tap [64]")] = None,
    eval_batch_size: Annotated[int | None, typer.Option(help="rows per request [32]")] = None,
    max_length: Annotated[int | None, typer.Option(help="tokens of a row; longer ones are cut [512]")] = None,
    deterministic: Annotated[bool | None, typer.Option("--deterministic", help="for deterministic runs")] = None,
    codec: Annotated[str | None, typer.Option(help="hidden states: none, bf16, fp16 or int8 [none]")] = None,
    codec_port: Annotated[str | None, typer.Option(help="side: what its taps are sent as [as --codec]")] = None,
    cache: Annotated[Path | None, typer.Option(help="folder of kept outputs [the user's]")] = None,
    cache_limit: Annotated[str | None, typer.Option(help="its greatest size, such as 500MB [20GiB]")] = None,
    dtype: Annotated[str | None, typer.Option(help="of the ends: float32 or bfloat16 [float32]")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu or cuda [auto]")] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads [all cores]")] = None,
    patience: Annotated[float | None, typer.Option(help="seconds to wait for a lost server [120]")] = None,
    seal: Annotated[bool | None, typer.Option("--seal", help="encrypt what is kept, for runs with --seal")] = None,
    key_file: SealKey = None,
    config: Annotated[Path | None, typer.Option(help="YAML file with the same names as the flags")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
) -> None:
    """Fill the cache ahead of runs with --train top or --method side: give the flags that the run will have.

    Hidden states of the rows cross, as they would in the run. Outputs for another --cut, --codec, --dtype, --method or
    --max-length are other outputs. Or give the run's own config.yaml.

    Example: edge_client prefetch --server 127.0.0.1:7070 --certs certs/edge-a --cut 0:4 --data reviews.jsonl
    --eval-data held-out.jsonl --codec bf16
    """
    flags = {name: value for name, value in locals().items() if name not in ("config", "as_json")}
    with quiet():
        with command.importing():
            from edge_client.prefetch import prefetch, settings_of

        done = prefetch(settings_of(config, flags), console_of_progress())
    if as_json:
        typer.echo(json.dumps(done.as_dict()))
        return
    typer.echo(f"{done.rows} rows: {done.present} were there, {done.fetched} fetched")
    typer.echo(f"{done.up_bytes / 1e6:.2f} MB up, {done.down_bytes / 1e6:.2f} MB down")


@app.command("importances")
def importances_command(
    data: Annotated[Path, typer.Option(help="rows to look at, JSON Lines")],
    out: Annotated[Path, typer.Option(help="JSON file to write")],
    method: Annotated[
        str,
        typer.Option(
            help="offsite: on an emulator here; dlora: on the true span, which sends hidden states and gradients; "
            "local: on the whole model here [offsite]"
        ),
    ] = "offsite",
    emulator: Annotated[
        str | None, typer.Option(help="offsite: its folder, or name or id of one that --server offers [the only one]")
    ] = None,
    server: Annotated[str | None, typer.Option(help="HOST:PORT of the cloud node")] = None,
    certs: Annotated[Path | None, typer.Option(help="folder of this edge's certificate")] = None,
    insecure: Annotated[bool | None, typer.Option("--insecure", help="plaintext to another machine")] = None,
    model: Annotated[str | None, typer.Option(help="local: directory or id of the whole model")] = None,
    cut: Annotated[str | None, typer.Option(help="bottom:top [the emulator's, or the server's first]")] = None,
    rank: Annotated[int | None, typer.Option(help="LoRA's r [8]")] = None,
    targets: Annotated[str | None, typer.Option(help="modules with an adapter: q_proj,v_proj or all-linear")] = None,
    steps: Annotated[int, typer.Option(help="batches to look at", min=1)] = 10,
    batch_size: Annotated[int | None, typer.Option(help="rows per batch [8]")] = None,
    max_length: Annotated[int | None, typer.Option(help="tokens of a row; longer ones are cut [512]")] = None,
    seed: Annotated[int | None, typer.Option(help="of adapter values and data order [0]")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32 or bfloat16 [float32]")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu or cuda [auto]")] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads [all cores]")] = None,
) -> None:
    """Find out which modules of the span are worth an adapter: first scores for `train --kr-scores`.

    On an emulator that keeps every block (`rank`, `quant`) nothing crosses the wire for it. With --method dlora, hidden
    states and gradients of the rows are sent, as in training.

    Example: edge_client importances --emulator emulators/rank-75 --data reviews.jsonl --out scores.json
    """
    flags = {name: value for name, value in locals().items() if name != "out" and value is not None}
    if out.exists():
        raise UsageError(f"{out} is there already; choose another --out, or remove it")
    flags |= {"targets": targets.split(",")} if targets is not None else {}
    flags |= {"exchange": "activations"} if method == "local" else {}
    with quiet():
        from edge_client.config import TrainConfig
        from isthmus.ledger.record import Ledger

        ledger, settings = Ledger(), read_settings(TrainConfig, None, flags)
        with command.importing():
            from edge_client.importances import importances

        found = importances(settings, ledger, console_of_progress())
    try:
        out.write_text(json.dumps(found, indent=1) + "\n")
    except OSError as error:
        raise UsageError(f"{out} cannot be written ({error.strerror}); choose another --out") from None
    sent = sum(int(ledger.total("train", f"{way}_bytes")) for way in ("up", "down"))
    typer.echo(f"{len(found)} modules scored, {sent} bytes crossed for it: {out}")


@app.command("emulators")
def emulators_command(
    server: Annotated[str, typer.Option(help="HOST:PORT of the cloud node")],
    certs: Annotated[Path | None, typer.Option(help="folder of this edge's certificate")] = None,
    insecure: Annotated[bool, typer.Option("--insecure", help="plaintext to another machine")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
) -> None:
    """Show the emulators that a server offers.

    Example: edge_client emulators --server 127.0.0.1:7070 --certs certs/edge-a
    """
    with quiet():
        from edge_client.offering import offered, table

        offers = offered(server, certs, insecure)
    if as_json:
        typer.echo(json.dumps([offer.as_dict() for offer in offers]))
    elif not offers:
        typer.echo("this server offers no emulators")
    else:
        Console(width=width()).print(table(offers))


app.add_typer(finished_cli.app)
app.add_typer(export_cli.app)
app.add_typer(using_cli.app)
app.add_typer(plan_cli.app)
app.add_typer(calibrate_cli.app)
app.add_typer(doctor_cli.app)
app.add_typer(sealing_cli.app)


def main() -> None:
    """Entry point of the console command."""
    command.run(app, "edge_client")


if __name__ == "__main__":
    main()
