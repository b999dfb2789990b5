"""A pass that waits at a port holds up nobody else, outlives its stream, and ends in words where no answer comes."""

import itertools
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch

from cloud_node import asks
from cloud_node.service import COMPUTE_THREADS, WAITING_THREADS
from isthmus.errors import LimitError
from isthmus.wire.gen import backbone_pb2 as pb
from tests.bad_input.raw import describe, hidden, request
from tests.dlora.frames import ROWS, PortClient, adapting, answer, backward, forward, port_opening
from tests.dlora.near import near
from tests.faults.training import same_bits, settings
from tests.harness import Server

PATIENCE_S = 2.0


@pytest.fixture(scope="module")
def address(servers: dict[str, Server]) -> str:
    return servers["llama"].address


@pytest.fixture(scope="module")
def card(address: str) -> pb.ModelCard:
    return describe(address, None)


@pytest.fixture(scope="module")
def impatient(tiny_models: dict[str, Path], cache: Path) -> Iterator[str]:
    """A server that waits for an answer at a port for `PATIENCE_S` seconds."""
    with pytest.MonkeyPatch.context() as patch, near(tiny_models["llama"]) as server:
        patch.setattr(asks, "ANSWER_WITHIN_S", PATIENCE_S)
        yield server.address


def test_a_client_that_never_answers_loses_its_request_in_words_and_nothing_else(
    impatient: str, card: pb.ModelCard
) -> None:
    with PortClient(impatient, None, port_opening(card)) as client:
        asked = client.begin(*forward())
        began = time.monotonic()
        refused = client.reply()
        assert 0.5 * PATIENCE_S < time.monotonic() - began < 5 * PATIENCE_S
        assert refused.code == LimitError.code
        assert "no answer at a port of block 2" in refused.reply.failure.message
        client.stream.send(*answer(asked, asked.due))  # too late, which is nothing
        output, questions = client.through(*forward(2))
        assert not output.code
        assert len(questions) == 2


def test_a_request_that_was_given_up_may_come_again(impatient: str, card: pb.ModelCard) -> None:
    with PortClient(impatient, None, port_opening(card)) as client:
        first, _ = client.through(*forward())
        expected = first.tensor.clone()
        client.begin(*forward(2))
        assert client.reply().code == LimitError.code
        again, questions = client.through(*forward(2))
        assert torch.equal(again.tensor, expected)
        assert [asked.header.turn for asked in questions] == [1, 2]


def test_while_passes_wait_others_train_as_if_alone(
    address: str, card: pb.ModelCard, servers: dict[str, Server], rows: Path
) -> None:
    """More passes wait than the node has threads for those of others; each waits in mid-forward or mid-backward."""
    config = settings(servers["llama"], rows, method="dlora", targets=["q_proj", "down_proj"], microbatches=2)

    def trained() -> dict[str, torch.Tensor]:
        with adapting(config) as learner:
            for step in range(2):
                learner.step(step)
            return learner.values

    alone = trained()
    with ExitStack() as opened:
        for _ in range(COMPUTE_THREADS // WAITING_THREADS + 1):
            silent = opened.enter_context(PortClient(address, None, port_opening(card)))
            silent.through(*forward())
            silent.begin(*backward())
            for microbatch in range(2, WAITING_THREADS + 1):
                silent.begin(*forward(microbatch))
            opened.callback(silent.leave)
        assert same_bits(trained(), alone)
        assert silent.is_alive()


def test_the_device_is_not_held_while_a_pass_waits(address: str, card: pb.ModelCard) -> None:
    plain = {"ports": [], "codec_port": ""}
    with PortClient(address, None, port_opening(card)) as waits:
        asked = waits.begin(*forward())
        with PortClient(address, None, port_opening(card, **plain)) as other:
            done = other.ask(*request(1, [hidden(*ROWS)], rows=ROWS))
            assert done.tensor.shape == (sum(ROWS), 32)
            assert done.reply.cost.port_s == 0
        waited_s = 0.5
        time.sleep(waited_s)
        output, _ = waits.through(*answer(asked, asked.due))
        cost = output.reply.cost
        assert cost.port_s > waited_s
        assert cost.forward_s < cost.port_s
        assert cost.queue_s < cost.port_s


def test_passes_of_one_session_wait_and_are_answered_in_any_order(address: str, card: pb.ModelCard) -> None:
    with PortClient(address, None, port_opening(card)) as client:
        first, _ = client.through(*forward())
        expected = first.tensor.clone()
        waiting = [client.begin(*forward(microbatch)) for microbatch in (2, 3, 4)]
        for asked in reversed(waiting):
            output, _ = client.through(*answer(asked, asked.due))
            assert output.reply.key.microbatch == asked.header.key.microbatch
            assert torch.equal(output.tensor, expected)


def test_modules_that_share_an_input_ask_once_and_the_lowest_sends_nothing_further_down(
    address: str, card: pb.ModelCard
) -> None:
    with PortClient(address, None, port_opening(card)) as client:
        output, forwards = client.through(*forward(input_gradient=False))
        assert [(asked.header.block, len(asked.header.modules)) for asked in forwards] == [(2, 3), (3, 1)]
        assert [[tuple(part.shape) for part in asked.tensors] for asked in forwards] == [[(8, 32)], [(8, 64)]]
        gradient, backwards = client.through(*backward(input_gradient=False))
        assert [(asked.header.block, asked.header.wanted) for asked in backwards] == [(3, True), (2, False)]
        assert [tuple(part.shape) for part in backwards[1].tensors] == [(8, 32), (8, 16), (8, 16)]
        assert output.tensor.shape == (8, 32)
        assert gradient.tensor.shape == (0, 32)


def test_a_question_outlives_its_stream_and_is_asked_again_of_whoever_sends_the_request_again(
    address: str, card: pb.ModelCard
) -> None:
    with PortClient(address, None, port_opening(card)) as undisturbed:
        expected, _ = undisturbed.through(*forward())
    opening = port_opening(card)
    lost = PortClient(address, None, opening)
    before = lost.begin(*forward())
    lost.leave()
    with PortClient(address, None, opening) as client:
        after = client.begin(*forward())
        assert after.header == before.header
        assert after.payload == before.payload
        output, _ = client.through(*answer(after, after.due), *answer(after, after.due))
        assert torch.equal(output.tensor, expected.tensor)


def test_a_stream_carries_a_question_once_even_where_its_request_comes_late(address: str, card: pb.ModelCard) -> None:
    """Two copies at once would take turns, and their chunks could not be told apart."""
    opening = port_opening(card)
    lost = PortClient(address, None, opening)
    first = lost.begin(*forward())
    lost.leave()
    with PortClient(address, None, opening) as client:
        second = client.begin(*answer(first, first.due))  # the pass goes on, on the new stream
        assert second.header.turn == 2
        client.stream.send(*forward())
        output, questions = client.through(*answer(second, second.due))
        assert not questions
        assert not output.code


def test_a_stream_that_replaces_another_takes_over_its_questions(address: str, card: pb.ModelCard) -> None:
    opening = port_opening(card)
    old = PortClient(address, None, opening)
    before = old.begin(*forward())
    with PortClient(address, None, opening) as new:
        frame = old.stream.receive()
        assert frame is not None
        assert frame.failure.code == "draining"
        after = new.begin(*forward())
        assert after.header == before.header
        output, _ = new.through(*answer(after, after.due))
        assert not output.code
        old.leave()


def test_a_backward_whose_activations_are_gone_asks_in_its_forward_again(address: str, card: pb.ModelCard) -> None:
    with PortClient(address, None, port_opening(card)) as client:
        client.through(*forward())
        kept, asked = client.through(*backward())
        gradient = kept.tensor.clone()
        assert [question.header.backward for question in asked] == [True, True]
        assert client.ask(*backward()).code == "not-kept"
        inputs = [hidden(*ROWS, seed=9), hidden(*ROWS)]
        whole = request(1, inputs, pb.PASS_BACKWARD, ROWS, input_gradient=True)
        client.stream.send(*whole)
        turns = {}
        for question in itertools.islice(iter(client.question, None), 4):
            turns[question.header.turn] = question.header.backward
            # The forwards are answered as in the first request: their turns there were 1 and 2 as well. The backwards
            # were 1 and 2 in theirs, and are 3 and 4 here.
            question.header.turn -= 2 * question.header.backward
            due = question.due
            question.header.turn += 2 * question.header.backward
            client.stream.send(*answer(question, due))
        recomputed = client.reply()
        assert turns == {1: False, 2: False, 3: True, 4: True}
        assert torch.equal(recomputed.tensor, gradient)
        assert recomputed.reply.cost.recompute_flops > 0
