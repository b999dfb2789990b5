"""`python -m benchmarks.bookkeeping`: what keeping the ledger costs of a training step, on both sides.

Knows whole runs of `edge_client train` in this process, against a node in another; what counts as keeping accounts
stands in `benchmarks.meter`.
"""

import io
import json
import statistics
import time
from collections import Counter
from collections.abc import Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any, Final

import torch
from rich.console import Console
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from benchmarks.meter import EDGE, Meter
from benchmarks.place import ROWS, TOKENS, Place
from benchmarks.results import Figure, Outcome, Target
from benchmarks.series import Again, Asked, Only, Repeats, Series, Threads, start
from edge_client import train as training
from edge_client.config import TrainConfig
from edge_client.runs import RunDirectory

MOST: Final = 0.01
"""Of a step, in accounts of both sides."""

BLOCKS, WORDS = 6, 4096
STEPS: Final = 12
"""Of a run; the first two are not counted."""

METHODS: Final[dict[str, tuple[str, dict[str, Any]]]] = {
    "split": ("2:2", {"method": "split"}),
    "dlora": ("0:0", {"method": "dlora", "exchange": "activations", "targets": ["all-linear"]}),
}

METHOD = (
    f"A random Llama of SmolLM2-135M's width (hidden 576, {BLOCKS} blocks, {WORDS:,} words) in float32; steps of "
    f"{ROWS} rows of {TOKENS} tokens over mutual TLS on loopback, both sides with all cores. {{what}} Accounts are "
    "every call of the ledger, its file included, the formulas of FLOPs, the bytes of frames, what autograd saved and "
    "the high-water mark; on the cloud also what a node counts for its status page. All seconds are processor time of "
    "both processes, which other work on the machine does not change. By the clock a step takes from that time "
    "shared among all cores, were none ever idle, to longer than it; accounts run on one. What PyTorch takes to call "
    "a hook for each saved tensor is not in it, nor what measuring a call of nothing takes."
)

SECTIONS = (
    (
        "Keeping accounts, split",
        METHOD.format(what="`--method split` at cut 2:2."),
        "bookkeeping/split",
    ),
    (
        "Keeping accounts, ports",
        METHOD.format(what=f"`--method dlora` at cut 0:0, a port at each of the {7 * BLOCKS} linear modules."),
        "bookkeeping/dlora",
    ),
)
"""Title, method and name of each, for the page."""


class _Metered(training._Trainer):
    """Takes the meter's reading after each step."""

    meter: Meter
    seconds: list[float]
    accounts: list[dict[str, dict[str, float]]]

    def _step(self) -> None:
        self.meter.taken()
        began = time.process_time()
        super()._step()
        self.seconds.append(time.process_time() - began)
        self.accounts.append(self.meter.taken())


def measure(place: Place, method: str) -> Outcome:
    """As many runs as there are repeats, after one meter was put around what keeps accounts."""
    torch.set_num_threads(place.threads)
    model, data = _model(place.directory / "model"), _data(place.directory / "rows.jsonl")
    meter, folders = _meter(), [place.directory / f"{method}-{turn}" for turn in range(place.repeats)]
    return _outcome([_run(place, folder, model, data, method, meter) for folder in folders])


@cache
def _meter() -> Meter:
    """One for the process: a second would stand around the first."""
    return Meter(EDGE)


def _run(place: Place, out: Path, model: Path, data: Path, method: str, meter: Meter) -> dict[str, float]:
    cut, flags = METHODS[method]
    told = out.with_suffix(".json")
    served = ("--model", model, "--cut", cut, "--listen", "127.0.0.1:0", "--certs", place.server_certs)
    _Metered.meter, _Metered.seconds, _Metered.accounts = meter, [], []
    with place.process("benchmarks.metered_node", told, "serve", *served, "--threads", place.threads) as address:
        given = {"server": address, "certs": place.edge_certs, "data": data, "cut": cut, "threads": place.threads}
        config = TrainConfig.model_validate({**given, **flags, "steps": STEPS, "batch_size": ROWS})
        usual, training._Trainer = training._Trainer, _Metered
        try:
            training.train(config, RunDirectory(out), False, Console(file=io.StringIO()))
        finally:
            training._Trainer = usual
    return _figures(out, json.loads(told.read_text()), place.threads)


def _figures(out: Path, cloud: dict[str, Any], threads: int) -> dict[str, float]:
    """Of the median step; what the node took is that of the whole run, shared among its steps."""
    counted = slice(2, None)
    step = statistics.median(_Metered.seconds[counted]) + cloud["processor_s"] / STEPS
    edge = statistics.median(_sum(one) for one in _Metered.accounts[counted])
    node = _sum(cloud["accounts"]) / STEPS
    calls = Counter[str]()
    for one in _Metered.accounts[counted]:
        calls.update({name: figures["calls"] for name, figures in one.items()})
    lines = [json.loads(line) for line in (out / "ledger.jsonl").read_text().splitlines()]
    training_lines = [line for line in lines if line["phase"] == "train" and 2 < line["step"] <= STEPS]
    ledger = sum(
        calls[name] for name in ("Ledger.add", "Ledger.add_at", "Ledger.peak", "Ledger.close_step", "Ledger.totals")
    )
    return {
        "share": (edge + node) / step,
        "shortest": (edge + node) / (step / threads),
        "step": step,
        "edge": edge,
        "node": node,
        "ledger": ledger / (STEPS - 2),
        "saved": calls["TensorPeak._pack"] / (STEPS - 2),
        "line": statistics.median(len(json.dumps(line)) for line in training_lines),
        "crossed": statistics.median(sum(line[way] for way in ("up_bytes", "down_bytes")) for line in training_lines),
    }


def _sum(accounts: dict[str, dict[str, float]]) -> float:
    return sum(one["seconds"] for one in accounts.values())


def _outcome(runs: Sequence[dict[str, float]]) -> Outcome:
    def of(name: str, unit: str, scale: float = 1.0) -> Figure:
        return Figure.of([scale * run[name] for run in runs], unit)

    figures = {
        "accounts of a step": of("share", "%", 100),
        "were no core ever idle, of its time by the clock": of("shortest", "%", 100),
        "a step, both processes": of("step", "s"),
        "accounts on the edge": of("edge", "ms", 1e3),
        "accounts on the cloud": of("node", "ms", 1e3),
        "calls of the ledger in a step": of("ledger", ""),
        "tensors that autograd saved in a step": of("saved", ""),
        "a step's line in the file": of("line", "B"),
        "crossed in a step": of("crossed", "MB", 1e-6),
    }
    share = figures["accounts of a step"].value
    met = share <= 100 * MOST
    return Outcome(figures, (Target(f"at most {100 * MOST:.0f} % of a step", f"{share:.2f} %", met),))


def _model(folder: Path) -> Path:
    """A random model whose words are its tokens."""
    if not folder.exists():
        torch.manual_seed(0)
        sizes = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": BLOCKS}
        heads = {"num_attention_heads": 9, "num_key_value_heads": 3, "max_position_embeddings": 512}
        config = LlamaConfig(vocab_size=WORDS, **sizes, **heads, tie_word_embeddings=True, pad_token_id=0)
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
        words = Tokenizer(models.WordLevel({f"w{number}": number for number in range(WORDS)}, unk_token="w0"))  # noqa: S106
        words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0", eos_token="w0").save_pretrained(folder)  # noqa: S106
    return folder


def _data(file: Path) -> Path:
    """Rows of as many random words, of which the last carries the loss."""
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(1, WORDS, (16 * ROWS, TOKENS + 1), generator=generator).tolist()
    rows = ((" ".join(f"w{number}" for number in row[:-1]), f" w{row[-1]}") for row in drawn)
    file.write_text("".join(json.dumps({"prompt": prompt, "completion": last}) + "\n" for prompt, last in rows))
    return file


SERIES = Series(
    "benchmarks.bookkeeping", "bookkeeping/", others={method: partial(measure, method=method) for method in METHODS}
)


def main(only: Only = None, again: Again = False, repeats: Repeats = 3, threads: Threads = None) -> None:
    """Measure, and write docs/benchmarks.md.

    Example: python -m benchmarks.bookkeeping --only dlora --repeats 3
    """
    SERIES.measure(Asked(only, again, repeats, threads, None), Console())
    from benchmarks.run import write_page

    write_page()


if __name__ == "__main__":
    start(main)
