"""The command line of what a run would cost: `edge_client plan`.

Knows flags and what to print; everything else is called.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from edge_client.terminal import console_of_progress, quiet, width
from isthmus.errors import LimitError

if TYPE_CHECKING:
    from edge_client.plan_making import Made
    from edge_client.plan_settings import PlanSettings
    from isthmus.planning.fit import Limits

app = typer.Typer()


@app.command("plan")
def plan_command(
    model: Annotated[
        str | None, typer.Option(help="directory, config.json, id that was fetched, or a name such as llama-3-8b")
    ] = None,
    method: Annotated[
        str | None, typer.Option(help="split, dlora, side, offsite or local, in detail [all, side by side]")
    ] = None,
    cut: Annotated[str | None, typer.Option(help="bottom:top [2:2]")] = None,
    train: Annotated[str | None, typer.Option(help="split: both ends, or top [both]")] = None,
    exchange: Annotated[str | None, typer.Option(help="dlora: what crosses for adapters in the span")] = None,
    init: Annotated[str | None, typer.Option(help="core: what stands around cores, svd or random")] = None,
    peft: Annotated[str | None, typer.Option(help="method on the ends, as of train [lora]")] = None,
    peft_option: Annotated[list[str] | None, typer.Option(help="NAME=VALUE, as of train; may be repeated")] = None,
    rank: Annotated[int | None, typer.Option(help="LoRA's r, or what the method has for it [8]")] = None,
    alpha: Annotated[float | None, typer.Option(help="LoRA's alpha [16]")] = None,
    targets: Annotated[str | None, typer.Option(help="modules with an adapter: q_proj,v_proj or all-linear")] = None,
    dropout: Annotated[float | None, typer.Option(help="share of adapters' inputs dropped [0]")] = None,
    kr_active: Annotated[float | None, typer.Option(help="dlora: share of the span's adapters kept alive")] = None,
    kr_period: Annotated[int | None, typer.Option(help="dlora: steps between killing and reviving [10]")] = None,
    kr_warmup: Annotated[int | None, typer.Option(help="dlora: first steps, in which all are alive [5]")] = None,
    kr_idle: Annotated[str | None, typer.Option(help="dlora: drop or park killed adapters [drop]")] = None,
    kr_criterion: Annotated[str | None, typer.Option(help="dlora: what picks ports [importance]")] = None,
    reduction: Annotated[int | None, typer.Option(help="side: how much narrower its network is [8]")] = None,
    tap_every: Annotated[int | None, typer.Option(help="side: a tap at every n-th block of the span [4]")] = None,
    tap_width: Annotated[int | None, typer.Option(help="side: values a token of each tap [64]")] = None,
    emulator: Annotated[
        str | None,
        typer.Option(help="offsite: its folder, or drop:0.5, rank:0.5:8, quant:4 ... [drop:0.5]"),
    ] = None,
    codec: Annotated[str | None, typer.Option(help="hidden states: none, bf16, fp16 or int8 [none]")] = None,
    codec_gradient: Annotated[str | None, typer.Option(help="gradients [as --codec]")] = None,
    codec_port: Annotated[str | None, typer.Option(help="what crosses at taps and ports [as --codec]")] = None,
    batch_size: Annotated[int | None, typer.Option(help="rows per step [8]")] = None,
    microbatches: Annotated[int | None, typer.Option(help="parts of a batch in flight at once [1]")] = None,
    max_length: Annotated[int | None, typer.Option(help="tokens of a row at most [512, or --length]")] = None,
    steps: Annotated[int | None, typer.Option(help="optimizer steps")] = None,
    epochs: Annotated[float | None, typer.Option(help="passes over the rows [1]")] = None,
    deterministic: Annotated[
        bool | None, typer.Option("--deterministic", help="top, side: each row is asked for alone")
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="of the ends: float32 or bfloat16 [float32]")] = None,
    cloud_dtype: Annotated[str | None, typer.Option(help="of the span: float32 or bfloat16 [float32]")] = None,
    length: Annotated[int | None, typer.Option(help="tokens of a row that are run: all but its last [256]")] = None,
    losses: Annotated[int | None, typer.Option(help="of them, those that are learnt [all but the first]")] = None,
    rows: Annotated[int | None, typer.Option(help="rows of the data [1000, or what --steps need]")] = None,
    tokens: Annotated[int | None, typer.Option(help="tokens of the data, in place of --rows")] = None,
    data: Annotated[Path | None, typer.Option(help="rows of these lengths, by the tokenizer beside --model")] = None,
    link: Annotated[
        str | None, typer.Option(help="loopback, fibre, wifi, 5g, 4g, satellite, or RTT:UPMBIT:DOWNMBIT [fibre]")
    ] = None,
    edge: Annotated[str | None, typer.Option(help="pi-4, pi-5, phone, laptop or jetson-orin-nano [laptop]")] = None,
    cloud: Annotated[str | None, typer.Option(help="a100 or h100 [a100]")] = None,
    edge_tflops: Annotated[float | None, typer.Option(help="10^12 FLOPs a second that the edge reaches")] = None,
    cloud_tflops: Annotated[float | None, typer.Option(help="10^12 FLOPs a second that the cloud reaches")] = None,
    calibration: Annotated[Path | None, typer.Option(help="file that edge_client calibrate wrote")] = None,
    threads: Annotated[int | None, typer.Option(help="of the calibrated edge [as measured]")] = None,
    edge_memory: Annotated[str | None, typer.Option(help="limit: live tensors of the edge, such as 8GB")] = None,
    max_bytes: Annotated[str | None, typer.Option(help="limit: all that crosses, such as 500MB")] = None,
    max_hours: Annotated[float | None, typer.Option(help="limit: of the whole run")] = None,
    fit: Annotated[bool | None, typer.Option("--fit", help="find the best plan within the limits")] = None,
    config: Annotated[Path | None, typer.Option(help="YAML file with the same names as the flags")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON, with all figures")] = False,
) -> None:
    """Tell what a run would cost, from the model's configuration alone: no weights, no server, no data are needed.

    Without --method all methods stand side by side. What is assumed stands in docs/planning.md.

    Example: edge_client plan --model llama-3-8b --link 4g --length 256 --rows 5000
    Example: edge_client plan --model llama-3-8b --fit --edge-memory 8GB --max-bytes 2GB --link 4g
    """
    flags = {name: value for name, value in locals().items() if name not in ("config", "as_json")}
    flags["targets"] = targets.split(",") if targets is not None else None
    with quiet():
        from edge_client.peft_methods import read_options
        from edge_client.plan_settings import PlanSettings

        flags["peft_option"] = read_options(peft_option) if peft_option else None
        settings = PlanSettings.read(config, flags)
        from edge_client.plan_costs import CostsOfRuns  # seconds to import, and mistakes are told before
        from edge_client.plan_making import configuration_of, make
        from edge_client.plan_words import measured_otherwise
        from isthmus.planning.configurations import beside, find

        configuration = configuration_of(settings)
        costs_of = CostsOfRuns(configuration, settings.cloud_dtype, beside(find(settings.model)))
        made = make(settings, configuration, costs_of, console_of_progress())
    for line in measured_otherwise(settings, configuration, made.place):
        typer.echo(line, err=True)
    _print(settings, made, made.place.limits(settings), as_json)


def _print(settings: "PlanSettings", made: "Made", limits: "Limits", as_json: bool) -> None:
    from edge_client.plan_report import report_of
    from edge_client.plan_tables import compared, detailed
    from edge_client.plan_words import impossible, made_for, over_limits, why

    if made.fitted is not None and made.fitted.plan is None:
        raise LimitError(impossible(made.fitted, limits))
    if as_json:
        typer.echo(report_of(settings, made, limits).model_dump_json(indent=2))
        return
    for line in made_for(settings, made.rows, made.place):
        typer.echo(line)
    typer.echo()
    alone = len(made.plans) == 1 and not made.refused
    Console(width=width()).print(detailed(made.plans[0]) if alone else compared(made.plans, made.refused))
    said = why(made.fitted, limits) if made.fitted is not None else over_limits(made.plans, limits)
    if said or alone:
        typer.echo()
    for line in said:
        typer.echo(line)
    if alone:
        typer.echo(f"train so: {made.plans[0].command} --data F.jsonl --out RUN ...")
