"""Training: a flat loop that does not know where the span runs, and the run it leaves behind.

Knows the order of things: evaluate, step, checkpoint, evaluate, save, report. What each is stands elsewhere.
"""

import logging
import math
import time
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from rich.console import Console

from edge_client.adapter_folder import load_adapter, save_adapter
from edge_client.assemble import assembled
from edge_client.attaching import attach
from edge_client.config import TrainConfig
from edge_client.counting import Counting
from edge_client.edge_flops import count_edge_flops
from edge_client.edge_model import EdgeModel
from edge_client.generation import WHOLE_TEXT_AGAIN, continued
from edge_client.labels import in_words, with_labels
from edge_client.offsite import plug_in_over_the_wire
from edge_client.opening import signer_of
from edge_client.outcome import Outcome, Standing, Status
from edge_client.rounds import Rounds
from edge_client.runs import RunDirectory, sha256
from edge_client.secrets_given import to_seal_with
from edge_client.span_values import SHOWN, SpanValues
from edge_client.step import Stepper
from edge_client.taking_part import TakingPart
from edge_client.watch import Watch
from isthmus.errors import InterruptedRunError, RunError
from isthmus.faults import Fault, passing
from isthmus.ledger.memory import peak_bytes, reset_peak
from isthmus.ledger.record import Ledger, Phase
from isthmus.report.fields.run import BegunFrom, Sample
from isthmus.report.schema import RunReport
from isthmus.training.batches import batch_at, split_rows
from isthmus.training.checkpoints import Checkpoint, load_checkpoint, save_checkpoint
from isthmus.training.collate import Batch
from isthmus.training.data import Dataset, read_examples
from isthmus.training.optimizer import Optimizer, rate_at
from isthmus.training.progress import meter
from isthmus.training.scoring import Scores
from isthmus.training.stopping import stopping
from isthmus.trust.credentials import Credentials

log = logging.getLogger(__name__)

SAMPLE_TOKENS = 32


def train(config: TrainConfig, run: RunDirectory, resume: bool, console: Console) -> RunReport:
    """Train as `config` says into `run`; `resume` goes on from its last checkpoint.

    Raises:
        InterruptedRunError: stopped by the user after a whole step; checkpoint and report are written.
        IsthmusError: anything else that ends the run; what was spent is reported.
    """
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    torch.use_deterministic_algorithms(config.deterministic)
    if resume:
        run.unlock(config.key_file)
    secret = to_seal_with(config.key_file) if config.seal and not resume else None
    with run.locked():
        checkpoint = load_checkpoint(run.checkpoints, run.seal) if resume else None
        if resume and checkpoint is None:
            log.warning("%s holds no checkpoint: the run begins anew", run.checkpoints)
        if not resume:
            config = with_labels(config)
        ledger = run.resume(checkpoint.step if checkpoint else 0) if resume else run.begin(config, secret)
        reset_peak()
        begun_with = checkpoint.facts["made_of"].get("emulator") if checkpoint is not None else None
        try:
            with assembled(config, ledger, console, emulator=begun_with) as edge:
                return _Trainer(config, run, edge, ledger, console).carry_out(checkpoint)
        finally:
            ledger.close_step(checkpoint.step if checkpoint else 0)  # what a fetch cost that was interrupted


class _Trainer:
    """One run, from its data to its report."""

    def __init__(
        self, config: TrainConfig, run: RunDirectory, edge: EdgeModel, ledger: Ledger, console: Console
    ) -> None:
        self._config = config
        self._run = run
        self._edge = edge
        self._ledger = ledger
        self._console = console
        self._started = datetime.now(UTC)
        self._data = self._read(config.data)
        if config.labels is not None:
            console.print(in_words(config.labels, self._data), soft_wrap=True)
        if isinstance(edge.adapters, SpanValues):
            console.print(SHOWN, soft_wrap=True)
        self._held_out = self._read(config.eval_data) if config.eval_data is not None else None
        self._lengths = tuple(len(example.train.ids) for example in self._data.examples)
        self._steps = config.count_steps(len(self._lengths))
        self._tuning = attach(edge.model, edge.found, edge.cut, replace(config.placement, steps=self._steps))
        self._optimizer = Optimizer(self._tuning.trainable, config.clip_norm)
        flops = count_edge_flops(edge, self._tuning)
        self._counting = Counting(edge, self._tuning, ledger, lambda: flops)
        self._stepper = Stepper(edge, self._tuning, ledger, flops, config.microbatches, config.seed)
        self._taking = TakingPart(config, edge, self._tuning, self._optimizer, self._steps)
        self._stepper.memory.hold("optimizer", self._optimizer.state_bytes)
        self._watch = self._watching()
        joins = config.join is not None
        self._rounds = Rounds(config, edge, self._optimizer, ledger, console) if joins else None
        self._at = Standing()
        self._resumed = False

    def carry_out(self, checkpoint: Checkpoint | None) -> RunReport:
        """Do what is left to do; whatever happens, the report says what was spent."""
        if checkpoint is not None:
            self._restore(checkpoint)
        elif self._config.from_run is not None:
            self._begin_from(RunDirectory(self._config.from_run))
        if checkpoint is None and self._rounds is not None:
            self._rounds.begin()
        if checkpoint is None and self._watch is not None:
            self._watch.open()  # a new run is told what stands in the way; one that goes on needs no server
        self._close_step("fetch")
        status: Status = "failed"
        try:
            with stopping() as self._asked:
                self._work()
            status = "complete"
        except InterruptedRunError:
            status = "interrupted"
            raise
        finally:
            self._stepper.close()
            report = self._report(status)
        return report

    def _work(self) -> None:
        if self._at.before is None and self._held_out is not None:
            self._at.before = self._score("evaluate before", self._held_out)
        self._look()
        if self._at.step == 0:
            self._save_checkpoint()
        self._average()
        with meter(self._console, "train", self._steps, self._at.step) as progress:
            while self._at.step < self._steps:
                self._step()
                progress.update(self._at.step, self._note())
                self._average()
                self._look(last=self._at.step == self._steps)
                if self._at.step % self._config.checkpoint_every == 0 or self._at.step == self._steps:
                    self._save_checkpoint()
                self._stop_if_asked()
        if self._held_out is not None:
            self._at.after = self._score("evaluate after", self._held_out)
            self._run.write_scores(self._at.before, self._at.after)
        if self._config.sample is not None:
            self._at.samples = (self._sample(self._config.sample),)
        self._save_adapter()

    def _look(self, last: bool = False) -> None:
        if self._watch is not None and self._watch.look(self._at.step, last):
            self._close_step("look")

    def _average(self) -> None:
        """Carry a round out if one is due, between two checkpoints: who is killed in it sends the same or nothing."""
        if self._rounds is None or not self._rounds.due(self._at.step):
            return
        self._save_checkpoint()
        try:
            self._rounds.carry_out()
        finally:
            self._close_step("rounds")
        passing(Fault.ROUND_BEFORE_SAVE)
        self._save_checkpoint()

    def _stop_if_asked(self) -> None:
        if self._asked:
            self._save_checkpoint()
            self._save_adapter()
            raise InterruptedRunError(
                f"stopped after step {self._at.step}; go on with `edge_client train --resume --out {self._run.path}`"
            )

    def _step(self) -> None:
        config, step, began = self._config, self._at.step, time.perf_counter()
        rows = batch_at(self._lengths, config.batch_size, config.seed, step)
        batches = [
            Batch.of([self._data.examples[row].train for row in part]) for part in split_rows(rows, config.microbatches)
        ]
        found = self._stepper.gradients(batches, step, self._taking.begin(step))
        if not math.isfinite(found.loss):
            raise RunError(f"the loss is {found.loss} at step {step + 1}; lower --lr, or use a finer --codec")
        found_at = time.perf_counter()
        rate = rate_at(step, self._steps, config.lr, config.schedule, config.warmup_steps)
        self._taking.observe(step, found.by_name, rate)
        passing(Fault.OPTIMIZER_BEFORE_STEP)
        norm = self._optimizer.step(self._taking.trains(found.by_name), rate)
        passing(Fault.OPTIMIZER_AFTER_STEP)
        self._tuning.stepped(step, found.by_name)
        self._ledger.add("train", edge_update_s=time.perf_counter() - found_at)
        self._at.step, self._at.loss = step + 1, found.loss
        self._at.real_tokens += sum(batch.real_tokens for batch in batches)
        self._at.padded_tokens += sum(batch.input_ids_BT.numel() for batch in batches)
        self._at.seconds += time.perf_counter() - began
        self._close_step("train")
        self._run.write_metrics(
            step=self._at.step,
            loss=found.loss,
            gradient_norm=norm,
            lr=rate,
            seconds=round(self._at.seconds, 3),
            tokens=self._at.real_tokens,
        )
        passing(Fault.METRICS_WRITTEN)

    def _note(self) -> str:
        spent = self._ledger.totals("train")
        note = f"loss {self._at.loss:.3f}  {self._at.real_tokens / self._at.seconds:.0f} tok/s"
        if "up_bytes" not in spent:
            return note
        return f"{note}  up {spent['up_bytes'] / 1e6:.1f} MB  down {spent.get('down_bytes', 0) / 1e6:.1f} MB"

    def _score(self, label: str, data: Dataset) -> Scores:
        began, rows = time.perf_counter(), len(data.examples)
        self._taking.rest()
        try:
            with meter(self._console, label, rows) as progress:

                def go_on(done: int, total: int) -> None:
                    progress.update(rows * done // total)
                    self._stop_if_asked()

                return self._counting.score("eval", data.examples, self._config.eval_batch_size, go_on)
        finally:
            self._close_step("eval")
            self._at.eval_seconds += time.perf_counter() - began

    def _watching(self) -> Watch | None:
        config = self._config
        if not config.watch:
            return None
        rows = (self._held_out or self._data).examples
        size, console = config.eval_batch_size, self._console

        def open_line() -> None:
            plug_in_over_the_wire(config, self._edge, self._ledger)

        return Watch(config.watch, self._edge, self._tuning, self._ledger, rows, size, console, open_line)

    def _begin_from(self, run: RunDirectory) -> None:
        """Take over the adapter of an earlier run."""
        run.unlock(self._config.key_file)
        earlier, digest = RunReport.load(run.path), run.adapter_digest()
        if digest is None:
            raise RunError(f"--from {run.path} has no adapter yet; let that run finish first")
        if earlier.model_digest != self._edge.digest:
            raise RunError(f"--from {run.path} was trained on another model than the one at hand")
        load_adapter(self._tuning, run.adapter, signer_of(run.config()), run.seal)
        self._optimizer.begin_anew(self._tuning.trainable)
        self._at.begun_from = BegunFrom(method=earlier.method, adapter=digest)

    def _sample(self, prompt: str) -> Sample:
        self._taking.rest()
        if self._tuning.side is not None:
            self._console.print(WHOLE_TEXT_AGAIN)
        with self._counting.continuing("generate"):
            text = continued(self._edge, self._tuning, prompt, SAMPLE_TOKENS)
        self._close_step("generate")
        return Sample(prompt=prompt, text=text)

    def _read(self, path: Path) -> Dataset:
        longest = self._edge.longest(self._config.max_length, self._config.placement.virtual_tokens)
        data = read_examples(path, self._edge.tokenizer, longest, self._config.labels)
        if data.truncated:
            self._console.print(f"{path}: {data.truncated} rows were longer than {longest} tokens and were cut")
        return data

    def _close_step(self, phase: Phase) -> None:
        """Write what was spent, with what memory rose to in `phase`, and let it rise anew."""
        self._ledger.peak("edge_peak_tensor_bytes", self._stepper.memory.peak_bytes, phase)
        self._ledger.peak("edge_peak_memory_bytes", peak_bytes() or 0, phase)
        self._ledger.close_step(self._at.step)
        self._stepper.memory.begin_anew()
        reset_peak()

    def _save_checkpoint(self) -> None:
        facts = {**self._at.facts(), "made_of": self._made_of(), "taking_part": self._taking.state()}
        facts["model"] = self._edge.name
        if self._watch is not None:
            facts["looks"] = self._watch.state()
        tensors = self._optimizer.state() | self._tuning.state()
        if self._rounds is not None:
            facts["rounds"], tensors = self._rounds.facts(), tensors | self._rounds.state()
        checkpoint = Checkpoint(self._at.step, tensors, facts)
        try:
            save_checkpoint(self._run.checkpoints, checkpoint, self._run.seal)
        except OSError as error:
            raise RunError(f"no checkpoint can be written ({error.strerror}); free some space and --resume") from None

    def _made_of(self) -> dict[str, str | None]:
        """What decides a run beside its settings; a resumed run must find the same."""
        config = self._config
        return {
            "model": self._edge.digest,
            "settings": config.fixed(),
            "cut": str(self._edge.cut),
            "span dtype": self._edge.span_dtype,
            "emulator": self._edge.standin.id if self._edge.standin is not None else None,
            "data file": sha256(config.data),
            "importances": sha256(config.kr_scores) if config.kr_scores is not None else None,
            "evaluation file": sha256(config.eval_data) if config.eval_data is not None else None,
        }

    def _restore(self, checkpoint: Checkpoint) -> None:
        before, now = checkpoint.facts["made_of"], self._made_of()
        for name in now:
            if before.get(name, now[name]) != now[name]:  # checkpoints of older versions do not say all
                raise RunError(f"the {name} is not what this run began with; resume with the same, or start a new run")
        self._resumed = True
        self._at = Standing.restored(checkpoint.step, checkpoint.facts)
        try:
            self._tuning.restore(checkpoint.tensors)
            self._optimizer.load(checkpoint.tensors)
            if "taking_part" in checkpoint.facts:  # older runs had no ports
                self._taking.load(checkpoint.facts["taking_part"])
            if self._rounds is not None:
                self._rounds.load(checkpoint.tensors, checkpoint.facts["rounds"])
            if self._watch is not None and "looks" in checkpoint.facts:
                self._watch.load(checkpoint.facts["looks"])
        except (KeyError, RuntimeError):
            raise RunError("the checkpoint is of another adapter; resume with the run's own settings") from None

    def _save_adapter(self) -> None:
        config, edge = self._config, self._edge
        key = Credentials.load(config.certs).signing_key() if config.certs else Ed25519PrivateKey.generate()
        try:
            save_adapter(self._tuning, self._run.adapter, edge.name, edge.digest, edge.cut, key, self._run.seal)
        except OSError as error:
            raise RunError(f"the adapter cannot be written ({error.strerror}); free some space and --resume") from None

    def _report(self, status: Status) -> RunReport:
        agreement = self._edge.compare_counts(10.0 if status == "complete" else 2.0)
        self._close_step("control")
        outcome = Outcome(
            config=self._config,
            edge=self._edge,
            tuning=self._tuning,
            ledger=self._ledger,
            standing=self._at,
            started=self._started,
            rows=len(self._lengths),
            eval_rows=len(self._held_out.examples) if self._held_out is not None else None,
            stored_bytes=self._run.stored_bytes(),
            resumed=self._resumed,
            taking=self._taking,
            watch=self._watch,
            adapter=self._run.adapter_digest(),
        )
        report = outcome.report(status, agreement)
        try:
            report.save(self._run.path)
        except OSError as error:
            raise RunError(f"run.json cannot be written ({error.strerror}); free some space and --resume") from error
        return report
