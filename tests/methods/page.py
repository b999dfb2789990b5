"""docs/methods.md, made from what attaching each method to the tiny models gives: `python -m tests.methods.page`.

What it says to work is what the tests beside it prove; nothing is trained here.
"""

import tempfile
from pathlib import Path

import torch

from edge_client.assemble import load_local
from edge_client.attaching import attach
from edge_client.config import TrainConfig
from edge_client.peft_methods import METHODS, REFUSED, Method
from edge_client.tuning import Tuning
from isthmus.errors import UsageError
from tests.harness import save_tiny_model
from tests.methods.cases import CASES, CUT, FAMILIES, Case

PAGE = Path(__file__).parents[2] / "docs" / "methods.md"
REMAKE = "python -m tests.methods.page"

PLACES = {
    "linears": "linear modules",
    "norms": "norms",
    "embedding": "rows of the embedding",
    "prompt": "virtual tokens before each row",
}
OWN = {
    "bitfit": "biases of the ends' blocks",
    "full": "all weights of the ends' blocks",
    "head": "the output layer, untied from the embedding",
}

INTRODUCTION = """# Methods of `--peft`

Any method here trains on the ends, whatever the span is: `--method split`, `offsite` or `local`; `--method dlora`
trains LoRA in the span, and `--method side` a network of its own (`--peft side`). Where an adapter goes is written
down by exact module names, so that `peft.PeftModel.from_pretrained(whole_model, "RUN/adapter")` adapts those modules
and no others, and has nothing to warn of.

- `--targets` names modules by the last parts of their names; else they are those that peft lists for the family.
  Norms are all those that the edge holds.
- `--rank` and `--alpha` are refused where a method has none. Unless they are told they are 8 and 16 for LoRA and its
  variants, and peft's own for the others. AdaLoRA ends at `--rank` and begins at half as much again.
- `--peft-option NAME=VALUE` sets any other field of the method's configuration in peft, the value being YAML, such as
  `--peft-option num_virtual_tokens=10` or `--peft-option token_indices=[5,6]`. One that there is not is refused, with
  the list of those that there are.
- `pissa` and `olora` begin as a part of the weights they adapt. Here those weights stay as they are: what is saved is
  plain LoRA of twice the rank, the same for every reader.
- `adalora` shrinks its ranks by the run's steps: from about a seventh of them, to half of them. Its file keeps the
  matrices whole, with zeros for the ranks that it took away.
- `p-tuning` saves its prompt, not the encoder that makes it: such a run can be used, but no other begins `--from` it.
- A prompt lengthens each row by its tokens, on the line too. `--train top` refuses what is below the span: prompts
  and the embedding.
- `cloud_node plug-in` takes lora (with its initialisations), bitfit and full, and scores them. `cloud_node merge` takes
  every method here but prompt, p-tuning and side, which leave no weights to merge; of classifiers too, head included.
- A classifier's head (rows with labels) trains along with any method but prompts, trainable tokens and side; the tests
  train one with lora, dora, ln-tuning, bitfit, full and head.

A row says what the tests in tests/methods prove over a real server, at cut {cut}, for tiny random models of two
families: a split step's gradients are those of one process, a run makes the adapter of a run in one process, a
stopped run resumes to the same bits, and plain peft, where it has the method, gives the tuned model without a
difference. The numbers are trained parameters there, with rank 4, blocks of 8, 5 virtual tokens or 3 trained ones.
"no" is refused by name: peft's layers of that method do not take GPT-2's modules, or the family has nothing of that
kind.

| `--peft` | trains | `--rank` | `--alpha` | {families} | saved as |
|---|---|---|---|{rule}|---|
"""

REFUSALS = """
Other methods of peft are refused by name:

| `--peft` | why |
|---|---|
"""

END = f"\nThis page is made by `{REMAKE}`; a test fails when it is not current.\n"


def page(models: dict[str, Path]) -> str:
    """The page, with counts of these models by family."""
    head = INTRODUCTION.format(
        cut=CUT,
        families=" | ".join(families := [f"tiny {family}" for family in FAMILIES]),
        rule="|".join("---" for _ in families),
    )
    rows = [_row(case, METHODS[case.name], models) for case in CASES]
    refused = [f"| `{name}` | {why} |" for name, why in sorted(REFUSED.items())]
    return head + "\n".join(rows) + "\n" + REFUSALS + "\n".join(refused) + "\n" + END


def _row(case: Case, method: Method, models: dict[str, Path]) -> str:
    tunings = {family: _attached(case, models[family]) for family in FAMILIES}
    counts = [f"{tuning.count:,}" if tuning is not None else "no" for tuning in tunings.values()]
    saved = next(tuning.saved_as for tuning in tunings.values() if tuning is not None)
    kept = "peft" if saved == "peft" else "a signed bundle"
    place = OWN[case.name] if method.place == "weights" else PLACES[method.place]
    strengths = ["yes" if one is not None else "-" for one in (method.rank, method.alpha)]
    return f"| `{case.name}` | {' | '.join([place, *strengths, *counts, kept])} |"


def _attached(case: Case, directory: Path) -> Tuning | None:
    given = {"method": "local", "model": str(directory), "cut": CUT, "data": "unused", "peft": case.name}
    config = TrainConfig.model_validate({**given, **case.settings})
    edge = load_local(config)
    try:
        return attach(edge.model, edge.found, edge.cut, config.placement)
    except UsageError:
        return None


def main() -> None:
    """Write the page."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        models = {family: Path(scratch) / family for family in FAMILIES}
        for family, place in models.items():
            save_tiny_model(place, family)
        PAGE.write_text(page(models))


if __name__ == "__main__":
    main()
