"""A classifier's head: which modules it is, and their first values.

Knows models and names of weights that files lack; reads no files.
"""

from collections.abc import Collection

import torch
from transformers import PreTrainedModel


def modules_anew(model: PreTrainedModel, missing: Collection[str]) -> tuple[str, ...]:
    """The modules that are not the owner's: all beside the base model, and its pooler if the files lack that."""
    base = model.base_model
    beside = [] if base is model else [name for name, one in model.named_children() if one is not base]
    lacking = {key.rpartition(".")[0] for key in missing if ".pooler." in f".{key}"}
    holding = [name for name in beside if next(model.get_submodule(name).parameters(), None) is not None]
    return tuple(sorted({*holding, *lacking}))


@torch.no_grad()
def draw(model: PreTrainedModel, modules: Collection[str], seed: int) -> None:
    """Give modules their first values: matrices drawn as the family draws them, norms 1, biases 0."""
    generator = torch.Generator().manual_seed(seed)
    deviation = float(getattr(model.config.get_text_config(), "initializer_range", 0.02))
    for module in modules:
        for name, parameter in model.get_submodule(module).named_parameters():
            if parameter.dim() > 1:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * deviation)
            else:
                parameter.fill_(float(name.endswith("weight")))
