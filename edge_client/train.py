"""Training: a flat loop that does not know where the span runs, and the run it leaves behind.

Knows the order of things: evaluate, step, checkpoint, evaluate, save, report. What each is stands elsewhere.
"""

import math
import platform
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any

import torch
import transformers
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from rich.console import Console

from edge_client.assemble import EdgeModel, connect, device_of, load_local
from edge_client.batches import batch_at, split_rows
from edge_client.checkpoints import Checkpoint, load_checkpoint, save_checkpoint
from edge_client.collate import Batch
from edge_client.config import TrainConfig
from edge_client.data import Dataset, read_examples
from edge_client.edge_flops import count_edge_flops
from edge_client.optimizer import Optimizer, rate_at
from edge_client.progress import meter
from edge_client.runs import RunDirectory
from edge_client.scoring import Scores, score
from edge_client.step import Stepper
from edge_client.tuning import Tuning, attach, save_adapter
from isthmus import __version__
from isthmus.errors import InterruptedRunError, RunError
from isthmus.ledger.memory import peak_bytes, reset_peak
from isthmus.ledger.record import Ledger
from isthmus.report import schema
from isthmus.report.interval import paired, wilson
from isthmus.trust.credentials import Credentials


@dataclass
class _Progress:
    """Where a run stands; all of it is in each checkpoint."""

    step: int = 0
    seconds: float = 0.0
    loss: float | None = None
    before: Scores | None = None
    after: Scores | None = None
    eval_seconds: float = 0.0
    samples: tuple[schema.Sample, ...] = ()


def train(config: TrainConfig, run: RunDirectory, resume: bool, console: Console) -> schema.RunReport:
    """Train as `config` says into `run`; `resume` goes on from its last checkpoint.

    Raises:
        InterruptedRunError: stopped by the user after a whole step; checkpoint and report are written.
        IsthmusError: anything else that ends the run; what was spent is reported.
    """
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    torch.use_deterministic_algorithms(config.deterministic)
    started = datetime.now(UTC)
    with run.locked():
        checkpoint = load_checkpoint(run.checkpoints) if resume else None
        ledger = run.resume(checkpoint.step if checkpoint else 0) if resume else run.begin(config)
        with _assembled(config, ledger, console) as edge:
            return _Run(config, run, edge, ledger, console, started).carry_out(checkpoint)


@contextmanager
def _assembled(config: TrainConfig, ledger: Ledger, console: Console) -> Iterator[EdgeModel]:
    reset_peak()
    if config.method == "local":
        yield load_local(config)
        return
    with meter(console, "fetch the ends", 1) as fetching:
        edge = connect(config, ledger, lambda done, total: fetching.update(done // max(1, total)))
        fetching.update(1)
    try:
        yield edge
    finally:
        edge.close()


class _Run:
    """One run from here to its report."""

    def __init__(
        self,
        config: TrainConfig,
        run: RunDirectory,
        edge: EdgeModel,
        ledger: Ledger,
        console: Console,
        started: datetime,
    ) -> None:
        self._config = config
        self._run = run
        self._edge = edge
        self._ledger = ledger
        self._console = console
        self._started = started
        self._data = self._read(config.data)
        self._eval = self._read(config.eval_data) if config.eval_data is not None else None
        self._lengths = tuple(len(example.train.ids) for example in self._data.examples)
        self._steps = _steps(config, len(self._lengths))
        self._tuning = attach(
            edge.model, edge.found, edge.cut, config.peft, config.rank, config.alpha, config.targets, config.seed
        )
        self._optimizer = Optimizer(self._tuning.trainable, config.clip_norm)
        flops = count_edge_flops(edge, self._tuning)
        self._stepper = Stepper(edge, self._tuning, ledger, flops, config.microbatches)
        self._stepper.memory.hold("optimizer", self._optimizer.state_bytes)
        self._at = _Progress()

    def carry_out(self, checkpoint: Checkpoint | None) -> schema.RunReport:
        if checkpoint is not None:
            self._restore(checkpoint)
        status = "failed"
        try:
            self._work()
            status = "complete"
        except InterruptedRunError:
            status = "interrupted"
            raise
        finally:
            self._stepper.close()
            report = self._report(status)
            report.save(self._run.path)
        return report

    def _work(self) -> None:
        with _stopping() as stop:
            if self._at.before is None and self._eval is not None:
                self._at.before = self._score("evaluate before", self._eval)
            if self._at.step == 0:
                self._save_checkpoint()
            self._train(stop)
        if self._eval is not None:
            self._at.after = self._score("evaluate after", self._eval)
        if self._config.sample is not None:
            self._at.samples = (self._sample(self._config.sample),)
        self._save_adapter()

    def _train(self, stop: list[int]) -> None:
        with meter(self._console, "train", self._steps) as progress:
            while self._at.step < self._steps:
                self._step()
                progress.update(self._at.step, self._note())
                if self._at.step % self._config.checkpoint_every == 0 or stop or self._at.step == self._steps:
                    self._save_checkpoint()
                if stop and self._at.step < self._steps:
                    self._save_adapter()
                    raise InterruptedRunError(
                        f"stopped after step {self._at.step}; go on with "
                        f"`edge_client train --resume --out {self._run.path}`"
                    )

    def _step(self) -> None:
        config, step, began = self._config, self._at.step, time.perf_counter()
        rows = batch_at(self._lengths, config.batch_size, config.seed, step)
        batches = [
            Batch.of([self._data.examples[row].train for row in part]) for part in split_rows(rows, config.microbatches)
        ]
        found = self._stepper.gradients(batches)
        if not math.isfinite(found.loss):
            raise RunError(f"the loss is {found.loss} at step {step + 1}; lower --lr, or use a finer --codec")
        rate = rate_at(step, self._steps, config.lr, config.schedule, config.warmup_steps)
        norm = self._optimizer.step(found.by_name, rate)
        self._at.step, self._at.loss = step + 1, found.loss
        self._at.seconds += time.perf_counter() - began
        self._note_peaks()
        self._ledger.close_step(self._at.step)
        self._run.write_metrics(
            step=self._at.step,
            loss=found.loss,
            gradient_norm=norm,
            lr=rate,
            seconds=round(self._at.seconds, 3),
            tokens=int(self._ledger.total("train", "real_tokens")),
        )

    def _note(self) -> str:
        spent = self._ledger.totals("train")
        rate = spent.get("real_tokens", 0) / self._at.seconds
        up, down = spent.get("up_bytes", 0) / 1e6, spent.get("down_bytes", 0) / 1e6
        return f"loss {self._at.loss:.3f}  {rate:.0f} tok/s  up {up:.1f} MB  down {down:.1f} MB"

    def _score(self, label: str, data: Dataset) -> Scores:
        began, device = time.perf_counter(), device_of(self._edge)
        with self._edge.phase("eval"), meter(self._console, label, len(data.examples)) as progress:
            scores = score(
                self._tuning.model,
                data.examples,
                self._config.eval_batch_size,
                device,
                lambda done, total: progress.update(len(data.examples) * done // total),
            )
        self._ledger.add("eval", real_tokens=scores.real_tokens, padded_tokens=scores.padded_tokens)
        self._ledger.close_step(self._at.step)
        self._at.eval_seconds += time.perf_counter() - began
        return scores

    def _sample(self, prompt: str) -> schema.Sample:
        with self._edge.phase("generate"):
            text = generate(self._edge, self._tuning, prompt, 32)
        self._ledger.close_step(self._at.step)
        return schema.Sample(prompt=prompt, text=text)

    def _read(self, path: Any) -> Dataset:
        longest = self._edge.row_tokens or self._config.max_length
        data = read_examples(path, self._edge.tokenizer, min(self._config.max_length, longest))
        if data.truncated:
            self._console.print(f"{path}: {data.truncated} rows were longer than --max-length and lost tokens")
        return data

    def _note_peaks(self) -> None:
        self._ledger.peak("edge_peak_tensor_bytes", self._stepper.memory.peak_bytes)
        self._ledger.peak("edge_peak_memory_bytes", peak_bytes() or 0)

    def _save_checkpoint(self) -> None:
        facts: dict[str, Any] = {
            "seconds": self._at.seconds,
            "loss": self._at.loss,
            "eval_seconds": self._at.eval_seconds,
            "before": vars(self._at.before) if self._at.before is not None else None,
        }
        try:
            save_checkpoint(self._run.checkpoints, Checkpoint(self._at.step, self._optimizer.state(), facts))
        except OSError as error:
            raise RunError(f"no checkpoint can be written ({error.strerror}); free some space and --resume") from None

    def _restore(self, checkpoint: Checkpoint) -> None:
        before = checkpoint.facts["before"]
        self._at = _Progress(
            step=checkpoint.step,
            seconds=checkpoint.facts["seconds"],
            loss=checkpoint.facts["loss"],
            eval_seconds=checkpoint.facts["eval_seconds"],
            before=Scores(**{**before, "correct": tuple(before["correct"])}) if before is not None else None,
        )
        try:
            self._optimizer.load(checkpoint.tensors)
        except (KeyError, RuntimeError):
            raise RunError("the checkpoint is of another adapter; resume with the run's own settings") from None

    def _save_adapter(self) -> None:
        config, edge = self._config, self._edge
        key = Credentials.load(config.certs).signing_key() if config.certs else Ed25519PrivateKey.generate()
        save_adapter(self._tuning, self._run.adapter, edge.name, edge.digest, edge.cut, key)

    def _report(self, status: Any) -> schema.RunReport:
        self._note_peaks()
        agreement = self._edge.compare_counts()
        self._ledger.close_step(self._at.step)
        config, edge, at = self._config, self._edge, self._at
        spent, tokens = self._ledger.totals("train"), self._ledger.totals("eval").get("real_tokens", 0)
        if edge.remote is None:  # nothing was asked of a cloud: known zeros, not unknown figures
            self._ledger.add("train", edge_wait_s=0.0)
        return schema.RunReport(
            schema=schema.SCHEMA,
            method=config.method,
            exchange=None,
            model=edge.name,
            model_digest=edge.digest,
            cut=str(edge.cut),
            peft_type=config.peft,
            seed=config.seed,
            deterministic=config.deterministic,
            steps=at.step,
            epochs=at.step * config.batch_size / len(self._lengths),
            tokens=schema.Tokens(real=int(spent.get("real_tokens", 0)), padded=int(spent.get("padded_tokens", 0))),
            eval=_evaluation(self._eval, at),
            params=schema.Params(
                trainable=self._tuning.count,
                head=0,
                changed=self._tuning.changed(),
                rank=self._tuning.rank,
                stored_bytes=self._run.stored_bytes(),
            ),
            throughput=schema.Throughput(
                train_tokens_per_s=spent.get("real_tokens", 0) / at.seconds if at.seconds else None,
                eval_tokens_per_s=tokens / at.eval_seconds if at.eval_seconds else None,
            ),
            cost=schema.from_ledger(self._ledger),
            status=status,
            started=self._started,
            finished=datetime.now(UTC),
            train_seconds=at.seconds,
            final_loss=at.loss,
            versions=_versions(),
            device=str(device_of(edge)),
            dtype=config.dtype,
            codecs=None
            if edge.remote is None
            else schema.Codecs(activation=config.codec, gradient=config.gradient_codec),
            server=config.server,
            adapter_format="peft" if config.peft == "lora" else "isthmus",
            agreement=None
            if agreement is None
            else schema.Agreement(
                edge=schema.SideCount(sent_bytes=agreement.edge_sent, received_bytes=agreement.edge_received),
                cloud=schema.SideCount(sent_bytes=agreement.cloud_sent, received_bytes=agreement.cloud_received),
                equal=agreement.equal,
                unchecked_streams=agreement.unchecked_streams,
            ),
            samples=at.samples,
        )


def generate(edge: EdgeModel, tuning: Tuning, prompt: str, new_tokens: int) -> str:
    """Continue a prompt greedily; the span's cache stays on the cloud."""
    inputs = edge.tokenizer(prompt, return_tensors="pt").to(device_of(edge))
    with torch.no_grad():
        output: torch.Tensor = tuning.model.generate(**inputs, max_new_tokens=new_tokens, do_sample=False)  # type: ignore[operator]
    text = edge.tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return str(text)


def _steps(config: TrainConfig, rows: int) -> int:
    if config.steps is not None:
        return config.steps
    return max(1, round((config.epochs or 1.0) * math.ceil(rows / config.batch_size)))


@contextmanager
def _stopping() -> Iterator[list[int]]:
    """A list that fills when the user asks to stop; a second Ctrl-C ends the process at once."""
    asked: list[int] = []

    def note(signum: int, _: Any) -> None:
        if asked:
            raise KeyboardInterrupt
        asked.append(signum)

    try:
        before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not the main thread: the host program handles signals
        yield asked
        return
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _evaluation(data: Dataset | None, at: _Progress) -> schema.Evaluation:
    rise = None
    if at.before is not None and at.after is not None and at.before.correct:
        rise = paired(at.before.correct, at.after.correct)[1:]
    rows = len(data.examples) if data is not None else None
    return schema.Evaluation(rows=rows, before=score_block(at.before), after=score_block(at.after), paired=rise)


def score_block(scores: Scores | None) -> schema.Score:
    """Scores as the report has them."""
    if scores is None:
        return schema.Score(loss=None, accuracy=None)
    if not scores.correct:
        return schema.Score(loss=scores.loss, accuracy=None)
    right = sum(scores.correct)
    return schema.Score(
        loss=scores.loss,
        accuracy=scores.accuracy,
        correct=right,
        accuracy_interval=wilson(right, len(scores.correct)),
    )


def _versions() -> schema.Versions:
    return schema.Versions(
        isthmus=__version__,
        torch=torch.__version__,
        transformers=transformers.__version__,
        peft=version("peft"),
        python=platform.python_version(),
    )
