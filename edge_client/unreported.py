"""The report of a run that left none, or that went on after it: what its settings, checkpoint, metrics and ledger tell.

Knows a run's directory; changes nothing in it. A process that was killed wrote no report, yet spent what it spent. What
these files do not tell is null.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from edge_client.config import TrainConfig
from edge_client.kill_revive import Plan
from edge_client.runs import RunDirectory
from isthmus.errors import BundleError, RunError, UsageError
from isthmus.report.costs import from_ledger, port_costs
from isthmus.report.fields.ports import Decision, KillRevive, Ports
from isthmus.report.fields.run import BegunFrom, Params, Throughput, Tokens
from isthmus.report.fields.score import Evaluation, Score
from isthmus.report.history import History
from isthmus.report.schema import SCHEMA, RunReport
from isthmus.report.stages import stages_of
from isthmus.training.checkpoints import load_checkpoint
from isthmus.training.scoring import Scores

UNKNOWN: Final = "unknown"
"""The model's name, which only a server, a checkpoint or a report says."""

_Decisions = list[tuple[int, frozenset[str]]]


def unreported(path: Path, history: History, left: RunReport | None) -> RunReport:
    """The report of a run in `path` that was killed, or that still goes on; its status is null while it does.

    Args:
        path: the run's directory.
        history: what is in it of single steps.
        left: the report that the run left before it went on; None: there is none.

    Raises:
        RunError: there is no run.
        UsageError: its settings cannot be read.
    """
    directory = RunDirectory(path)
    config, facts = directory.config(), _facts(directory)
    made_of, taking = facts.get("made_of", {}), facts.get("taking_part")
    last = history.metrics[-1] if history.metrics else None
    steps = max(last.step if last is not None else 0, facts.get("step", 0))
    tokens = last.tokens if last is not None else facts.get("real_tokens", 0)
    seconds = last.seconds if last is not None else None
    begun_from = facts.get("begun_from")
    return RunReport(
        schema=SCHEMA,
        method=config.method,
        exchange=config.exchange,
        model=left.model if left is not None else facts.get("model") or Path(config.model or UNKNOWN).name,
        model_digest=made_of.get("model"),
        cut=made_of.get("cut", config.cut),
        peft_type=config.peft,
        seed=config.seed,
        deterministic=config.deterministic,
        steps=steps,
        epochs=None,
        tokens=Tokens(
            real=tokens, padded=sum(int(one.figures.get("padded_tokens", 0)) for one in history.steps.values())
        ),
        eval=_evaluation(facts.get("before")),
        params=_params(config, left),
        throughput=Throughput(train_tokens_per_s=tokens / seconds if seconds else None, eval_tokens_per_s=None),
        cost=from_ledger(history.ledger),
        status=None if directory.in_use else "failed",
        train_seconds=seconds,
        final_loss=last.loss if last is not None else None,
        versions=left.versions if left is not None else None,
        device=left.device if left is not None else None,
        dtype=config.dtype,
        codecs=left.codecs if left is not None else None,
        server=config.server,
        link=config.link,
        train=config.train if config.peft != "side" else None,
        side=left.side if left is not None else None,
        dropout=config.dropout,
        ports=_ports(config, taking, history, steps) if config.method == "dlora" and taking is not None else None,
        begun_from=BegunFrom.model_validate(begun_from) if begun_from is not None else None,
        eval_data=made_of.get("evaluation file"),
        settings=left.settings if left is not None else None,
        stages=stages_of(history.ledger, {"train": {"steps": steps, "seconds": seconds}}),
    )


def _facts(directory: RunDirectory) -> dict[str, Any]:
    """Of the newest whole checkpoint, its step among them; nothing where there is none that can be opened."""
    try:
        directory.unlock(directory.config().key_file, ask=False)
        checkpoint = load_checkpoint(directory.checkpoints, directory.seal)
    except (RunError, UsageError, BundleError):
        return {}
    return {**checkpoint.facts, "step": checkpoint.step} if checkpoint is not None else {}


def _evaluation(before: Mapping[str, Any] | None) -> Evaluation:
    nothing = Score(loss=None, accuracy=None)
    if before is None:
        return Evaluation(rows=None, before=nothing, after=nothing)
    scores = Scores.restored(before)
    return Evaluation(rows=scores.rows, before=Score.of(scores.loss, scores.correct), after=nothing)


def _params(config: TrainConfig, left: RunReport | None) -> Params:
    """What does not change while a run goes on."""
    known = left.params if left is not None else None
    return Params(
        trainable=known.trainable if known is not None else None,
        head=known.head if known is not None else None,
        changed=None,
        rank=known.rank if known is not None else config.rank,
        stored_bytes=None,
    )


def _ports(config: TrainConfig, taking: Mapping[str, Any], history: History, steps: int) -> Ports:
    """Ports, what they cost, and what was alive: by the checkpoint, and from then on by what took part in steps."""
    names = tuple(taking["trained"])
    decisions = _decisions(config, taking["policy"], history, steps, len(names))
    trained, probed = Counter[str](), Counter[str]()
    for step in history.steps:
        active, alive = _active(history, step), _alive(decisions, names, step)
        trained.update(active & alive)
        probed.update(active - alive)
    ports, blocks = port_costs(history.ledger, names, trained, probed)
    policy = None
    if config.kr_active is not None:
        dead = frozenset(names) - (decisions[-1][1] if decisions else frozenset(names))
        policy = KillRevive(
            share=config.kr_active,
            period=config.kr_period,
            warmup=config.kr_warmup,
            idle=config.kr_idle,
            criterion="scores" if config.kr_scores is not None else config.kr_criterion,
            left_edge=taking["left_edge"] or (config.kr_idle == "park" and any(trained[name] for name in dead)),
            decisions=tuple(
                Decision(step=step, alive=tuple(sorted(map(names.index, alive)))) for step, alive in decisions
            ),
        )
    return Ports(kind="lora", ports=ports, blocks=blocks, kill_revive=policy)


def _decisions(
    config: TrainConfig, policy: Mapping[str, Any] | None, history: History, steps: int, ports: int
) -> _Decisions:
    """The checkpoint's, and those that were due after it: what took part in the step that followed was alive."""
    if policy is None:
        return []
    known = [(step, frozenset(names)) for step, names in policy["decisions"]]
    latest = known[-1][0] if known else -1
    later = [(step, _active(history, step + 1)) for step in _due(config, steps) if step > latest]
    return [*known, *((step, alive) for step, alive in later if 0 < len(alive) < ports)]


def _due(config: TrainConfig, steps: int) -> Iterator[int]:
    """Steps before which Kill-and-Revive decided, but where the same step also measured others."""
    if config.kr_active is None:
        return iter(())
    scores: dict[str, float] | None = {} if config.kr_scores is not None else None
    plan = Plan(config.kr_active, config.kr_period, config.kr_warmup, config.kr_criterion, config.seed, scores)
    if not plan.measures:
        return iter(range(plan.first, steps)[:1])
    return iter(range(plan.first, steps, plan.period) if plan.period > 1 else ())


def _active(history: History, step: int) -> frozenset[str]:
    """Ports that took part in a step (1 is the first)."""
    places = history.steps[step].places if step in history.steps else {}
    return frozenset(at for at, figures in places.items() if figures.get("edge_forward_flops"))


def _alive(decisions: _Decisions, names: tuple[str, ...], step: int) -> frozenset[str]:
    before = [alive for decided, alive in decisions if decided < step]
    return before[-1] if before else frozenset(names)
