"""The other side of every comparison: the plain Hugging Face model, whole, in one process, with plain `peft`.

Nothing here comes from the edge, the cloud or their shared ground, but the tests' way to connect an edge.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import peft
import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from edge_client.assemble import connect
from edge_client.attaching import Placement, attach
from edge_client.config import TrainConfig
from edge_client.edge_model import EdgeModel
from edge_client.tuning import Tuning
from isthmus.ledger.record import Ledger
from isthmus.training.data import TokenSequence
from tests.harness import Server

BLOCKS, HIDDEN = 6, 32
BLOCK_LIST = {"llama": "model.layers", "gpt2": "transformer.h"}
TARGETS = {"llama": ("q_proj", "v_proj"), "gpt2": ("c_attn",)}
INSIDE = {"q_proj": "self_attn.q_proj", "v_proj": "self_attn.v_proj", "c_attn": "attn.c_attn"}
RANK, ALPHA = 4, 8.0


def end_blocks(cut: str) -> list[int]:
    """Numbers of the blocks that the edge runs."""
    bottom, top = map(int, cut.split(":"))
    return [*range(bottom), *range(BLOCKS - top, BLOCKS)]


def adapted_modules(family: str, cut: str, targets: Sequence[str] | None = None) -> list[str]:
    """Full names of the modules that get LoRA: the family's usual ones of the end blocks; the head where none is."""
    names = [] if end_blocks(cut) else ["lm_head"]
    for target in TARGETS[family] if targets is None else targets:
        if target == "lm_head":
            names.append(target)
        else:
            names += [f"{BLOCK_LIST[family]}.{number}.{INSIDE[target]}" for number in end_blocks(cut)]
    return names


def whole_model(directory: Path) -> PreTrainedModel:
    """The plain model, frozen, in evaluation mode."""
    return AutoModelForCausalLM.from_pretrained(directory).requires_grad_(False).eval()


def plain_lora(
    model: PreTrainedModel, family: str, modules: list[str], values: Mapping[str, torch.Tensor]
) -> nn.Module:
    """Plain `peft` LoRA on exactly these modules with these initial values."""
    config = peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=RANK,
        lora_alpha=ALPHA,
        target_modules=modules,
        fan_in_fan_out=family == "gpt2" and modules != ["lm_head"],
    )
    adapted = peft.get_peft_model(model, config).eval()
    set_values(adapted, values)
    return adapted


@torch.no_grad()
def set_values(model: nn.Module, values: Mapping[str, torch.Tensor]) -> None:
    """Give the trainable parameters these values; their names must be the same."""
    own = trainable(model)
    assert own.keys() == values.keys()
    for name, value in values.items():
        own[name].copy_(value)


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters that require a gradient, by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def random_values(parameters: Mapping[str, torch.Tensor], seed: int = 0) -> dict[str, torch.Tensor]:
    """Values under which every gradient matters; LoRA's own start has B = 0, hence no gradient at A."""
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(value.shape, generator=generator) * 0.2 for name, value in parameters.items()}


def ragged_sequences(lengths: Sequence[int], seed: int = 0) -> list[TokenSequence]:
    """Random tokens in rows of these lengths; the loss is on about the later half of each."""
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randint(3, 259, (length,), generator=generator).tolist() for length in lengths]
    return [TokenSequence(tuple(row), tuple(at >= len(row) // 2 for at in range(len(row)))) for row in rows]


def plain_loss(model: nn.Module, sequences: Sequence[TokenSequence]) -> torch.Tensor:
    """Hugging Face's own loss on whole rows padded on the right."""
    width = max(len(sequence.ids) for sequence in sequences)
    ids_BT = torch.zeros(len(sequences), width, dtype=torch.long)
    mask_BT, labels_BT = torch.zeros_like(ids_BT), torch.full_like(ids_BT, -100)
    for row, sequence in enumerate(sequences):
        length, ids = len(sequence.ids), torch.tensor(sequence.ids)
        ids_BT[row, :length], mask_BT[row, :length] = ids, 1
        labels_BT[row, :length] = torch.where(torch.tensor(sequence.counted), ids, -100)
    loss: torch.Tensor = model(input_ids=ids_BT, attention_mask=mask_BT, labels=labels_BT, use_cache=False).loss
    return loss


def relative(ours: Mapping[str, torch.Tensor], theirs: Mapping[str, torch.Tensor]) -> float:
    """Norm of the difference over the norm, of all tensors together."""
    assert ours.keys() == theirs.keys()
    wrong = sum(float((ours[name].double() - value.double()).square().sum()) for name, value in theirs.items())
    return (wrong / sum(float(value.double().square().sum()) for value in theirs.values())) ** 0.5


@contextmanager
def connected(server: Server, cut: str, ledger: Ledger | None = None, **settings: object) -> Iterator[EdgeModel]:
    """An edge model whose span runs in the server's process."""
    given = {"method": "split", "data": "unused", "server": server.address, "cut": cut, **settings}
    edge = connect(TrainConfig.model_validate(given), ledger or Ledger(), lambda *_: None)
    try:
        yield edge
    finally:
        edge.close()


def attached(edge: EdgeModel, kind: str = "lora", targets: list[str] | None = None) -> Tuning:
    """The edge model made trainable."""
    return attach(edge.model, edge.found, edge.cut, Placement(kind, RANK, ALPHA, targets, seed=0))  # type: ignore[arg-type]


def padded(rows: Sequence[Sequence[int]], left: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and mask [B, T] of rows padded on one side."""
    width = max(map(len, rows))
    ids_BT = torch.zeros(len(rows), width, dtype=torch.long)
    mask_BT = torch.zeros_like(ids_BT)
    for number, row in enumerate(rows):
        places = slice(width - len(row), width) if left else slice(len(row))
        ids_BT[number, places], mask_BT[number, places] = torch.tensor(row), 1
    return ids_BT, mask_BT
