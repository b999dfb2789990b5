"""Whom a session with ports shares its server with, what its adapter generates, and what it leaves behind."""

import io
import json
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from edge_client.adapter_folder import load_adapter
from edge_client.config import TrainConfig
from edge_client.finished import Using, evaluate
from edge_client.runs import RunDirectory
from edge_client.step import Gradients
from edge_client.train import train
from isthmus.ledger.record import Ledger
from isthmus.report.schema import RunReport
from isthmus.wire.gen import backbone_pb2 as pb
from tests.conftest import FAMILIES as SERVED
from tests.dlora.reference import (
    ALL,
    ATTENTION,
    FAMILIES,
    SIZES,
    activate,
    every_block,
    full_names,
    gradients,
    name_of,
    overhear,
    park,
    ports,
    same_bits,
    span_numbers,
    with_ports,
)
from tests.harness import Server
from tests.parity.reference import (
    ALPHA,
    HIDDEN,
    RANK,
    attached,
    connected,
    padded,
    ragged_sequences,
    random_values,
    whole_model,
)
from tests.parity.test_adapters import EXACT, plain_loaded
from tests.parity.test_generation import NEW_TOKENS, generated, prompts
from tests.parity.test_training import LENGTHS, split_gradients

Step = Callable[[], Gradients]


@contextmanager
def session(server: Server, targets: list[str] | None) -> Iterator[Step]:
    """What does one step in a session of its own; with ports where there are targets."""
    sequences = ragged_sequences(LENGTHS)
    if targets is None:
        with connected(server, "1:1") as edge:
            tuning = attached(edge)
            tuning.load(random_values(tuning.trainable))
            yield lambda: split_gradients(edge, tuning, sequences, 2)
    else:
        with with_ports(server, "1:1", targets) as (edge, tuning):
            tuning.load(random_values(tuning.trainable))
            yield lambda: gradients(edge, tuning, sequences, 2)


@pytest.mark.parametrize("backward", [False, True])
def test_while_a_session_waits_at_a_port_another_without_ports_steps_and_both_are_as_if_alone(
    servers: dict[str, Server], monkeypatch: pytest.MonkeyPatch, backward: bool
) -> None:
    asked, go_on = threading.Event(), threading.Event()

    def hold(ask: pb.PortCall) -> None:
        if ask.backward == backward and ask.block == 3:
            asked.set()
            assert go_on.wait(60)

    server = servers["llama"]
    with session(server, None) as plain, session(server, ATTENTION) as ported, ThreadPoolExecutor(1) as pool:
        alone, alone_with_ports = plain(), ported()
        overhear(monkeypatch, hold)
        waiting = pool.submit(ported)
        try:
            assert asked.wait(60)
            beside = plain()
            assert not waiting.done()
        finally:
            go_on.set()
        assert same_bits(waiting.result(60), alone_with_ports)
    assert same_bits(beside, alone)


def test_sessions_with_other_ports_and_none_that_step_at_once_are_each_as_if_alone(servers: dict[str, Server]) -> None:
    kinds: list[list[str] | None] = [None, ATTENTION, ["gate_proj", "up_proj"], ALL] * 2
    with ExitStack() as stack, ThreadPoolExecutor(len(kinds)) as pool:
        steps = [stack.enter_context(session(servers["llama"], targets)) for targets in kinds]
        alone = [step() for step in steps]
        together = [pool.submit(step) for step in steps]
        assert all(same_bits(step.result(60), before) for step, before in zip(together, alone, strict=True))
    assert len({one.loss for one in alone}) == 4


Trained = Callable[..., tuple[Path, RunReport]]


@pytest.fixture(scope="module")
def trained(servers: dict[str, Server], rows: Path, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """The directory and report of a run, made when first asked for."""
    made: dict[tuple[object, ...], tuple[Path, RunReport]] = {}

    def run(family: str, cut: str, **changes: Any) -> tuple[Path, RunReport]:
        key = (family, cut, *changes.items())
        if key not in made:
            place = RunDirectory(tmp_path_factory.mktemp("dlora") / "run")
            usual = {"method": "dlora", "data": rows, "server": servers[family].address, "cut": cut, "targets": ALL}
            settings = {"steps": 3, "batch_size": 4, "lr": 2e-2, "rank": RANK, "alpha": ALPHA, **changes}
            config = TrainConfig.model_validate({**usual, **settings})
            made[key] = place.path, train(config, place, resume=False, console=Console(file=io.StringIO()))
        return made[key]

    return run


def saved_modules(run: Path) -> set[str]:
    """Full names of the modules that an adapter's file has values for."""
    names = load_file(run / "adapter" / "adapter_model.safetensors")
    return {name.removeprefix("base_model.model.").partition(".lora_")[0] for name in names}


def configured(run: Path) -> set[str]:
    """Full names of the modules that an adapter's configuration names."""
    return set(json.loads((run / "adapter" / "adapter_config.json").read_text())["target_modules"])


def real_logits(model: Any, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
    logits: torch.Tensor = model(**inputs).logits[inputs["attention_mask"].bool()]
    return logits


KILLING = {"kr_active": 0.1, "kr_warmup": 1, "kr_period": 2, "steps": 4}
RUNS = [
    pytest.param((family, cut, killing), id=f"{family}-{cut}-{'few' if killing else 'all'}-alive")
    for family, cut, killing in (
        ("llama", "1:1", {}),
        ("gpt2", "0:0", {}),
        ("llama", "0:0", KILLING),
        ("gpt2", "1:1", KILLING),
    )
]


Adapted = tuple[Any, Path, Path]


@pytest.fixture(params=RUNS)
def adapted(
    request: pytest.FixtureRequest, servers: dict[str, Server], tiny_models: dict[str, Path], trained: Trained
) -> Iterator[Adapted]:
    """A model in a session with a run's adapter, where that lies, and the model that it was trained on.

    Ports that the adapter has no values for take no part.
    """
    family, cut, killing = request.param
    adapter = trained(family, cut, **killing)[0] / "adapter"
    with with_ports(servers[family], cut, ALL) as (edge, tuning):
        load_adapter(tuning, adapter, None)
        ports(edge).active = frozenset(site for site in ports(edge).sites if name_of(site) in tuning.alive)
        yield tuning.model, adapter, tiny_models[family]


def test_plain_peft_loads_the_adapter_without_a_warning_and_gives_the_same_logits(adapted: Adapted) -> None:
    model, adapter, untouched = adapted
    inputs = dict(zip(("input_ids", "attention_mask"), padded([range(3, 12), range(40, 45)], left=False), strict=True))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
        whole = plain_loaded(untouched, adapter)
    with torch.no_grad():
        ours, theirs = real_logits(model, inputs), real_logits(whole, inputs)
        before = real_logits(whole_model(untouched), inputs)
    assert (theirs - before).abs().max() > 100 * EXACT, "an adapter that does nothing proves nothing"
    assert (ours - theirs).abs().max() < EXACT


@pytest.mark.parametrize("family", SERVED)
def test_the_exported_adapter_names_every_linear_module_or_the_alive_ones_alone(trained: Trained, family: str) -> None:
    blocks = FAMILIES[family].blocks
    run, _ = trained(family, "1:1")
    assert configured(run) == saved_modules(run) == set(every_block(family))
    run, report = trained(family, "1:1", **KILLING)
    assert report.ports is not None
    assert report.ports.kill_revive is not None
    last = report.ports.kill_revive.decisions[-1].alive
    alive = {f"{FAMILIES[family].path}.{report.ports.ports[at].name}" for at in last}
    in_span = full_names(family, span_numbers(family, "1:1"))
    assert alive < set(in_span)
    assert len(alive) == len(in_span) // 10
    assert configured(run) == saved_modules(run) == alive | set(full_names(family, [0, blocks - 1]))


def test_a_trained_adapter_generates_token_by_token_what_plain_peft_generates(adapted: Adapted) -> None:
    model, adapter, untouched = adapted
    whole, plain = plain_loaded(untouched, adapter), whole_model(untouched)
    differ, told = 0, set[int]()
    for inputs in (prompts(7), prompts(1), prompts(5, 11, 8), prompts(6, 6)):
        theirs = generated(whole, inputs)
        assert torch.equal(generated(model, inputs), theirs)
        told.update(theirs[:, -NEW_TOKENS:].flatten().tolist())
        differ += not torch.equal(generated(plain, inputs), theirs)
    assert len(told) > 5, "answers that are constant compare nothing"
    assert differ, "an adapter that changes no token proves nothing"


def test_a_generated_token_crosses_once_at_the_boundary_and_once_at_each_port(servers: dict[str, Server]) -> None:
    prompt, ledger = 7, Ledger()
    with with_ports(servers["llama"], "1:1", ALL, ledger) as (edge, tuning), edge.phase("generate"):
        generated(tuning.model, prompts(prompt))
    tokens, blocks = prompt + NEW_TOKENS - 1, 4  # the last token is only written
    inputs = sum(SIZES[group[0]][0] for group in FAMILIES["llama"].groups)
    outputs = sum(size for _, size in SIZES.values())
    assert ledger.total("generate", "up_payload_bytes") == 4 * tokens * (HIDDEN + blocks * outputs)
    assert ledger.total("generate", "down_payload_bytes") == 4 * tokens * (HIDDEN + blocks * inputs)
    assert ledger.total("generate", "round_trips") == NEW_TOKENS * (1 + 4 * blocks)


def test_parked_adapters_take_part_in_generating_with_a_cache(
    servers: dict[str, Server], tiny_models: dict[str, Path], trained: Trained
) -> None:
    run, _ = trained("llama", "0:0")
    whole = plain_loaded(tiny_models["llama"], run / "adapter")
    with with_ports(servers["llama"], "0:0", ALL) as (edge, tuning):
        load_adapter(tuning, run / "adapter", None)
        alive = ports(edge).sites[::3]
        activate(edge, tuning, alive)
        park(edge, tuning, [site for site in ports(edge).sites if site not in alive])
        for inputs in (prompts(7), prompts(5, 11, 8)):
            assert torch.equal(generated(tuning.model, inputs), generated(whole, inputs))


@pytest.mark.parametrize("killing", [{}, KILLING], ids=["all alive", "few alive"])
def test_evaluating_a_run_over_the_wire_and_with_the_whole_model_here_is_the_same_and_what_training_saw(
    tiny_models: dict[str, Path], rows: Path, trained: Trained, killing: dict[str, Any]
) -> None:
    run, report = trained("llama", "1:1", eval_data=rows, **killing)
    console, model = Console(file=io.StringIO()), tiny_models["llama"]
    crossed = evaluate(run, rows, Using(), console)
    far, near = crossed.score, evaluate(run, rows, Using("local", model=str(model)), console).score
    assert crossed.up_bytes > 0
    assert report.eval is not None
    assert far.loss == pytest.approx(near.loss, rel=1e-5)
    assert far.loss == pytest.approx(report.eval.after.loss, rel=1e-5)
    assert far.loss < report.eval.before.loss - 0.01
