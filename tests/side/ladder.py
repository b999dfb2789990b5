"""A side network computed a second time, in plain formulas straight from the papers.

Nothing here comes from the side network but the values of its parameters, by name.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch.nn.functional import scaled_dot_product_attention, silu, softmax

from isthmus.ports import projection

Values = Mapping[str, torch.Tensor]


def outputs_of_blocks(model: torch.nn.Module, path: str, run: Callable[[], object]) -> list[torch.Tensor]:
    """What each block of a plain model returns in a call, lowest first."""
    outputs: list[torch.Tensor] = []

    def take(_: torch.nn.Module, __: object, output: torch.Tensor | tuple[torch.Tensor, ...]) -> None:
        outputs.append((output[0] if isinstance(output, tuple) else output).detach())

    handles = [block.register_forward_hook(take) for block in model.get_submodule(path).children()]
    with torch.no_grad():
        run()
    for handle in handles:
        handle.remove()
    return outputs


def ladder(
    values: Values, numbers: Sequence[int], width: int, heads: int, outputs_of: Sequence[torch.Tensor]
) -> torch.Tensor:
    """What the side network adds to the last hidden state: rows without padding, positions from 0."""
    hidden_BTS = torch.empty(0)
    for place, number in enumerate(numbers):
        at = f"side.blocks.layers.{place}" if place else "side"
        tap_BTW = outputs_of[number] @ projection(outputs_of[number].shape[-1], width)
        entered_BTS = rms(tap_BTW, values[f"{at}.entry.norm.weight"]) @ values[f"{at}.entry.down.weight"].T
        if place:
            gate = softmax(torch.cat([values[f"{at}.gate"] / 0.1, torch.zeros(1)]), 0)[0]
            hidden_BTS = gate * entered_BTS + (1 - gate) * hidden_BTS
        else:
            hidden_BTS = entered_BTS
        inside = f"{at}.block" if place else f"{at}.blocks.layers.0"
        hidden_BTS = llama_block(values, inside, hidden_BTS, heads)
    return rms(hidden_BTS, values["side.blocks.norm.weight"]) @ values["side.up.weight"].T


def rms(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """RMSNorm (Zhang and Sennrich, 2019)."""
    return weight * hidden / (hidden.square().mean(-1, keepdim=True) + 1e-6).sqrt()


def llama_block(values: Values, at: str, hidden_BTS: torch.Tensor, heads: int) -> torch.Tensor:
    """Causal attention with rotary positions, then a SwiGLU, each with a residual (Touvron et al., 2023)."""
    normed = rms(hidden_BTS, values[f"{at}.input_layernorm.weight"])
    query, key, value = (
        (normed @ values[f"{at}.self_attn.{name}_proj.weight"].T).view(*hidden_BTS.shape[:2], heads, -1).transpose(1, 2)
        for name in "qkv"
    )
    mixed = scaled_dot_product_attention(rotated(query), rotated(key), value, is_causal=True)
    hidden_BTS = hidden_BTS + mixed.transpose(1, 2).flatten(2) @ values[f"{at}.self_attn.o_proj.weight"].T
    normed = rms(hidden_BTS, values[f"{at}.post_attention_layernorm.weight"])
    gate, up, down = (values[f"{at}.mlp.{name}_proj.weight"].T for name in ("gate", "up", "down"))
    return hidden_BTS + (silu(normed @ gate) * (normed @ up)) @ down


def rotated(states_BHTE: torch.Tensor) -> torch.Tensor:
    """Rotary position embeddings (Su et al., 2021), halves against each other, as a complex product."""
    tokens, half = states_BHTE.shape[-2], states_BHTE.shape[-1] // 2
    angles_TE = torch.arange(tokens)[:, None] * 10000.0 ** (-torch.arange(half) / half)
    first, second = states_BHTE.chunk(2, -1)
    turned = torch.complex(first, second) * torch.polar(torch.ones_like(angles_TE), angles_TE)
    return torch.cat([turned.real, turned.imag], -1)
