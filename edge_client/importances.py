"""Which modules of the span would be worth an adapter, found without training any: first scores for Kill-and-Revive.

Knows rows, gradients and where they are taken: on the edge alone with an emulator that keeps every block, or on the
true span.
"""

from dataclasses import replace

import torch
from rich.console import Console

from edge_client.assemble import assembled
from edge_client.attaching import attach
from edge_client.config import TrainConfig
from edge_client.edge_flops import count_edge_flops
from edge_client.edge_model import EdgeModel
from edge_client.labels import with_labels
from edge_client.step import Stepper
from edge_client.tuning import Tuning
from isthmus.emulated.recipe import Recipe
from isthmus.errors import UsageError
from isthmus.ledger.record import Ledger
from isthmus.training.batches import batch_at, split_rows
from isthmus.training.collate import Batch
from isthmus.training.data import read_examples
from isthmus.training.progress import meter


def importances(config: TrainConfig, ledger: Ledger, console: Console) -> dict[str, float]:
    """What a first step at each port would do to the loss, to first order: the sum of |gradient|, mean of some batches.

    An adapter adds nothing at its start, so every batch meets the same model. `config.steps` says how many batches.

    Args:
        config: of a run whose adapters in the span these would be; `offsite` takes an emulator in the span's place.
        ledger: counts what crosses, and the edge's work, as training.
        console: shows progress.

    Returns:
        By port ("12.self_attn.q_proj"), as `--kr-scores` takes them.

    Raises:
        UsageError: the method has no adapters in the span, or the emulator lacks blocks of it.
        IsthmusError: whatever else stands in the way, each with its remedy.
    """
    if config.method not in ("offsite", "dlora") and not config.in_span:
        raise UsageError("importances are of modules in the span: give --method offsite, dlora or local")
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    config = with_labels(config)
    with assembled(config, ledger, console) as edge:
        if edge.standin is not None:
            _check_every_block_is_there(edge.standin.about.recipe)
        tuning = attach(edge.model, edge.found, edge.cut, replace(config.placement, in_span=True))
        if edge.adapters is not None:
            edge.adapters.attached()
            edge.adapters.active = frozenset(edge.adapters.sites)
        stepper = Stepper(edge, tuning, ledger, count_edge_flops(edge, tuning), config.microbatches, config.seed)
        try:
            return _summed(config, edge, tuning, stepper, console)
        finally:
            stepper.close()


def _check_every_block_is_there(recipe: Recipe) -> None:
    if len(recipe.kept) < len(recipe.blocks):
        raise UsageError(f"a `{recipe.method}` emulator lacks blocks of the span; use one of `rank` or `quant`")


def _summed(
    config: TrainConfig, edge: EdgeModel, tuning: Tuning, stepper: Stepper, console: Console
) -> dict[str, float]:
    examples = read_examples(config.data, edge.tokenizer, edge.longest(config.max_length), config.labels).examples
    lengths = tuple(len(example.train.ids) for example in examples)
    count, totals = config.steps or 10, dict.fromkeys(tuning.ports, 0.0)
    with meter(console, "importances", count) as progress:
        for step in range(count):
            rows = batch_at(lengths, config.batch_size, config.seed, step)
            parts = [Batch.of([examples[row].train for row in part]) for part in split_rows(rows, config.microbatches)]
            found = stepper.gradients(parts, step).by_name
            for name, port in tuning.ports.items():
                totals[name] += sum(float(found[parameter].abs().sum()) for parameter in port.parameters) / count
            progress.update(step + 1)
    return totals
