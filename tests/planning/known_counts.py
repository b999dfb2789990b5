"""What papers print of parameters that train, and the settings that give those figures; each count by hand too."""

from dataclasses import dataclass
from functools import cache
from typing import Any

import peft

from isthmus.planning.figures import Trained
from isthmus.planning.trainable import Prefixes, Weights, trainable
from tests.planning.known_models import outline

Told = peft.PeftConfig | Prefixes | Weights

XU, LIALIN, HAN = "Xu", "Lialin", "Han"

HEADS = {"RoBERTa-base": 768 * 769 + 2 * 769, "RoBERTa-large": 1024 * 1025 + 2 * 1025}
"""A dense layer, and one logit for each of two labels."""


@dataclass(frozen=True, eq=False)
class Cell:
    """A method on a model, and what is printed of it.

    Attributes:
        model, method: which, as the paper has it.
        setting: what gives the figure.
        told: the same, as `trainable` takes it.
        by_hand: the adapter's parameters, from the model's widths.
        printed: figures with their units: M, K or % (of the untouched model); a classifier's with its head.
        source: who prints them.
        truncated: the last digit is cut off, not rounded.
    """

    model: str
    method: str
    setting: str
    told: Told
    by_hand: int
    printed: tuple[str, ...]
    source: str
    truncated: bool = False


@cache
def counted(cell: Cell) -> Trained:
    return trainable(outline(cell.model), cell.told)


@cache
def weights(model: str) -> int:
    return trainable(outline(model), "full").total


def lora(task: str = "SEQ_2_SEQ_LM", rank: int = 8, **where: Any) -> peft.PeftConfig:
    return peft.LoraConfig(task_type=task, r=rank, **where)


def prompt(tokens: int) -> peft.PeftConfig:
    """One prompt, before the encoder's rows: peft would make one for T5's decoder too."""
    return peft.PromptTuningConfig(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=tokens, num_transformer_submodules=1)


QV, LINEAR = "q, v; rank 8", "every linear module of the blocks; rank 8"
SCALED, PLAIN = "k, v, wo's input", "k, v, wo's output"
NORMS = "every norm"
NETWORK = "30 tokens at every attention, network of 512"
SEVEN, SCALED_SEVEN = "all 7 linear modules; rank 64", "all 7 linear modules, down_proj's input"

ALL_LINEAR = lora(target_modules="all-linear")
IA3 = peft.IA3Config(task_type="SEQ_2_SEQ_LM")
IA3_PLAIN = peft.IA3Config(task_type="SEQ_2_SEQ_LM", feedforward_modules=[])
LN = peft.LNTuningConfig(task_type="SEQ_2_SEQ_LM")
WIDE = lora("CAUSAL_LM", rank=64, target_modules="all-linear")
IA3_SEVEN = peft.IA3Config(
    task_type="CAUSAL_LM",
    target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    feedforward_modules=["down_proj"],
)
LLAMA_ADAPTER = peft.AdaptionPromptConfig(task_type="CAUSAL_LM", adapter_len=10, adapter_layers=30)

ROBERTA_LARGE = 50782 * 1024 + 24 * (4 * 1025 * 1024 + 1025 * 4096 + 4097 * 1024 + 4 * 1024)
"""Rows of words (50,265), positions (514), the type and the norm (2), and the blocks."""

T5_LARGE = 32128 * 1024 + 2 * 32 * 16 + 122 * 1024 + 24 * (12 * 1024 * 1024 + 4 * 1024 * 4096)
"""Words, relative positions, norms, attentions and the rest of the blocks."""


def _glue(model: str, d: int, f: int, blocks: int, printed: tuple[str, ...]) -> list[Cell]:
    """Classifiers of hidden width d and inner width f."""
    ranks = {"init_r": 12, "total_step": 9, "tinit": 1, "tfinal": 1}
    ada = peft.AdaLoraConfig(task_type="SEQ_CLS", target_modules=["query", "value"], **ranks)
    short = peft.PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=20)
    pairs = peft.PrefixTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=20)
    scaled = peft.IA3Config(task_type="SEQ_CLS")
    rows: list[tuple[str, str, Told, int]] = [
        ("LoRA", "query, value; rank 8", lora("SEQ_CLS"), blocks * 2 * 8 * (d + d)),
        ("AdaLoRA", "query, value; first rank 12", ada, blocks * 2 * (12 * (d + d) + 12)),
        ("IA3", "key, value, inputs of both output.dense", scaled, blocks * (d + d + d + f)),
        ("BitFit", "every bias", "bitfit", blocks * (7 * d + f) + d),
        ("prompt tuning", "20 tokens", short, 20 * d),
        ("prefix tuning", "20 tokens, no network", pairs, 20 * blocks * 2 * d),
    ]
    return [Cell(model, *row, (figure,), XU) for row, figure in zip(rows, printed, strict=True)]


CELLS: list[Cell] = [
    *_glue("RoBERTa-base", 768, 3072, 12, ("0.89M", "1.03M", "0.66M", "0.69M", "0.61M", "0.96M")),
    *_glue("RoBERTa-large", 1024, 4096, 24, ("1.84M", "2.23M", "1.22M", "1.32M", "1.07M", "2.03M")),
    Cell("RoBERTa-large", "all weights", "", "full", ROBERTA_LARGE, ("355.3M",), XU, truncated=True),
    Cell("T5-base", "LoRA", QV, lora(), 36 * 2 * 8 * (768 + 768), ("0.88M",), XU),
    Cell("T5-base", "IA3", PLAIN, IA3_PLAIN, 12 * (6 * 768 + 2 * 768), ("0.07M",), XU),
    Cell("T5-base", "prompt tuning", "100 tokens, 768 wide", prompt(100), 100 * 768, ("76,800",), LIALIN),
    Cell("T5-large", "LoRA", QV, lora(), 72 * 2 * 8 * (1024 + 1024), ("2.36M",), f"{XU}, {LIALIN}"),
    Cell("T5-large", "LoRA", QV, lora(), 72 * 2 * 8 * (1024 + 1024), ("0.320%",), LIALIN),
    Cell("T5-large", "LoRA", LINEAR, ALL_LINEAR, 24 * 8 * (12 * 2048 + 4 * (1024 + 4096)), ("8.65M",), LIALIN),
    Cell("T5-large", "IA3", PLAIN, IA3_PLAIN, 24 * (6 * 1024 + 2 * 1024), ("0.19M",), XU, truncated=True),
    Cell("T5-large", "IA3", SCALED, IA3, 24 * (6 * 1024 + 2 * 4096), ("0.34M", "0.047%"), LIALIN),
    Cell("T5-large", "LN tuning", NORMS, LN, 122 * 1024, ("0.12M", "0.017%"), LIALIN),
    Cell("T5-large", "prompt tuning", "20 tokens", prompt(20), 20 * 1024, ("20K",), LIALIN),
    Cell(
        "T5-large",
        "prefix tuning",
        NETWORK,
        Prefixes(30, 512),
        3 * (30 * 1024 + 1025 * 512 + 513 * 24 * 2 * 1024),
        ("77.31M",),
        LIALIN,
    ),
    Cell("T5-large", "all weights", "", "full", T5_LARGE, ("737.67M",), LIALIN),
    Cell("T5-3B", "LoRA", LINEAR, ALL_LINEAR, 24 * 8 * (12 * 5120 + 4 * (1024 + 16384)), ("25.17M",), LIALIN),
    Cell("T5-3B", "IA3", SCALED, IA3, 24 * (6 * 4096 + 2 * 16384), ("1.38M",), LIALIN),
    Cell("T5-3B", "LN tuning", NORMS, LN, 122 * 1024, ("0.12M", "0.004%"), LIALIN),
    Cell("T5-11B", "LoRA", QV, lora(), 72 * 2 * 8 * (1024 + 16384), ("20.05M",), LIALIN),
    Cell("T5-11B", "LoRA", LINEAR, ALL_LINEAR, 24 * 8 * (12 * 17408 + 4 * (1024 + 65536)), ("91.23M",), LIALIN),
    Cell("T5-11B", "LN tuning", NORMS, LN, 122 * 1024, ("0.12M", "0.001%"), LIALIN),
    Cell(
        "T5-11B",
        "prefix tuning",
        NETWORK,
        Prefixes(30, 512),
        3 * (30 * 1024 + 1025 * 512 + 513 * 24 * 2 * 16384),
        ("1211.99M",),
        LIALIN,
    ),
    Cell("LLaMA-7B", "LoRA", SEVEN, WIDE, 64 * 32 * (4 * 2 * 4096 + 3 * (4096 + 11008)), ("159.9M",), XU),
    Cell("LLaMA-7B", "IA3", SCALED_SEVEN, IA3_SEVEN, 32 * (4 * 4096 + 3 * 11008), ("1.58M",), XU),
    Cell(
        "LLaMA-7B",
        "LLaMA-Adapter",
        "10 tokens and a gate in 30 blocks",
        LLAMA_ADAPTER,
        30 * (10 * 4096 + 1),
        ("1.2M",),
        HAN,
    ),
    Cell("LLaMA-13B", "LoRA", SEVEN, WIDE, 64 * 40 * (4 * 2 * 5120 + 3 * (5120 + 13824)), ("250.3M",), XU),
    Cell("LLaMA-13B", "IA3", SCALED_SEVEN, IA3_SEVEN, 40 * (4 * 5120 + 3 * 13824), ("2.48M",), XU),
]
"""Figures that are right, in the order of the models."""
