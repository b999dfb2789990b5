"""No input crashes anything, grows it by 64 MiB, or goes without an answer in words: a short run of `make fuzz`."""

from collections.abc import Iterator

import pytest
from google.protobuf.message import Message
from hypothesis import HealthCheck, given
from hypothesis import seed as seeded
from hypothesis import settings as limits

from tests.fuzz.inputs import any_message, messages
from tests.fuzz.run import Grounds, grounds
from tests.fuzz.target import Memory, Target

INPUTS = 1500
SEED = 7


@pytest.fixture(scope="module")
def ready(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Grounds]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ISTHMUS_CACHE", "")
        with grounds(tmp_path_factory.mktemp("fuzz")) as made:
            yield made


def test_every_target_takes_its_share(ready: Grounds) -> None:
    for target, count in ready.shares(INPUTS):
        target.attack(count, SEED)
        ready.check()


@pytest.mark.parametrize("kind", messages().values(), ids=messages())
def test_there_is_an_input_for_each_message_with_each_of_its_fields(kind: type[Message]) -> None:
    met: set[str] = set()

    @seeded(1)
    @limits(max_examples=300, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(any_message(kind))
    def draw(message: Message) -> None:
        met.update(field.name for field, _ in message.ListFields())

    draw()
    assert met == {field.name for field in kind.DESCRIPTOR.fields}


def test_an_outcome_that_is_not_allowed_is_found(ready: Grounds) -> None:
    (target, *_) = (target for target in ready.targets if target.name == "checkpoint")

    def careless(content: bytes) -> None:
        assert content.count(b"\0") < 50

    with pytest.raises(AssertionError):
        Target("careless", 1, target.inputs, careless).attack(500, SEED)


def test_growth_is_seen() -> None:
    import os

    memory = Memory(os.getpid())
    taken = bytearray(80 << 20)
    taken[:: 1 << 12] = b"x" * len(taken[:: 1 << 12])
    del taken
    assert memory.grown() > 70 << 20
