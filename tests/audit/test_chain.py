"""A chain of lines finds every change to them but the loss of its newest ones, which a hash kept elsewhere finds."""

import json

import pytest
from hypothesis import given
from hypothesis import settings as limits
from hypothesis import strategies as st

from isthmus.errors import AuditError
from isthmus.trust.chain import End, line_after, read

WORDS = st.text(max_size=12)
FIELDS = st.dictionaries(
    WORDS.filter(lambda name: name not in ("n", "previous", "hash")), WORDS | st.integers(), max_size=4
)


def chained(*said: dict[str, object]) -> list[bytes]:
    lines, end = [], End()
    for fields in said:
        line, end = line_after(end, fields)
        lines.append(line)
    return lines


LINES = chained(*({"action": "open", "object": f"s{number}", "tokens": number * 100} for number in range(6)))


@given(st.lists(FIELDS, max_size=6))
def test_what_was_written_is_read(said: list[dict[str, object]]) -> None:
    found = [
        {name: value for name, value in fields.items() if name not in ("n", "previous")}
        for fields, _ in read(chained(*said), End())
    ]
    assert found == said


@limits(max_examples=400)
@given(st.data())
def test_any_changed_byte_is_found(data: st.DataObject) -> None:
    index = data.draw(st.integers(0, len(LINES) - 1))
    line = bytearray(LINES[index])
    place = data.draw(st.integers(0, len(line) - 1))
    line[place] ^= data.draw(st.integers(1, 255))
    with pytest.raises(AuditError, match=rf"line {index + 1}|line {index + 2}"):
        list(read([*LINES[:index], bytes(line), *LINES[index + 1 :]], End()))


@given(st.data())
def test_any_line_taken_away_put_in_or_moved_is_found(data: st.DataObject) -> None:
    lines = list(LINES)
    index, other = data.draw(st.integers(0, len(lines) - 2)), data.draw(st.integers(0, len(lines) - 1))
    match data.draw(st.sampled_from(("remove", "repeat", "swap"))):
        case "remove":
            del lines[index]
        case "repeat":
            lines.insert(other, lines[index])
        case "swap":
            other = other if other != index else index + 1
            lines[index], lines[other] = lines[other], lines[index]
    with pytest.raises(AuditError):
        list(read(lines, End()))


def test_a_line_made_anew_with_a_hash_of_its_own_breaks_the_chain_after_it() -> None:
    fields = json.loads(LINES[2]) | {"tokens": 1}
    del fields["hash"], fields["n"], fields["previous"]
    ((_, end),) = list(read([LINES[1]]))
    forged, _ = line_after(end, fields)
    assert forged != LINES[2]
    with pytest.raises(AuditError, match="line 4"):
        list(read([*LINES[:2], forged, *LINES[3:]], End()))


@pytest.mark.parametrize(
    "line", [b"", b"\n", b"[]\n", b"{}\n", b'{"n":0,"previous":"","hash":1}\n', b"[" * 70_000, b"\xff\n"]
)
def test_what_is_no_line_is_refused_in_words(line: bytes) -> None:
    with pytest.raises(AuditError, match="line 1 is no line"):
        list(read([line], End()))


def test_what_comes_after_lines_that_were_put_aside_is_read_without_them() -> None:
    assert [end.number for _, end in read(LINES[3:])] == [3, 4, 5]
