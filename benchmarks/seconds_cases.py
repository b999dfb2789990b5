"""Runs whose seconds are planned and then measured: methods, links, threads and batches, none as it was calibrated.

Knows cases, and a random model that is large enough for computing to matter; runs nothing.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from tests.harness import byte_tokenizer

AS_IT_IS = "as it is"
CUTS = ("2:2", "0:0", "1:2")
TIMED = 8
"""Steps of a case that are looked at."""

SPARED = 2
"""First steps that are not: in the second, ports that rest do so for the first time."""

STEPS = SPARED + TIMED


@dataclass(frozen=True)
class Case:
    """One run: what `edge_client train` is told, and what a plan must know of it.

    Attributes:
        method: as the flag has it; flags: further ones.
        cut: which blocks are here.
        link: `as it is`, or what `--link` takes.
        rows, tokens: of a batch; the last tokens of each row carry loss.
        microbatches: in flight at once.
        threads: of the edge; the server has one.
        epochs: passes over the rows; in the second, outputs may be known.
        tap_every: a tap at every so many blocks of the span, for a side network; 0: none.
    """

    name: str
    method: str
    flags: tuple[str, ...] = ()
    cut: str = "2:2"
    link: str = AS_IT_IS
    rows: int = 6
    tokens: int = 96
    microbatches: int = 1
    threads: int = 1
    epochs: int = 1
    tap_every: int = 0

    @property
    def forward_only(self) -> bool:
        """Whether no gradient reaches the span."""
        return self.method == "side" or "top" in self.flags


TOP = ("--train", "top")
KEPT = ("--targets", "q_proj,v_proj", "--kr-active", "0.25", "--kr-warmup", "1", "--kr-period", "1000")
KEPT_BLOCKS = 3
"""Of the span, in an emulator."""

CASES = (
    Case("local", "local", rows=5, tokens=112),
    Case("split", "split"),
    Case("split-wide", "split", rows=10, tokens=192),
    Case("split-two-threads", "split", threads=2, tokens=128),
    Case("split-4g", "split", link="4g", rows=3),
    Case("split-int8-wifi", "split", ("--codec", "int8"), link="wifi", tokens=160),
    Case("split-parts", "split", link="50:100:100", rows=12, tokens=160, microbatches=4),
    Case("top", "split", TOP, cut="1:2", link="5g", epochs=2),
    Case("side", "side", ("--tap-every", "2"), cut="0:0", link="wifi", epochs=2, tap_every=2),
    Case("dlora", "dlora", KEPT, cut="0:0", rows=4),
    Case("dlora-fibre", "dlora", KEPT, cut="0:0", link="fibre", tokens=128),
    Case("offsite", "offsite", rows=7, tokens=80),
    Case("dlora-parts", "dlora", KEPT, cut="0:0", link="50:100:100", rows=12, microbatches=4),
)


def save_model(directory: Path) -> Path:
    """A random Llama of 10 blocks and 19 million parameters, with a token for each byte and many that never come."""
    config = LlamaConfig(
        vocab_size=8192,
        hidden_size=384,
        intermediate_size=1024,
        num_hidden_layers=10,
        num_attention_heads=6,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(directory)
    byte_tokenizer().save_pretrained(directory)
    return directory


def write_data(path: Path, case: Case) -> Path:
    """Rows that are all cut to the case's tokens, and all differ; enough for one epoch of the steps."""
    rows = [{"prompt": f"row {number} " * case.tokens, "completion": " ends"} for number in range(case.rows * STEPS)]
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return path
