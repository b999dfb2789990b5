"""Who may do what to whose: every role x every call and kind of frame x every object, in one table."""

import pytest

from isthmus.wire.gen import backbone_pb2 as pb
from tests.policy.asking import CALLS, FRAMES, Asker
from tests.policy.conftest import Nodes

ROLES = ("alice", "bob", "cara", "anonymous")
"""A tenant with rights, another one, one with a certificate that the policy does not name, and a peer in plaintext."""

OBJECTS = ("own", "another's", "unknown")
FORBIDDEN = "forbidden"
NAMED, UNNAMED = ("ok", "ok"), (FORBIDDEN, FORBIDDEN)

# In the order of ROLES. An open session is an object of its own: what is asked inside it is asked of its owner.
CALLED = {
    ("Backbone.Describe", "own"): (*NAMED, *UNNAMED),
    ("Backbone.Describe", "another's"): ("hidden", "hidden", *UNNAMED),
    ("Backbone.Describe", "unknown"): ("version",) * 4,
    ("Backbone.FetchEnds", "own"): (*NAMED, *UNNAMED),
    ("Backbone.FetchEnds", "another's"): (FORBIDDEN,) * 4,
    ("Backbone.FetchEnds", "unknown"): ("bundle", "bundle", *UNNAMED),
    ("Backbone.Exchange", "own"): (*NAMED, *UNNAMED),
    ("Backbone.Exchange", "another's"): ("owner", "owner", *UNNAMED),
    ("Backbone.Exchange", "unknown"): (FORBIDDEN,) * 4,
    ("Offsite.List", "own"): (*NAMED, *UNNAMED),
    ("Offsite.List", "another's"): ("hidden", "hidden", *UNNAMED),
    ("Offsite.List", "unknown"): ("version",) * 4,
    ("Offsite.Fetch", "own"): (*NAMED, *UNNAMED),
    ("Offsite.Fetch", "another's"): (FORBIDDEN,) * 4,
    ("Offsite.Fetch", "unknown"): ("bundle", "bundle", *UNNAMED),
    ("Offsite.Submit", "own"): (*NAMED, *UNNAMED),
    ("Offsite.Submit", "another's"): ("bundle", "bundle", *UNNAMED),
    ("Offsite.Submit", "unknown"): ("wire", "wire", *UNNAMED),
    # An empty message of a round that one may take part in is past the policy: what it says is refused.
    **{
        (f"Rounds.{call}", thing): (refused, refused, *UNNAMED) if thing == "own" else (FORBIDDEN,) * 4
        for call, refused in {"Join": "version", "Keys": "wire", "Submit": "wire", "Result": "wire"}.items()
        for thing in OBJECTS
    },
}
WORDS = {
    "call:backward": ("ok+ok",) * 2,
    "call:values": UNNAMED,  # not in a session whose ports answer
    "call:gradients": UNNAMED,
}
FRAMED = {
    (f"frame.{body}", thing): outcomes
    for body in FRAMES
    for thing, outcomes in {
        "own": (*(WORDS.get(body, NAMED)), *UNNAMED),
        "another's": ("owner", "owner", *UNNAMED),
        "unknown": (FORBIDDEN if body == "open" else "wire",) * 4,
    }.items()
}
TABLE = {**CALLED, **FRAMED}


@pytest.mark.parametrize(("action", "thing"), TABLE, ids=lambda part: part.replace("'", ""))
def test_each_role_gets_what_the_table_says(action: str, thing: str, nodes: Nodes) -> None:
    found = tuple(Asker(nodes, role).outcome(action, thing) for role in ROLES)
    assert found == TABLE[action, thing], dict(zip(ROLES, found, strict=True))


def test_the_table_is_complete() -> None:
    """A call, a kind of frame or a pass that the contract has and the table lacks fails here."""
    services = pb.DESCRIPTOR.services_by_name.values()
    calls = {f"{service.name}.{method.name}" for service in services for method in service.methods}
    assert {action for action, _ in CALLED} == calls == set(CALLS)
    bodies = {field.name for field in pb.ClientFrame.DESCRIPTOR.oneofs_by_name["body"].fields}
    assert {body.partition(":")[0] for body in FRAMES} == bodies
    asked = {
        name.removeprefix("PASS_").lower()
        for name in pb.Pass.DESCRIPTOR.values_by_name
        if not name.endswith(("PORT", "SPECIFIED"))
    }
    assert {body.partition(":")[2] for body in FRAMES if body.startswith("call:")} == asked
    assert set(TABLE) == {(action, thing) for action, _ in TABLE for thing in OBJECTS}
