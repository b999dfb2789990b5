"""The command line for what `train --seal` sealed: `edge_client unseal`, `reseal`, `wipe` and `seal-key`.

Knows flags and what to print; everything else is called.
"""

from pathlib import Path
from typing import Annotated

import typer

from edge_client.finished_cli import SealKey
from isthmus.trust.seal_keys import make_key_file

app = typer.Typer()

OfRun = Annotated[Path, typer.Option("--run", help="directory of a run that was trained with --seal")]

WHAT_STAYS = (
    "What may be left: copies and backups of the run with its seal.json, which the passphrase or key file still opens; "
    "on SSDs, and on file systems that copy on write or keep snapshots, the blocks of the key that were replaced; "
    "answers and unsealed adapters that were written elsewhere; the data file."
)


@app.command("unseal")
def unseal_command(
    run: OfRun,
    out: Annotated[Path, typer.Option(help="folder to make for the adapter, or file for the answers")],
    answers: Annotated[Path | None, typer.Option(help="file that `predict` wrote for the run, in its place")] = None,
    key_file: SealKey = None,
) -> None:
    """Write a sealed run's adapter in plaintext, as `train` without --seal would have: for peft, or for the owner.

    With --answers, what `predict` answered with the run instead.

    Example: edge_client unseal --run runs/first --out adapters/first
    """
    if answers is not None:
        from edge_client.sealed_lines import unseal_answers

        typer.echo(f"{unseal_answers(run, answers, out, key_file):,} answers, no longer sealed: {out}")
        return
    from edge_client.unsealing import unseal

    typer.echo(f"adapter, no longer sealed: {unseal(run, out, key_file)}")


@app.command("reseal")
def reseal_command(
    run: OfRun,
    key_file: SealKey = None,
    new_key_file: Annotated[
        Path | None, typer.Option(help="opens the run from now on [ISTHMUS_NEW_PASSPHRASE, or asked for]")
    ] = None,
) -> None:
    """Let another passphrase or key file open a run. Who kept the old one and a copy of the old seal.json still can.

    Example: edge_client reseal --run runs/first --new-key-file seal.key
    """
    from edge_client.unsealing import reseal

    reseal(run, key_file, new_key_file)
    opens = f"the key file {new_key_file}" if new_key_file is not None else "the new passphrase"
    typer.echo(
        f"{run} is opened by {opens} from now on; destroy what opened it before, and old copies of its seal.json"
    )


@app.command("wipe")
def wipe_command(
    run: OfRun,
    with_cache: Annotated[
        bool, typer.Option("--with-cache", help="also the sealed outputs in the run's cache, of whichever run they are")
    ] = False,
) -> None:
    """Destroy a sealed run at once and for good: its key first, then its files. It needs no passphrase.

    Example: edge_client wipe --run runs/first
    """
    from edge_client.unsealing import wipe

    done = wipe(run, with_cache)
    typer.echo(f"{run}: the key is destroyed, and the files are removed")
    for path in done.left:
        typer.echo(f"left, being no part of a run: {path}")
    if done.cache is not None:
        typer.echo(f"sealed outputs may be left in {done.cache}, which other runs may use; --with-cache removes them")
    typer.echo(WHAT_STAYS)


@app.command("seal-key")
def seal_key_command(
    out: Annotated[Path, typer.Option(help="key file to make")],
) -> None:
    """Make a key file, which opens what is sealed with it in place of a passphrase. Who has it needs nothing else.

    Example: edge_client seal-key --out seal.key
    """
    make_key_file(out)
    typer.echo(f"{out}: 32 random bytes for --key-file; keep it apart from the runs, and a copy where it is safe")
