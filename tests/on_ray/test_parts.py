"""The span is cut into consecutive stages, and each session is told to the stages that it concerns."""

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from cloud_node.engine import Opening
from cloud_node.on_ray.parts import legs, part_of, shares
from isthmus.cut import Cut
from isthmus.errors import UsageError
from isthmus.ports import LORA, Port

BLOCKS = 12
CUTS = (
    st.tuples(st.integers(0, 11), st.integers(0, 11)).filter(lambda ends: sum(ends) < 12).map(lambda ends: Cut(*ends))
)


@given(st.lists(CUTS, min_size=1, max_size=4), st.integers(1, 4))
def test_every_block_of_every_cut_is_run_once_and_in_order_by_stages_as_equal_as_can_be(
    cuts: list[Cut], stages: int
) -> None:
    needed = {block for cut in cuts for block in cut.span(BLOCKS)}
    assume(stages <= len(needed))
    held = shares(cuts, BLOCKS, stages)
    sizes = [len(needed & set(share)) for share in held]
    assert len(held) == stages
    assert max(sizes) - min(sizes) <= 1
    assert all(any(part_of(cut, share, BLOCKS) for cut in cuts) for share in held), "a stage without a block"
    for cut in cuts:
        run = [block for leg in legs(Opening(cut), held, BLOCKS) for block in leg.blocks]
        assert run == list(cut.span(BLOCKS))


@given(CUTS, st.integers(1, 4))
def test_a_stage_is_told_of_its_own_ports_and_of_whose_the_session_is(cut: Cut, stages: int) -> None:
    assume(stages <= len(cut.span(BLOCKS)))
    ports = tuple(Port(block, module="q", kind=LORA) for block in cut.span(BLOCKS))
    found = legs(Opening(cut, ports, "bank", alone=True), shares([cut], BLOCKS, stages), BLOCKS)
    assert tuple(port for leg in found for port in leg.opening.ports) == ports
    assert all({port.block for port in leg.opening.ports} == set(leg.blocks) for leg in found)
    assert {(leg.opening.tenant, leg.opening.alone) for leg in found} == {("bank", True)}


def test_a_cut_within_one_stage_leaves_the_others_alone() -> None:
    held = shares([Cut(0, 0), Cut(1, 8)], BLOCKS, 3)
    assert [leg.stage for leg in legs(Opening(Cut(1, 8)), held, BLOCKS)] == [0]


def test_more_stages_than_blocks_are_refused() -> None:
    with pytest.raises(UsageError, match="more than the span's 2 blocks"):
        shares([Cut(5, 5)], BLOCKS, 3)
