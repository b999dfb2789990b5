"""What of a model an adapter may be of: names and shapes of its blocks' weights, linear modules and output layer.

Knows a model without weights; knows no adapters. It is made once, before there are threads: building a model changes
torch's default dtype for the whole process meanwhile.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import nn
from transformers import PreTrainedModel

from isthmus.architectures import class_of
from isthmus.cut import Cut
from isthmus.emulated.forms import shape_of
from isthmus.errors import BundleError, CutError, ModelError
from isthmus.linears import is_linear
from isthmus.load import load_config, outline


@dataclass(frozen=True)
class Outline:
    """Names are those of the whole model.

    Attributes:
        digest: of the whole model.
        path: of the list of blocks.
        blocks: how many there are.
        weights: shapes of the blocks' parameters.
        linears: inputs and outputs of the blocks' linear modules and of the output layer.
        head: shapes of the output layer's parameters; none: the model has no output layer.
        bare: the model itself, without weights, which nobody changes.
    """

    digest: str
    path: str
    blocks: int
    weights: Mapping[str, tuple[int, ...]]
    linears: Mapping[str, tuple[int, int]]
    head: Mapping[str, tuple[int, ...]]
    bare: PreTrainedModel

    @classmethod
    def of(cls, model: Path, digest: str) -> "Outline":
        """Find them.

        Raises:
            CutError, ModelError: the model cannot be read or cut.
        """
        whole, found = outline(model)
        head = path_of(whole, whole.get_output_embeddings())
        return cls(
            digest,
            found.path,
            len(found.blocks),
            shapes_under(whole, found.path),
            {
                name: shape_of(module)[:2]
                for name, module in whole.named_modules()
                if is_linear(module) and (name == head or name.startswith(f"{found.path}."))
            },
            shapes_under(whole, head) if head else {},
            whole,
        )

    def in_ends(self, names: Iterable[str], cut: Cut) -> list[str]:
        """Those of names of weights or modules that are of the ends' blocks.

        Raises:
            BundleError: there is no such cut of this model.
        """
        ends = self._ends(cut)
        return [name for name in names if self._block_of(name) in ends]

    def in_span(self, names: Iterable[str], cut: Cut) -> list[str]:
        """Those that are of the span's blocks; the output layer is of none.

        Raises:
            BundleError: as `in_ends`.
        """
        outside = {*self._ends(cut), None}
        return [name for name in names if self._block_of(name) not in outside]

    def _block_of(self, name: str) -> int | None:
        inside = name.startswith(f"{self.path}.")
        return int(name.removeprefix(f"{self.path}.").partition(".")[0]) if inside else None

    def _ends(self, cut: Cut) -> list[int]:
        try:
            return cut.ends(self.blocks)
        except CutError as error:
            raise BundleError(f"the adapter is for another model: {error}") from None


def path_of(model: nn.Module, module: nn.Module | None) -> str:
    """The name of a module from the model's root; empty: it is not there."""
    return next((name for name, one in model.named_modules() if one is module), "")


def shapes_under(model: nn.Module, path: str) -> dict[str, tuple[int, ...]]:
    """Shapes of a module's parameters, by their names from the model's root."""
    return {f"{path}.{name}": tuple(one.shape) for name, one in model.get_submodule(path).named_parameters()}


def refuse_other_than_language_models(directory: Path) -> None:
    """Return if an emulator can be of a model; no weights are read.

    Raises:
        ModelError: it cannot be read, or has no output layer, as encoders and models saved as classifiers have none.
    """
    built = class_of(load_config(directory))
    if not built.can_generate():
        raise ModelError(
            f"{directory} has no output layer ({built.__name__}), and emulators are of causal language models: name "
            "one such as llama or gpt2"
        )
