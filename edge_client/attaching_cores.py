"""Making cores trainable in all blocks: at modules that are here and at those of the cloud.

Knows the model's modules by name; knows no data, no files and no wire.
"""

from transformers import PreTrainedModel

from edge_client.core import core_at
from edge_client.port_adapters import CORE_OF, is_elsewhere
from edge_client.targets import target_modules
from edge_client.tuning import CorePort, Tuning
from isthmus.blocks import BlockList
from isthmus.core_shape import CoreShape
from isthmus.cut import Cut
from isthmus.errors import UsageError
from isthmus.linears import Site


def attach_cores(
    model: PreTrainedModel, found: BlockList, cut: Cut, shape: CoreShape, targets: list[str] | None
) -> Tuning:
    """Put a core at each target of every block; those of the span are ports.

    Raises:
        UsageError: a target is none, is outside the blocks, or has no room for the rank.
    """
    tuning = Tuning(model, model, {}, "core", shape.rank, {}, cores=shape)
    span = cut.span(len(found.blocks))
    for site, name in _sites(model, found, targets):
        module = model.get_submodule(name)
        elsewhere = is_elsewhere(module)
        core = core_at(module, site, shape, here=not elsewhere)
        parameter = f"{name}.{CORE_OF}.weight"
        tuning.trainable[parameter] = core.weight
        tuning.elsewhere = tuning.elsewhere or elsewhere
        if site[0] in span:
            tuning.ports[f"{site[0]}.{site[1]}"] = CorePort(parameter, shape.scale)
    tuning.alive = frozenset(tuning.ports)
    return tuning


def _sites(model: PreTrainedModel, found: BlockList, targets: list[str] | None) -> list[tuple[Site, str]]:
    """Places of the targets and their names from the model's root, in the order of the blocks."""
    sites = []
    for name in target_modules(model, found, list(range(len(found.blocks))), targets):
        inside = name.removeprefix(f"{found.path}.")
        if inside == name:
            raise UsageError(
                f"--exchange core is for modules of blocks, which {name} is not; leave it out of --targets"
            )
        number, _, module = inside.partition(".")
        sites.append(((int(number), module), name))
    return sorted(sites)
