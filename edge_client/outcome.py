"""What a run came to: its standing while it goes, and `run.json` from everything that was counted.

Knows scores, the ledger and the report's schema; trains nothing and measures nothing.
"""

import json
import platform
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any, Literal

import torch
import transformers

from edge_client import link
from edge_client.config import TrainConfig
from edge_client.edge_model import EdgeModel, device_of
from edge_client.offsite import bundle_bytes
from edge_client.peft_methods import METHODS
from edge_client.runs import sha256
from edge_client.taking_part import TakingPart
from edge_client.tuning import Tuning
from edge_client.watch import Watch
from isthmus import __version__
from isthmus.ledger.record import Ledger, Phase
from isthmus.ports import every
from isthmus.report.costs import from_ledger, port_costs
from isthmus.report.fields.cost import Agreement, SideCount
from isthmus.report.fields.offsite import Offsite
from isthmus.report.fields.ports import Decision, KillRevive, Ports
from isthmus.report.fields.run import (
    BegunFrom,
    Codecs,
    Params,
    Sample,
    Settings,
    SideNetwork,
    Throughput,
    Tokens,
    Versions,
)
from isthmus.report.fields.score import Evaluation, Score
from isthmus.report.fields.stage import Stage
from isthmus.report.interval import paired
from isthmus.report.schema import SCHEMA, RunReport
from isthmus.report.stages import stages_of, stages_told
from isthmus.training.scoring import Scores

Status = Literal["complete", "interrupted", "failed"]


@dataclass
class Standing:
    """Where a run stands. `facts` of it are in each checkpoint."""

    step: int = 0
    seconds: float = 0.0
    eval_seconds: float = 0.0
    loss: float | None = None
    before: Scores | None = None
    after: Scores | None = None
    samples: tuple[Sample, ...] = ()
    real_tokens: int = 0  # of the steps that count; the ledger also holds steps that a crash made necessary twice
    padded_tokens: int = 0
    begun_from: BegunFrom | None = None

    def facts(self) -> dict[str, Any]:
        """What a resumed run must know, as JSON."""
        return {
            "seconds": self.seconds,
            "eval_seconds": self.eval_seconds,
            "loss": self.loss,
            "real_tokens": self.real_tokens,
            "padded_tokens": self.padded_tokens,
            "before": vars(self.before) if self.before is not None else None,
            "begun_from": self.begun_from.model_dump() if self.begun_from is not None else None,
        }

    @classmethod
    def restored(cls, step: int, facts: dict[str, Any]) -> "Standing":
        """The standing that `facts` were taken of."""
        before, begun_from = facts["before"], facts.get("begun_from")  # which older runs lack
        return cls(
            step=step,
            seconds=facts["seconds"],
            eval_seconds=facts["eval_seconds"],
            loss=facts["loss"],
            real_tokens=facts["real_tokens"],
            padded_tokens=facts["padded_tokens"],
            before=Scores.restored(before) if before is not None else None,
            begun_from=BegunFrom.model_validate(begun_from) if begun_from is not None else None,
        )


@dataclass(frozen=True)
class Outcome:
    """Everything that a report is made of."""

    config: TrainConfig
    edge: EdgeModel
    tuning: Tuning
    ledger: Ledger
    standing: Standing
    started: datetime
    rows: int
    eval_rows: int | None
    stored_bytes: int
    resumed: bool
    taking: TakingPart
    watch: Watch | None = None
    adapter: str | None = None

    def report(self, status: Status, agreement: link.Agreement | None) -> RunReport:
        """The run's report."""
        config, edge, at = self.config, self.edge, self.standing
        scored = self.ledger.totals("eval")
        return RunReport(
            schema=SCHEMA,
            method=config.method,
            exchange=config.exchange,
            model=edge.name,
            model_digest=edge.digest,
            cut=str(edge.cut),
            peft_type=config.peft,
            seed=config.seed,
            deterministic=config.deterministic,
            steps=at.step,
            epochs=at.step * config.batch_size / self.rows,
            tokens=Tokens(real=at.real_tokens, padded=at.padded_tokens),
            eval=self._evaluation(),
            params=self._params(),
            throughput=Throughput(
                train_tokens_per_s=_rate(at.real_tokens, at.seconds),
                eval_tokens_per_s=_rate(scored.get("real_tokens", 0), at.eval_seconds),
            ),
            cost=from_ledger(self.ledger),
            status=status,
            started=self.started,
            finished=datetime.now(UTC),
            train_seconds=at.seconds,
            final_loss=at.loss,
            versions=_versions(),
            device=str(device_of(edge)),
            dtype=config.dtype,
            codecs=self._codecs() if edge.remote is not None else None,
            server=config.server,
            link=config.link,
            adapter_format=self.tuning.saved_as if self.stored_bytes else None,
            agreement=_agreement(agreement, int(self.resumed)) if agreement is not None else None,
            samples=at.samples,
            train=config.train if self.tuning.side is None else None,
            dropout=config.dropout,
            ports=self._ports(),
            side=self._side(),
            offsite=self._offsite(),
            begun_from=at.begun_from,
            adapter=self.adapter,
            eval_data=sha256(config.eval_data) if config.eval_data is not None else None,
            settings=self._settings(),
            stages=self._stages(),
        )

    def _stages(self) -> tuple[Stage, ...]:
        """The owner's, as far as they were told, and the run's own."""
        told = self.edge.standin.costs if self.edge.standin is not None else None
        known: dict[Phase, dict[str, Any]] = {
            "fetch": {"seconds": self.ledger.totals("fetch").get("edge_wait_s")},
            "eval": {"seconds": self.standing.eval_seconds},
            "train": {
                "seconds": self.standing.seconds,
                "steps": self.standing.step,
                "stored_bytes": self.stored_bytes or None,
            },
            "look": {"seconds": self.watch.seconds if self.watch is not None else None},
        }
        owners = stages_told(told) if told is not None else ()
        return (*owners, *stages_of(self.ledger, known))

    def _settings(self) -> Settings:
        config = self.config
        dropped = METHODS[config.peft].dropout
        return Settings(
            learning_rate=config.lr,
            schedule=config.schedule,
            warmup_steps=config.warmup_steps,
            clip_norm=config.clip_norm,
            batch_size=config.batch_size,
            max_length=config.max_length,
            targets=tuple(config.targets) if config.targets is not None else None,
            alpha=config.alpha,
            dropout=config.dropout if dropped else None,
            data=sha256(config.data),
            peft_options=tuple(f"{name}={json.dumps(value)}" for name, value in sorted(config.peft_option.items())),
        )

    def _codecs(self) -> Codecs:
        config = self.config
        return Codecs(
            activation=config.codec,
            gradient=None if config.forward_only or config.method == "offsite" else config.gradient_codec,
            port=config.port_codec if self.tuning.side is not None or config.in_span else None,
        )

    def _ports(self) -> Ports | None:
        """Costs by port and block, where ports were asked over the wire."""
        if self.edge.adapters is None:
            return None
        names = tuple(self.tuning.ports)
        ports, blocks = port_costs(self.ledger, names, self.taking.trained, self.taking.probed)
        return Ports(kind="lora", ports=ports, blocks=blocks, kill_revive=self._kill_revive(names))

    def _kill_revive(self, names: tuple[str, ...]) -> KillRevive | None:
        config, policy = self.config, self.taking.policy
        if policy is None or config.kr_active is None:
            return None
        return KillRevive(
            share=config.kr_active,
            period=config.kr_period,
            warmup=config.kr_warmup,
            idle=config.kr_idle,
            criterion="scores" if config.kr_scores is not None else config.kr_criterion,
            left_edge=self.taking.left_edge,
            decisions=tuple(
                Decision(step=step, alive=tuple(sorted(map(names.index, alive)))) for step, alive in policy.decisions
            ),
        )

    def _offsite(self) -> Offsite | None:
        if self.edge.standin is None:
            return None
        about, watch = self.edge.standin.about, self.watch
        untouched = watch.untouched if watch is not None else None
        return Offsite(
            emulator=self.edge.standin.id,
            method=about.recipe.method,
            blocks=len(about.recipe.kept),
            bits=about.recipe.bits,
            parameters=about.parameters,
            span_parameters=about.span_parameters,
            weight_bytes=about.weight_bytes,
            flops_per_token=about.flops_per_token,
            span_flops_per_token=about.span_flops_per_token,
            distilled_steps=about.distillation.steps if about.distillation is not None else 0,
            gap=about.distance.gap if about.distance is not None else None,
            watched_rows=untouched.rows if untouched is not None else None,
            watched=watch.points if watch is not None else (),
            watched_untouched=score_of(untouched) if untouched is not None else None,
            watched_seconds=watch.seconds if watch is not None else None,
            bundle_bytes=bundle_bytes(self.config, self.edge.standin.id),
        )

    def _side(self) -> SideNetwork | None:
        shape = self.tuning.side
        if shape is None:
            return None
        taps = every(shape.every, self.edge.cut, len(self.edge.found.blocks), shape.width)
        return SideNetwork(reduction=shape.reduction, tap_every=shape.every, tap_width=shape.width, taps=len(taps))

    def _evaluation(self) -> Evaluation:
        before, after = self.standing.before, self.standing.after
        rise = None
        if before is not None and after is not None and before.correct:
            rise = paired(before.correct, after.correct)[1:]
        return Evaluation(rows=self.eval_rows, before=score_of(before), after=score_of(after), paired=rise)

    def _params(self) -> Params:
        return Params(
            trainable=self.tuning.count,
            head=self.tuning.head_count,
            changed=self.tuning.changed(),
            rank=self.tuning.rank,
            stored_bytes=self.stored_bytes,
        )


def score_of(scores: Scores | None) -> Score:
    """Scores as a report has them; nulls where nothing was scored."""
    return Score(loss=None, accuracy=None) if scores is None else Score.of(scores.loss, scores.correct)


def _rate(tokens: float, seconds: float) -> float | None:
    return tokens / seconds if seconds else None


def _agreement(counts: link.Agreement, earlier_streams: int) -> Agreement:
    return Agreement(
        edge=SideCount(sent_bytes=counts.edge_sent, received_bytes=counts.edge_received),
        cloud=SideCount(sent_bytes=counts.cloud_sent, received_bytes=counts.cloud_received),
        equal=counts.equal,
        unchecked_streams=counts.unchecked_streams + earlier_streams,
    )


def _versions() -> Versions:
    return Versions(
        isthmus=__version__,
        torch=torch.__version__,
        transformers=transformers.__version__,
        peft=version("peft"),
        python=platform.python_version(),
    )
