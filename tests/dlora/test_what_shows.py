"""What crosses at a port gives the adapter away to whoever knows the input; the documentation says so, and no less."""

import pytest
import torch

from edge_client.port_adapters import PortWork
from isthmus.wire.gen import backbone_pb2 as pb
from tests.dlora.reference import gradients, with_ports
from tests.harness import Server
from tests.parity.reference import HIDDEN, ragged_sequences, random_values
from tests.parity.test_training import LENGTHS

PORT = "2.self_attn.q_proj"


def test_the_cloud_can_solve_for_an_adapter_from_one_steps_inputs_and_answers(
    servers: dict[str, Server], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    answer = PortWork.answer

    def note(work: PortWork, ask: pb.PortCall, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
        answered = answer(work, ask, tensors)
        if (ask.block, *ask.modules) == (2, "self_attn.q_proj") and not ask.backward:
            seen.append((tensors[0].detach().double(), answered[0].double()))
        return answered

    monkeypatch.setattr(PortWork, "answer", note)
    with with_ports(servers["llama"], "1:1", ["q_proj"]) as (edge, tuning):
        tuning.load(random_values(tuning.trainable))
        gradients(edge, tuning, ragged_sequences(LENGTHS), 1)
        (input_NI, added_NO), port = seen[0], tuning.ports[PORT]
        assert len(input_NI) > HIDDEN, "fewer tokens than values leave a part unknown"
        solved_OI = torch.linalg.lstsq(input_NI, added_NO).solution.T
        true_OI = port.scale * (tuning.trainable[port.up] @ tuning.trainable[port.down]).double()
        assert (solved_OI - true_OI).norm() < 1e-3 * true_OI.norm()
