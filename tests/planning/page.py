"""docs/known-values.md, made from what `trainable` counts and what papers print: `python -m tests.planning.page`."""

from pathlib import Path

from tests.planning.known_counts import CELLS, HEADS, Cell, counted
from tests.planning.known_mistakes import MISTAKES, Mistake
from tests.planning.usual_counts import MODELS, USUAL, Usual, usually

PAGE = Path(__file__).parents[2] / "docs" / "known-values.md"
REMAKE = "python -m tests.planning.page"

INTRODUCTION = """# Known values: how many parameters train

How many parameters a method trains follows from a model's configuration. `isthmus.planning.trainable` counts them on
the meta device, where a model has its structure and no weights: the largest here take seconds. These are its counts,
beside what papers print.

- A test compares each count with the printed digits, and exactly with the same count by hand, from the model's widths.
- Of their settings the papers state the prompts' 20 tokens and little else. Those here are the ones that give the
  printed figures. IA3 on T5 is printed with wo's output scaled and with its input, which is what peft takes.
- Heads are apart. What is printed of RoBERTa has the head of two labels in it ({base:,} parameters in RoBERTa-base),
  which can be nearly all there is: of the 0.61M that prompt tuning trains there, {prompt:,} are the prompt.
- A prefix of T5 goes to each of its 3 kinds of attention, and the network that makes it is counted, as in AdapterHub's
  `adapters`. peft makes one prefix for the whole model.
- BitFit has all biases outside of the head. `--peft bitfit` trains those of the edge's blocks alone.
- Percentages are of the untouched model's parameters. peft prints those of the model with its adapter: 0.319 % where
  this page has 0.320 %.

## Printed and right

| model | method | setting | printed | adapter | head | by |
|---|---|---|---|---|---|---|
"""

WRONG = """
## Printed and wrong

Settings are those of the same papers' rows that are right. A prompt's length is the prefix's; T5-XL's is printed.

| model | method | setting | printed | right | by | why |
|---|---|---|---|---|---|---|
"""

UNPRINTED = """
## LLaMA with usual settings

Modules are those that peft takes for the family. LLaMA and T5 have no biases, so BitFit trains nothing.

| method | setting | {models} |
|---|---|{rule}|
"""

END = f"""
## Sources

- Xu: Xu and others, *Parameter-Efficient Fine-Tuning Methods for Pretrained Language Models: A Critical Review and
  Assessment*, 2023, arXiv 2312.12148.
- Lialin: Lialin and others, *Scaling Down to Scale Up: A Guide to Parameter-Efficient Fine-Tuning*, arXiv 2303.15647.
- Han: Han and others, *Parameter-Efficient Fine-Tuning for Large Models: A Comprehensive Survey*, 2024, arXiv
  2403.14608.

Not here: adapters in series and in parallel, Compacter, MAM and UniPELT, which peft does not have; KronA and ProPELT,
of which too little is told.

This page is made by `{REMAKE}`; a test fails when it is not current.
"""


def page() -> str:
    """The page, with today's counts."""
    prompt = next(cell for cell in CELLS if (cell.model, cell.method) == ("RoBERTa-base", "prompt tuning"))
    head = INTRODUCTION.format(base=HEADS["RoBERTa-base"], prompt=counted(prompt).adapter)
    unprinted = UNPRINTED.format(models=" | ".join(MODELS), rule="|".join("---:" for _ in MODELS))
    parts = [head, *map(_right, CELLS), WRONG, *map(_wrong, MISTAKES), unprinted, *map(_usual, USUAL), END]
    return "".join(parts)


def _right(cell: Cell) -> str:
    trained = counted(cell)
    head = f"{trained.head:,}" if trained.head else "-"
    return _row(cell.model, cell.method, cell.setting, _printed(cell), f"{trained.adapter:,}", head, cell.source)


def _wrong(mistake: Mistake) -> str:
    cell = mistake.cell
    right = f"{counted(cell).total:,}"
    return _row(cell.model, cell.method, cell.setting, _printed(cell), right, cell.source, mistake.why)


def _usual(usual: Usual) -> str:
    return _row(usual.method, usual.setting, *(f"{usually(model, usual):,}" for model in MODELS))


def _printed(cell: Cell) -> str:
    parts = ", ".join(one.replace("%", " %") for one in cell.printed)
    return f"{parts} (cut off)" if cell.truncated else parts


def _row(*columns: str) -> str:
    return f"| {' | '.join(columns)} |\n"


def main() -> None:
    """Write the page."""
    PAGE.write_text(page())


if __name__ == "__main__":
    main()
