"""A report with a different number in every place."""

from datetime import UTC, datetime
from typing import Any

from isthmus.report.fields.cost import Agreement, ByPhase, Cache, CacheUse, Cloud, Cost, Edge, SideCount, Traffic, Wire
from isthmus.report.fields.ports import BlockCost, Decision, KillRevive, PortCost, Ports
from isthmus.report.fields.run import Codecs, Params, Sample, Settings, Throughput, Tokens, Versions
from isthmus.report.fields.score import Evaluation, Score
from isthmus.report.schema import RunReport


def settings(**changed: Any) -> Settings:
    """A number of its own for each setting."""
    fields: dict[str, Any] = {
        "learning_rate": 0.002,
        "schedule": "cosine",
        "warmup_steps": 3,
        "clip_norm": 0.5,
        "batch_size": 6,
        "max_length": 96,
        "targets": ("q_proj", "v_proj"),
        "alpha": 32.0,
        "dropout": 0.05,
        "data": "7d" * 32,
    }
    return Settings(**(fields | changed))


def report(**changed: Any) -> RunReport:
    """A split run that is complete, with some of its fields replaced."""
    by_phase = ByPhase(
        fetch=Traffic(up_bytes=1_201, down_bytes=170_200_000),
        train=Traffic(up_bytes=83_900_000, down_bytes=84_100_000),
        eval=Traffic(up_bytes=21_000_000, down_bytes=22_000_000),
        generate=Traffic(up_bytes=0, down_bytes=0),
        control=Traffic(up_bytes=612, down_bytes=745),
    )
    fields: dict[str, Any] = {
        "method": "split",
        "exchange": None,
        "model": "smollm2-135m",
        "model_digest": "ab" * 32,
        "cut": "2:2",
        "peft_type": "LORA",
        "seed": 7,
        "deterministic": False,
        "steps": 120,
        "epochs": 1.5,
        "tokens": Tokens(real=36_450, padded=61_500),
        "eval": Evaluation(
            rows=1000,
            before=Score(loss=0.4815, accuracy=0.801, correct=801, accuracy_interval=(0.7751, 0.8246)),
            after=Score(loss=0.3127, accuracy=0.874, correct=874, accuracy_interval=(0.8520, 0.8931)),
            paired=(0.0489, 0.0968),
        ),
        "params": Params(trainable=230_400, head=0, changed=4_718_592, rank=8, stored_bytes=925_312),
        "throughput": Throughput(train_tokens_per_s=141.26, eval_tokens_per_s=603.5),
        "cost": Cost(
            wire=Wire(
                up_bytes=83_900_000,
                down_bytes=84_100_000,
                overhead_bytes=571_200,
                round_trips=240,
                by_phase=by_phase,
                resent_bytes=1_500_000,
            ),
            edge=Edge(
                forward_flops=3_120_000_000_000,
                backward_flops=4_560_000_000_000,
                forward_s=61.25,
                backward_s=82.5,
                wait_s=114.3,
                peak_tensor_bytes=312_000_000,
                peak_memory_bytes=911_000_000,
            ),
            cloud=Cloud(
                forward_flops=5_890_000_000_000,
                backward_flops=5_770_000_000_000,
                forward_s=48.5,
                backward_s=51.75,
                queue_s=0.5,
                peak_tensor_bytes=420_000_000,
                peak_memory_bytes=None,
                recompute_flops=49_000_000_000,
                recomputed_calls=1,
            ),
        ),
        "status": "complete",
        "started": datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC),
        "finished": datetime(2026, 1, 2, 3, 8, 25, tzinfo=UTC),
        "train_seconds": 258.04,
        "final_loss": 0.2986,
        "versions": Versions(isthmus="0.1.0", torch="2.13.0", transformers="5.23.0", peft="0.21.0", python="3.11.7"),
        "device": "cpu",
        "dtype": "float32",
        "codecs": Codecs(activation="int8", gradient="bf16"),
        "server": "127.0.0.1:7001",
        "adapter_format": "peft",
        "agreement": Agreement(
            edge=SideCount(sent_bytes=83_900_000, received_bytes=84_100_000),
            cloud=SideCount(sent_bytes=84_100_000, received_bytes=83_900_000),
            equal=True,
            unchecked_streams=0,
        ),
        "samples": (Sample(prompt="Review: fine\nSentiment:", text=" positive"),),
        "settings": settings(),
    }
    return RunReport(**(fields | changed))


def costing(run: RunReport, **changed: dict[str, Any]) -> RunReport:
    """A run with some figures of its costs replaced, by `wire`, `edge` or `cloud`."""
    parts = {name: getattr(run.cost, name).model_copy(update=figures) for name, figures in changed.items()}
    return run.model_copy(update={"cost": run.cost.model_copy(update=parts)})


def caching(train: tuple[int, int], scored: tuple[int, int]) -> RunReport:
    """The same with a cache, from which and into which so many rows came in training and in scoring."""
    uses = [CacheUse(cached_rows=cached, fetched_rows=fetched) for cached, fetched in (train, scored)]
    return costing(report(), wire={"cache": Cache(train=uses[0], eval=uses[1])})


def ports(decisions: dict[int, tuple[int, ...]] | None = None, **changed: Any) -> Ports:
    """Two ports in each of blocks 9 and 10, and what was alive once so many steps were done; None: all, throughout."""
    policy: dict[str, Any] = {
        "share": 0.125,
        "period": 10,
        "warmup": 20,
        "idle": "drop",
        "criterion": "importance",
        "left_edge": False,
        "decisions": tuple(Decision(step=step, alive=alive) for step, alive in (decisions or {}).items()),
    }
    names = [f"{block}.self_attn.{module}_proj" for block in (9, 10) for module in "qv"]
    return Ports(
        kind="lora",
        ports=tuple(
            PortCost(
                name=name,
                trained_steps=20 + number,
                probed_steps=number,
                edge_forward_flops=10**9 * (number + 1),
                edge_backward_flops=2 * 10**9 * (number + 1),
            )
            for number, name in enumerate(names)
        ),
        blocks=(
            BlockCost(block=9, up_bytes=1_250_000, down_bytes=2_500_000, round_trips=80),
            BlockCost(block=10, up_bytes=20_010_000, down_bytes=30_020_000, round_trips=160),
        ),
        kill_revive=None if decisions is None else KillRevive(**(policy | changed)),
    )


def dlora(decisions: dict[int, tuple[int, ...]] | None = None, steps: int = 120, **changed: Any) -> RunReport:
    """A run with those ports."""
    return report(method="dlora", exchange="activations", steps=steps, ports=ports(decisions, **changed), dropout=0.05)
