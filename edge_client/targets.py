"""Which modules get an adapter, by exact names: so plain peft finds the same ones in the whole model, and no others.

Knows a model's modules and what peft calls usual for a family; attaches nothing.
"""

from collections.abc import Callable, Mapping

from peft.utils.constants import (
    TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING,
    TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING,
    TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING,
)
from torch import nn
from transformers import PreTrainedModel

from edge_client.peft_methods import Method
from isthmus.blocks import BlockList
from isthmus.cut import Cut
from isthmus.errors import UsageError
from isthmus.linears import Site, linears_in

HEAD = "lm_head"
"""Targets may name the output layer so, whatever the family calls it."""

ALL_LINEAR = "all-linear"
"""Targets may name every linear module of the blocks that train so, as in peft."""

USUAL: Mapping[str, Mapping[str, list[str]]] = {
    "lora": TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING,
    "ia3": TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING,
}


def modules_for(
    method: Method,
    model: PreTrainedModel,
    found: BlockList,
    ends: list[int],
    targets: list[str] | None,
    everywhere: bool,
) -> list[str]:
    """Names, from the model's root, of the modules that a method goes to.

    Args:
        method: of peft, but for prompts.
        model: the ends, or the whole model.
        found: its blocks.
        ends: numbers of the blocks that train.
        targets: last parts of the modules' names; None: the family's usual ones.
        everywhere: norms outside the blocks train too.

    Raises:
        UsageError: there are none, or a target is none.
    """
    if method.place == "embedding":
        return [_name_of(model, model.get_input_embeddings())]
    if method.place == "norms":
        return _norms(model, found, ends, targets, everywhere)
    return target_modules(model, found, ends, targets, method.usual)


def feedforward_of(model: PreTrainedModel, names: list[str]) -> list[str]:
    """Those of the modules that IA3 rescales the input of, not the output."""
    last = TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING.get(model.config.model_type, [])
    return [name for name in names if any(_ends_with(name, target) for target in last)]


def span_targets(model: PreTrainedModel, found: BlockList, cut: Cut, targets: list[str] | None) -> list[Site]:
    """The linear modules of the span that get an adapter, in the order of the blocks and of their names.

    Raises:
        UsageError: there are none.
    """
    numbers = list(cut.span(len(found.blocks)))
    sites = []
    for name in target_modules(model, found, numbers, targets):
        if name.startswith(f"{found.path}."):
            number, _, module = name.removeprefix(f"{found.path}.").partition(".")
            sites.append((int(number), module))
    if not sites:
        raise UsageError("--method dlora trains modules of blocks on the cloud; name one in --targets, such as q_proj")
    return sorted(sites)


def target_modules(
    model: PreTrainedModel, found: BlockList, ends: list[int], targets: list[str] | None, usual: str = "lora"
) -> list[str]:
    """The linear modules that `targets` name in the blocks `ends`, and the output layer if they name that.

    Raises:
        UsageError: a target is none, or none is usual for this family.
    """
    output = model.get_output_embeddings()
    if targets is None:
        known = USUAL[usual].get(model.config.model_type)
        if known is None and ends:
            raise UsageError(f"no usual targets are known for {model.config.model_type}; name them with --targets")
        if output is None and not ends:
            raise UsageError("the edge holds no blocks there with this cut; train the classifier's head, --peft head")
        targets = list(known or []) if ends else [HEAD]
    names, linears = [], _in_blocks(found, ends, linears_in)
    for target in targets:
        linear = [name for name in linears if target == ALL_LINEAR or _ends_with(name, target)]
        if target == HEAD and output is not None:
            linear.append(_name_of(model, output))
        if not linear:
            known_names = _last_parts(linears) | {HEAD, ALL_LINEAR}
            raise UsageError(
                f"target {target!r} is no linear module of the blocks that train; known are "
                f"{', '.join(sorted(known_names))}"
            )
        names.extend(linear)
    return sorted(set(names))


def norms_in(block: nn.Module) -> dict[str, nn.Module]:
    """The modules of a block whose own weight is one vector, by their names in it."""
    return {name: module for name, module in block.named_modules() if _is_norm(module)}


def _is_norm(module: nn.Module) -> bool:
    own = dict(module.named_parameters(recurse=False))
    return "weight" in own and own["weight"].dim() == 1


def _norms(
    model: PreTrainedModel, found: BlockList, ends: list[int], targets: list[str] | None, everywhere: bool
) -> list[str]:
    names = _in_blocks(found, ends, norms_in)
    if everywhere:
        names += [name for name in norms_in(model) if not name.startswith(f"{found.path}.")]
    known = ", ".join(sorted(_last_parts(names))) or "none"
    for target in targets or []:
        if not any(_ends_with(name, target) for name in names):
            raise UsageError(f"target {target!r} is no norm of the ends; known are {known}")
    chosen = [name for name in names if targets is None or any(_ends_with(name, target) for target in targets)]
    if not chosen:
        raise UsageError("the edge holds no norms that could train with this cut; use --peft lora")
    return sorted(chosen)


def _in_blocks(
    found: BlockList, ends: list[int], modules_in: Callable[[nn.Module], Mapping[str, nn.Module]]
) -> list[str]:
    return [f"{found.path}.{number}.{name}" for number in ends for name in modules_in(found.blocks[number])]


def _ends_with(name: str, target: str) -> bool:
    return f".{name}".endswith(f".{target}")


def _last_parts(names: list[str]) -> set[str]:
    return {name.rpartition(".")[2] for name in names}


def _name_of(model: PreTrainedModel, wanted: nn.Module) -> str:
    name: str = next(name for name, module in model.named_modules() if module is wanted)
    return name
