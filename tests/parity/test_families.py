"""Every family that can be cut gives the whole model's logits at every cut, in one process; the others are refused."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    PreTrainedConfig,
    PreTrainedModel,
)

from cloud_node.span import Span
from isthmus.blocks import BlockList, call_context, watch_owner
from isthmus.cut import Cut
from isthmus.errors import CutError, ModelError
from isthmus.load import load_config, load_ends, load_span
from isthmus.rows import pack, pad, rows_of_batch
from tests.conftest import CUTS
from tests.parity.reference import padded, ragged_sequences, relative, whole_model

BLOCKS = 4
EXACT = 1e-5
IDS = {"vocab_size": 259, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
LLAMA = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": BLOCKS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
MULTI_HEAD = {**LLAMA, "num_key_value_heads": 4}
WINDOW = {"sliding_window": 4}  # shorter than the rows, so that it matters
GPT = {"n_embd": 32, "n_layer": BLOCKS, "n_head": 4, "n_positions": 64}
NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": LLAMA,
    "gpt2": {**GPT, **NO_DROPOUT},
    "qwen3": {**LLAMA, "head_dim": 8},
    "mistral": {**LLAMA, **WINDOW},
    "gemma2": {**LLAMA, **WINDOW, "head_dim": 8},
    "gemma3_text": {**LLAMA, **WINDOW, "head_dim": 8, "layer_types": ["sliding_attention", "full_attention"] * 2},
    "phi": MULTI_HEAD,
    "opt": {
        "hidden_size": 32,
        "ffn_dim": 64,
        "num_hidden_layers": BLOCKS,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
        "word_embed_proj_dim": 32,
        "dropout": 0.0,
    },
    "gpt_neox": MULTI_HEAD,
    "gptj": {**GPT, **NO_DROPOUT, "rotary_dim": 4},
    "bloom": {"hidden_size": 32, "n_layer": BLOCKS, "n_head": 4},
    "falcon": {"hidden_size": 32, "num_hidden_layers": BLOCKS, "num_attention_heads": 4, "alibi": False},
    "olmo2": LLAMA,
    "smollm3": LLAMA,
    "gemma": {**LLAMA, "head_dim": 8},
    "qwen2": LLAMA,
    "phi3": LLAMA,
    "mixtral": {**LLAMA, "num_local_experts": 4, "num_experts_per_tok": 2},
}


def save(directory: Path, config: PreTrainedConfig, make: Any = AutoModelForCausalLM) -> Path:
    """Save a random model whose weights are large enough that every block matters."""
    torch.manual_seed(0)
    model = make.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.normal_(0.0, 0.15)
    model.save_pretrained(directory)
    return directory


def configuration(family: str, **changes: Any) -> PreTrainedConfig:
    return AutoConfig.for_model(family, **{**IDS, **FAMILIES[family], **changes})


class SpanHere(nn.Module):
    """The cloud's span without a wire between."""

    def __init__(self, span: Span, found: BlockList) -> None:
        super().__init__()
        self.run, self.found = span.forward, found

    def forward(self, hidden_states: torch.Tensor, *_: Any, **__: Any) -> Any:
        context, shape = call_context(), (hidden_states.shape[0], hidden_states.shape[1])
        rows, index_N = rows_of_batch(shape, context.attention_mask_BT, context.position_ids_BT)
        return self.found.result(pad(self.run(pack(hidden_states, index_N), rows), index_N, shape))


def split(directory: Path, cut: Cut) -> PreTrainedModel:
    """The ends with the span between them, each loaded for itself."""
    model, found = load_ends(directory, cut, torch.float32)
    watch_owner(found.owner)
    found.blocks[cut.bottom] = SpanHere(Span(*load_span(directory, cut, torch.float32), cut), found)
    return model


def batches() -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    ragged = [sequence.ids for sequence in ragged_sequences((9, 6, 12), seed=1)]
    even = [sequence.ids for sequence in ragged_sequences((10, 10), seed=2)]
    return {"none": padded(even, left=False), "right": padded(ragged, left=False), "left": padded(ragged, left=True)}


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_the_ends_and_the_span_together_are_the_whole_model(family: str, tmp_path: Path) -> None:
    directory = save(tmp_path, configuration(family))
    whole = whole_model(directory)
    for cut in CUTS:
        model = split(directory, Cut.parse(cut))
        for padding, (ids_BT, mask_BT) in batches().items():
            mask = None if padding == "none" else mask_BT
            with torch.no_grad():
                ours = model(ids_BT, attention_mask=mask, use_cache=False).logits[mask_BT.bool()]
                theirs = whole(ids_BT, attention_mask=mask, use_cache=False).logits[mask_BT.bool()]
            assert relative({"": ours}, {"": theirs}) < EXACT, (cut, padding)


@pytest.mark.parametrize("family", ["mistral", "gemma2", "gemma3_text"])
def test_the_window_of_a_sliding_family_matters_in_these_rows(family: str, tmp_path: Path) -> None:
    narrow = whole_model(save(tmp_path, configuration(family)))
    wide = whole_model(tmp_path)
    wide.config.sliding_window = 64
    for module in wide.modules():
        if getattr(module, "sliding_window", None):
            module.sliding_window = 64
    ids_BT, _ = batches()["none"]
    with torch.no_grad():
        assert relative({"": wide(ids_BT).logits}, {"": narrow(ids_BT).logits}) > 100 * EXACT


def t5(directory: Path) -> Path:
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
    return save(directory, AutoConfig.for_model("t5", vocab_size=259, **sizes), AutoModelForSeq2SeqLM)


def wav2vec2(directory: Path) -> Path:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    ears = {"conv_dim": [8] * 7, "num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 2}
    return save(directory, AutoConfig.for_model("wav2vec2", vocab_size=259, **sizes, **ears), AutoModel)


def dynamic_rope(directory: Path) -> Path:
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    return save(directory, configuration("llama", rope_parameters=rope))


def longrope(directory: Path) -> Path:
    factors = [1.0] * 4
    rope = {"rope_type": "longrope", "short_factor": factors, "long_factor": factors, "rope_theta": 10000.0}
    rope |= {"original_max_position_embeddings": 32, "factor": 2.0}
    return save(directory, configuration("llama", rope_parameters=rope))


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (t5, CutError, "t5 is an encoder-decoder"),
        (wav2vec2, ModelError, "wav2vec2 is neither a causal language model nor an encoder that classifies"),
        (dynamic_rope, CutError, "llama with dynamic rotary embeddings"),
        (longrope, CutError, "llama with longrope rotary embeddings"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_model_that_cannot_be_cut_is_refused_by_name_on_both_sides(
    make: Callable[[Path], Path], error: type[Exception], message: str, tmp_path: Path
) -> None:
    directory = make(tmp_path)
    for refused in (
        lambda: load_config(directory),
        lambda: load_ends(directory, Cut(1, 1), torch.float32),
        lambda: load_span(directory, Cut(1, 1), torch.float32),
    ):
        with pytest.raises(error, match=message):
            refused()


@pytest.mark.parametrize("cut", [Cut(BLOCKS, 0), Cut(0, BLOCKS), Cut(3, 1), Cut(1, BLOCKS), Cut(99, 0)])
def test_a_cut_that_leaves_the_cloud_nothing_is_refused_and_says_what_fits(cut: Cut, tmp_path: Path) -> None:
    directory = save(tmp_path, configuration("llama"))
    for load in (load_ends, load_span):
        with pytest.raises(CutError, match=f"cut {cut} leaves the cloud none of the model's {BLOCKS} blocks"):
            load(directory, cut, torch.float32)
