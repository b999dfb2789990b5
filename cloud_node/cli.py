"""The command line of the model owner: `cloud_node serve` and what surrounds it, each command in a file of its own.

Knows flags; everything else is called, and imported where it is.
"""

from pathlib import Path
from typing import Annotated

import typer

from cloud_node import adapters_cli, audit_cli, certs, emulators, health_cli, logs, models
from cloud_node.config import ServeConfig
from cloud_node.policy import cli as policies
from isthmus import command
from isthmus.settings import read_settings

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
app.add_typer(certs.app, name="certs")
app.add_typer(policies.app, name="policy")
app.add_typer(audit_cli.app, name="audit")
app.add_typer(models.app, name="models")
app.add_typer(emulators.app, name="emulator")
app.add_typer(adapters_cli.app)
app.add_typer(health_cli.app)


@app.callback()
def _root() -> None:
    """Hold a model's frozen backbone and run its span for edge clients."""


@app.command("serve")
def serve_command(
    model: Annotated[str | None, typer.Option(help="directory or Hugging Face id of the model")] = None,
    cut: Annotated[list[str] | None, typer.Option(help="cut offered, bottom:top; may be repeated [2:2]")] = None,
    listen: Annotated[str | None, typer.Option(help="HOST:PORT; port 0 takes a free one [127.0.0.1:7070]")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu or cuda [auto]")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32 or bfloat16 [float32]")] = None,
    quantize: Annotated[
        str | None, typer.Option(help="hold the span's weights as int8 or nf4, with pip install 'isthmus[quantize]'")
    ] = None,
    certs_dir: Annotated[Path | None, typer.Option("--certs", help="folder of the server's certificate")] = None,
    insecure: Annotated[bool | None, typer.Option("--insecure", help="serve in plaintext off loopback")] = None,
    policy: Annotated[Path | None, typer.Option(help="YAML file: which tenant may do what, and how much")] = None,
    activation_budget: Annotated[int | None, typer.Option(help="bytes kept for backward passes [4 GiB]")] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads for computing [all cores]")] = None,
    grace: Annotated[float | None, typer.Option(help="seconds to finish requests when stopped [30]")] = None,
    emulators: Annotated[Path | None, typer.Option(help="folder of an emulator, or of several, to offer")] = None,
    submissions: Annotated[Path | None, typer.Option(help="folder to take edges' adapters into")] = None,
    signers: Annotated[
        Path | None,
        typer.Option(help="folder of edges' signing keys, such as certs/authority/issued; needed with --certs"),
    ] = None,
    rounds: Annotated[Path | None, typer.Option(help="folder to keep rounds of many edges in (docs/rounds.md)")] = None,
    round_wait: Annotated[
        float | None, typer.Option(help="seconds that a round waits for an edge that is silent [60]")
    ] = None,
    engine: Annotated[
        str | None, typer.Option(help="inprocess, or ray with pip install 'isthmus[ray]' [inprocess]")
    ] = None,
    stages: Annotated[int | None, typer.Option(help="ray: processes that share the span's blocks [1]")] = None,
    replicas: Annotated[str | None, typer.Option(help="ray: copies of the span, MIN:MAX [1:1]")] = None,
    address: Annotated[str | None, typer.Option(help="ray: cluster to join, or auto; else a local one")] = None,
    status_port: Annotated[int | None, typer.Option(help="serve the status page and metrics at this port")] = None,
    status_host: Annotated[
        str | None, typer.Option(help="interface of the status page, whatever --listen is [127.0.0.1]")
    ] = None,
    audit: Annotated[Path | None, typer.Option(help="file to keep who did what in, chained by hashes")] = None,
    log_format: Annotated[str | None, typer.Option(help="text or json [text]")] = None,
    log_level: Annotated[str | None, typer.Option(help="debug, info or warning, of our own lines [info]")] = None,
    config: Annotated[Path | None, typer.Option(help="YAML file with the same names as the flags")] = None,
) -> None:
    """Serve a model's span until SIGTERM.

    Example: cloud_node serve --model models/smollm2-135m --cut 2:2 --certs certs/server --dtype bfloat16
    """
    flags = {
        "model": model,
        "cut": cut or None,
        "listen": listen,
        "device": device,
        "dtype": dtype,
        "quantize": quantize,
        "certs": certs_dir,
        "insecure": insecure,
        "policy": policy,
        "activation_budget": activation_budget,
        "threads": threads,
        "grace": grace,
        "emulators": emulators,
        "submissions": submissions,
        "signers": signers,
        "rounds": rounds,
        "round_wait": round_wait,
        "engine": engine,
        "stages": stages,
        "replicas": replicas,
        "address": address,
        "status_port": status_port,
        "status_host": status_host,
        "audit": audit,
        "log_format": log_format,
        "log_level": log_level,
    }
    settings = read_settings(ServeConfig, config, flags)
    logs.configure(settings.log_format, settings.log_level)
    if settings.engine == "ray":
        from cloud_node.on_ray.supervisor import supervised

        code = supervised(settings.listen)
        if code is not None:
            raise typer.Exit(code)
    with command.importing():
        from cloud_node import node

    node.run(settings)


def main() -> None:
    """Entry point of the console command."""
    command.run(app, "cloud_node")


if __name__ == "__main__":
    main()
