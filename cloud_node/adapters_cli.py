"""The command line of what edges tuned: `cloud_node plug-in` and `merge`.

Knows flags; everything else is called, and imported where it is.
"""

from pathlib import Path
from typing import Annotated

import typer

from isthmus.command import importing
from isthmus.errors import UsageError

app = typer.Typer()


@app.command("plug-in")
def plug_in_command(
    model: Annotated[str, typer.Option(help="directory or Hugging Face id of the model")],
    adapter: Annotated[Path, typer.Option(help="a run's adapter folder, or a submission, DIR/EDGE-HASH/ID")],
    out: Annotated[Path, typer.Option(help="folder for the plugged-in model: absent or empty")],
    signer: Annotated[
        Path | None, typer.Option(help="the key that must have signed it, such as certs/authority/issued/NAME.pub")
    ] = None,
    eval_data: Annotated[Path | None, typer.Option(help="rows that the models are scored on, JSON Lines")] = None,
    emulator: Annotated[
        Path | None, typer.Option(help="folder of the emulator it was tuned on, to score what the edge has by itself")
    ] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu or cuda, for scoring [auto]")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads for computing [all cores]")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
) -> None:
    """Plug the ends that an edge tuned into the whole model, and say whether that paid.

    The adapter is checked first: hashes, signature, names, shapes, finite values, and that the model still gives finite
    values with it. A refused one leaves nothing behind.
    A node that serves with --submissions DIR logs the folder of each submission, DIR/EDGE-HASH/ID, and the whole
    command; DIR/EDGE-HASH will do while it holds one.

    Of the rows that `edge_client report` has, this scores the untouched and the plugged-in model, and with --emulator
    the emulator untouched and tuned. Only the edge has those of plugged in plus N true steps and of tuning on the true
    span throughout: they take its data.

    Example: cloud_node plug-in --model models/smollm2-135m --adapter submitted/EDGE-HASH/ID
    --out models/plugged-in --signer certs/authority/issued/alice.pub --eval-data held-out.jsonl
    --emulator emulators/half
    """
    if emulator is not None and eval_data is None:
        raise UsageError("--emulator is there to be scored: give --eval-data F.jsonl with it")
    with importing():
        from cloud_node import plugging

    plugging.run(model, adapter, out, signer, eval_data, emulator, device or "auto", threads, as_json)


@app.command("merge")
def merge_command(
    model: Annotated[str, typer.Option(help="directory or Hugging Face id of the model")],
    adapter: Annotated[Path, typer.Option(help="folder of an adapter, of a run, of plain peft or submitted")],
    out: Annotated[Path, typer.Option(help="folder for the merged model: absent or empty")],
    signer: Annotated[
        Path | None, typer.Option(help="the key that must have signed it, such as certs/authority/issued/NAME.pub")
    ] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads for computing [all cores]")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
) -> None:
    """Merge an adapter that somebody trained into the whole model, whatever method of peft it is of.

    A classifier's adapter makes a classifier, with the head that was trained in it.

    The adapter is checked first: settings, names, shapes, finite values, and, where it has a manifest, hashes,
    signature and the model that it was trained on. A refused one leaves nothing behind. Methods that leave no weights
    to merge, such as prompts, are refused by name.

    Example: cloud_node merge --model models/smollm2-135m --adapter runs/dora/adapter --out models/merged
    """
    with importing():
        from cloud_node import merging

    merging.run(model, adapter, out, signer, threads, as_json)
