"""How much of the text a model's owner gets back from what crosses the wire, by the simplest attacks there are.

Knows a model, two texts and two attacks: a linear reading of hidden states, and of gradients. Neither is strong: what
they recover is a lower bound. Whoever owns the weights may search instead, which recovers nearly everything
(SipIt, arXiv 2510.15511). Run `python -m benchmarks.recovery`; it writes its tables into docs/threat-model.md.
"""

import json
from pathlib import Path

import torch
import typer
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.methods_data import DomainRows
from demo.reviews import Domain
from isthmus.command import cache_directory

PAGE = Path("docs/threat-model.md")
BLOCKS = (0, 1, 2, 4, 8, 15, 22)
"""Blocks that the edge keeps below the span, or above it."""
ROWS, ROW_TOKENS = 200, 64
RIDGE = 1e-2
KNOWN, PRIVATE = "news", "movies"


@torch.no_grad()
def states_of(model: torch.nn.Module, rows: list[torch.Tensor]) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Token ids [N], and the hidden states [N, D] before each block and after the last, of rows of ids."""
    found: list[list[torch.Tensor]] = []
    for ids in rows:
        states = model(ids[None], output_hidden_states=True).hidden_states
        found.append([state[0].float() for state in states])
    return torch.cat(rows), [torch.cat(layer) for layer in zip(*found, strict=True)]


def read_by_probe(
    ids: torch.Tensor, states_ND: torch.Tensor, private: torch.Tensor, table_VD: torch.Tensor
) -> torch.Tensor:
    """Tokens that a ridge regression from states to embeddings, learnt on known text, reads in private states."""
    centre, scale = states_ND.mean(0), states_ND.std(0) + 1e-6
    inputs, target = (states_ND - centre) / scale, table_VD[ids]
    square = inputs.T @ inputs + RIDGE * len(inputs) * torch.eye(inputs.shape[1])
    probe = torch.linalg.solve(square, inputs.T @ target)
    guessed = torch.nn.functional.normalize((private - centre) / scale @ probe, dim=1)
    return (guessed @ torch.nn.functional.normalize(table_VD, dim=1).T).argmax(1)


def read_by_gradient(model: torch.nn.Module, ids: torch.Tensor, kept: int) -> float:
    """Share of next tokens read in the gradient that leaves `kept` blocks and the head, of one row of ids [T].

    The gradient of a logit is a row of the head: the candidate is taken whose gradient, were the head directly above
    the span, points most nearly the same way.
    """
    blocks = model.model.layers
    below: list[torch.Tensor] = []

    def cut(_: object, given: tuple[torch.Tensor, ...], __: object = None) -> tuple[torch.Tensor, ...]:
        leaf = given[0].detach().requires_grad_(True)
        below.append(leaf)
        return (leaf, *given[1:])

    place = blocks[len(blocks) - kept] if kept else model.model.norm
    hook = place.register_forward_pre_hook(cut)
    try:
        model(ids[None], labels=ids[None]).loss.backward()
    finally:
        hook.remove()
    (leaf,) = below
    gradient_TD, state_TD = torch.as_tensor(leaf.grad)[0, :-1], leaf.detach()[0, :-1]
    head_VD = model.lm_head.weight
    with torch.no_grad():
        expected_TD = torch.softmax(head_VD @ model.model.norm(state_TD).T, 0).T @ head_VD
        along = (gradient_TD * expected_TD).sum(1, keepdim=True) - gradient_TD @ head_VD.T
        length = expected_TD.square().sum(1, keepdim=True) - 2 * expected_TD @ head_VD.T + head_VD.square().sum(1)
        return float(((along / length.clamp_min(1e-12).sqrt()).argmax(1) == ids[1:]).float().mean())


def rows_of(domain: Domain, directory: Path, count: int) -> list[torch.Tensor]:
    """Rows of token ids of a domain's training text."""
    tokenizer = AutoTokenizer.from_pretrained(directory)
    lines = DomainRows.of(domain, directory).train.read_text(encoding="utf-8").splitlines()
    texts = [row["prompt"] + row["completion"] for row in map(json.loads, lines)]
    return [torch.tensor(ids[:ROW_TOKENS]) for ids in tokenizer(texts)["input_ids"][:count]]


def measured(directory: Path) -> str:
    """Both tables as Markdown."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    known_ids, known = states_of(model, rows_of(KNOWN, directory, ROWS))
    private_rows = rows_of(PRIVATE, directory, ROWS // 8)
    private_ids, private = states_of(model, private_rows)
    table_VD = model.get_input_embeddings().weight.float()
    common = float((private_ids == known_ids.mode().values).float().mean())
    shuffled = known_ids[torch.randperm(len(known_ids), generator=torch.Generator().manual_seed(0))]
    said = f"{len(known_ids):,} tokens of {KNOWN} known to the attacker, {len(private_ids):,} of {PRIVATE} not"
    lines = [
        f"{said}; always naming the commonest token is right {common:.1%} of the time.",
        "",
        "| blocks kept below | tokens read in hidden states | the same attack, taught wrong answers |",
        "| --- | --- | --- |",
    ]
    for kept in BLOCKS:
        right, control = (
            float((read_by_probe(ids, known[kept], private[kept], table_VD) == private_ids).float().mean())
            for ids in (known_ids, shuffled)
        )
        lines.append(f"| {kept} | {right:.1%} | {control:.1%} |")
    lines += ["", "| blocks kept above | next tokens read in gradients |", "| --- | --- |"]
    for kept in BLOCKS:
        shares = [read_by_gradient(model, ids, kept) * (len(ids) - 1) for ids in private_rows]
        lines.append(f"| {kept} | {sum(shares) / sum(len(ids) - 1 for ids in private_rows):.1%} |")
    return "\n".join(lines)


def main() -> None:
    """Measure, and put the tables where the page has them."""
    directory = cache_directory() / "benchmarks" / "smollm2-135m"
    table = measured(directory)
    typer.echo(table)
    before, begin, rest = PAGE.read_text(encoding="utf-8").partition("<!-- table recovery -->\n")
    after = rest.partition("<!-- end -->")[2]
    PAGE.write_text(f"{before}{begin}\n{table}\n\n<!-- end -->{after}", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
