"""Public text gives the same rows and split each time, and what cannot be used is named with its remedy."""

import json
from pathlib import Path
from typing import Any

import pytest

from emulator.text import read_text
from isthmus.errors import DataError, UsageError
from tests.harness import byte_tokenizer


def test_text_is_split_the_same_way_each_time_and_its_end_is_never_calibrated_with(
    homes: dict[str, Path], tmp_path: Path
) -> None:
    path = tmp_path / "rows.jsonl"
    for count, held_out in ((2, 1), (19, 1), (20, 2), (1000, 64)):
        path.write_text("".join(json.dumps({"text": f"row {number}"}) + "\n" for number in range(count)))
        public = read_text(path, homes["llama"], 48)
        assert len(public.held_out) == held_out
        every = [*public.rows, *public.held_out]
        assert len(every) == len(set(every)) == count
        assert len(public.calibration) == min(256, len(public.rows))
        assert set(public.calibration) <= set(public.rows)
        assert read_text(path, homes["llama"], 48) == public
    assert public.calibration[-1] in public.rows[-4:]  # spread over the file


def test_running_text_is_cut_into_rows_that_join_up_again(homes: dict[str, Path], tmp_path: Path) -> None:
    path = tmp_path / "public.txt"
    path.write_text("Grüße, " * 20, encoding="utf-8")
    public = read_text(path, homes["llama"], 16)
    rows = [*public.rows, *public.held_out]
    assert {len(row.ids) for row in rows[:-1]} == {16}
    assert {row.counted for row in rows[:-1]} == {(False, *[True] * 15)}
    assert bytes_of(rows) == path.read_bytes()[: len(bytes_of(rows))]
    assert len(path.read_bytes()) - len(bytes_of(rows)) <= 1


def bytes_of(rows: Any) -> bytes:
    return byte_tokenizer().decode([token for row in rows for token in row.ids]).encode()


@pytest.mark.parametrize(
    ("name", "content", "error", "message"),
    [
        ("public.md", b"text", UsageError, "neither .jsonl nor .txt"),
        ("public.txt", b"", DataError, "gives 0 rows"),
        ("public.txt", b"short", DataError, "gives 1 rows, and one is held out"),
        ("public.txt", b"fine\nnot \xff so", DataError, r"public.txt:2: is not UTF-8; convert"),
        ("public.jsonl", b"{}\n", DataError, "public.jsonl:1: has no keys"),
        ("public.jsonl", b'{"text": "one row"}\n', DataError, "gives 1 rows"),
        ("absent.txt", None, DataError, "absent.txt: cannot be read"),
    ],
)
def test_text_that_cannot_be_used_is_named_and_the_remedy_with_it(
    name: str, content: bytes | None, error: type[Exception], message: str, homes: dict[str, Path], tmp_path: Path
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(error, match=message):
        read_text(tmp_path / name, homes["llama"], 48)
