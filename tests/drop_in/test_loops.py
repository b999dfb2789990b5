"""Other people's training loops on a model whose middle is elsewhere end with what they end with on the whole model."""

import copy
import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from datasets import Dataset
from transformers import DataCollatorForLanguageModeling, PreTrainedModel, Trainer, TrainingArguments
from trl import SFTConfig, SFTTrainer

import edge_client
from isthmus.errors import UsageError
from isthmus.ledger.record import Ledger
from tests.harness import Server, byte_tokenizer
from tests.parity.reference import (
    INSIDE,
    TARGETS,
    padded,
    plain_loss,
    ragged_sequences,
    relative,
    trainable,
    whole_model,
)

EXACT = 1e-5
CUT = "1:1"
ENDS = (0, 5)
FAMILY = "llama"
TEXTS = [f"row {number} says {'yes' if number % 3 else 'no, not at all'}" for number in range(24)]
NAMES = [f"model.layers.{block}.{INSIDE[target]}" for block in ENDS for target in TARGETS[FAMILY]]
LOOP = {"per_device_train_batch_size": 4, "max_steps": 4, "learning_rate": 1e-2, "logging_steps": 1, "report_to": []}


@pytest.fixture
def remote(servers: dict[str, Server]) -> Iterator[PreTrainedModel]:
    """The tiny llama of the server, its middle there."""
    model = edge_client.connect(servers[FAMILY].address, cut=CUT)
    yield model
    model.edge.close()  # type: ignore[operator, union-attr]


@pytest.fixture
def whole(tiny_models: dict[str, Path]) -> PreTrainedModel:
    """The same, whole, here."""
    return whole_model(tiny_models[FAMILY])


def lora() -> peft.LoraConfig:
    return peft.LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, target_modules=NAMES)


def tuned(model: PreTrainedModel) -> Any:
    torch.manual_seed(0)
    return peft.get_peft_model(model, lora())


def values(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in trainable(model).items()}


def same(ours: torch.nn.Module, theirs: torch.nn.Module) -> bool:
    moved = max(float(value.abs().max()) for name, value in values(theirs).items() if "lora_B" in name)
    assert moved > 0.01, "a loop that trains nothing proves nothing"
    return relative(values(ours), values(theirs)) < EXACT


def test_it_is_a_model_of_its_own_class_with_nothing_of_the_span(
    remote: PreTrainedModel, whole: PreTrainedModel
) -> None:
    assert type(remote) is type(whole)
    held = {name for name, _ in remote.named_parameters()}
    assert held < {name for name, _ in whole.named_parameters()}
    assert not any(f"layers.{number}." in name for name in held for number in (1, 2, 3, 4))


def test_a_plain_loop_with_two_forwards_before_their_backwards(remote: PreTrainedModel, whole: PreTrainedModel) -> None:
    models = [tuned(remote), tuned(whole)]
    for model in models:
        optimizer = torch.optim.AdamW([value for value in model.parameters() if value.requires_grad], lr=1e-2)
        for step in range(3):
            losses = [plain_loss(model, ragged_sequences((9, 6, 12), seed=2 * step + half)) for half in (0, 1)]
            for loss in reversed(losses):
                loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    assert same(*models)


@pytest.mark.parametrize(
    "settings",
    [{}, {"gradient_accumulation_steps": 2}, {"gradient_checkpointing": True}],
    ids=["plain", "accumulation", "checkpointing"],
)
def test_trainer(remote: PreTrainedModel, whole: PreTrainedModel, settings: dict[str, Any], tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    models = [tuned(remote), tuned(whole)]
    losses = []
    for model in models:
        trainer = Trainer(
            model=model,
            args=TrainingArguments(output_dir=str(tmp_path), save_strategy="no", use_cpu=True, **LOOP, **settings),
            train_dataset=[dict(tokenizer(text)) for text in TEXTS],
            data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
        )
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert same(*models)
    assert losses[0] == pytest.approx(losses[1], rel=EXACT)


def test_sft_trainer(remote: PreTrainedModel, whole: PreTrainedModel, tmp_path: Path) -> None:
    rows = [{"prompt": text[:8], "completion": text[8:]} for text in TEXTS]
    models = []
    for model in (remote, whole):
        torch.manual_seed(0)
        trainer = SFTTrainer(
            model=model,
            args=SFTConfig(output_dir=str(tmp_path), save_strategy="no", use_cpu=True, bf16=False, **LOOP),
            train_dataset=Dataset.from_list(rows),
            processing_class=byte_tokenizer(),
            peft_config=lora(),
        )
        trainer.train()
        models.append(trainer.model)
    assert same(*models)


@pytest.mark.parametrize(
    "settings",
    [{"do_sample": False}, {"do_sample": True, "num_return_sequences": 2}, {"do_sample": False, "num_beams": 3}],
    ids=["greedy", "sampled", "beams"],
)
def test_generate_with_an_adapter_around_it(
    remote: PreTrainedModel, whole: PreTrainedModel, settings: dict[str, Any]
) -> None:
    ids_BT, mask_BT = padded([sequence.ids for sequence in ragged_sequences((5, 11, 8), seed=3)], left=True)
    texts = []
    for model in (tuned(remote), tuned(whole)):
        with torch.no_grad():
            for value in trainable(model).values():
                value.add_(0.3)
        torch.manual_seed(1)
        texts.append(
            model.generate(input_ids=ids_BT, attention_mask=mask_BT, max_new_tokens=8, pad_token_id=0, **settings)
        )
    assert torch.equal(*texts)
    assert len(set(texts[0][:, 11:].flatten().tolist())) > 2


def test_what_is_saved_loads_into_the_whole_model_and_gives_the_same(
    remote: PreTrainedModel, tiny_models: dict[str, Path], tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    targets = edge_client.modules(remote, "q_proj", "v_proj")
    assert targets == NAMES
    model: Any = peft.get_peft_model(remote, peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=targets))
    with torch.no_grad():
        for value in trainable(model).values():
            value.add_(0.1)
    model.save_pretrained(tmp_path)
    recwarn.clear()
    again = peft.PeftModel.from_pretrained(whole_model(tiny_models[FAMILY]), str(tmp_path)).eval()
    assert not [warning for warning in recwarn if "missing" in str(warning.message)]
    ids_BT = torch.arange(3, 23).view(2, 10)
    with torch.no_grad():
        assert torch.equal(model.eval()(ids_BT).logits, again(ids_BT).logits)


def test_the_model_itself_is_not_saved_as_if_it_were_whole(remote: PreTrainedModel, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="the middle of this model is elsewhere"):
        remote.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_copy_speaks_through_the_same_line(remote: PreTrainedModel) -> None:
    ids_BT = torch.arange(3, 23).view(2, 10)
    with torch.no_grad():
        assert torch.equal(copy.deepcopy(remote)(ids_BT).logits, remote(ids_BT).logits)


def test_a_model_that_nobody_holds_any_more_ends_its_session(servers: dict[str, Server]) -> None:
    model: Any = edge_client.connect(servers[FAMILY].address, cut=CUT)
    model(torch.arange(3, 13)[None])
    link = model.edge.link
    assert link.opened
    del model
    gc.collect()
    with pytest.raises(Exception, match="closed"):
        link.open()


def test_a_ledger_counts_what_a_loop_costs(servers: dict[str, Server]) -> None:
    ledger = Ledger()
    model: Any = edge_client.connect(servers[FAMILY].address, cut=CUT, ledger=ledger)
    plain_loss(tuned(model), ragged_sequences((9, 6), seed=0)).backward()
    model.edge.close()
    spent = ledger.totals("train")
    assert spent["up_bytes"] > 2 * 13 * 32 * 4
    assert spent["round_trips"] == 2


@pytest.mark.parametrize(
    ("names", "why"), [(("nothing",), "no module on the edge is called nothing"), ((), "not made by")]
)
def test_modules_are_found_by_their_last_names_or_refused(
    remote: PreTrainedModel, whole: PreTrainedModel, names: tuple[str, ...], why: str
) -> None:
    with pytest.raises(UsageError, match=why):
        edge_client.modules(remote if names else whole, *names)
