"""Data files: which tokens are learnt, how long rows are cut, and what is refused with file, line and a way out."""

import json
from pathlib import Path
from typing import cast

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from cloud_node.models import fetch
from demo.reviews import Domain, prepare
from isthmus.errors import DataError, ModelError, UsageError
from isthmus.training.data import Dataset, Example, TokenSequence, read_examples, read_labels
from tests.harness import byte_tokenizer

TEMPLATE = (
    "{% for m in messages %}{{ '<' + m['role'][0] + '>' + m['content'] + '$' }}{% endfor %}"
    "{% if add_generation_prompt %}<a>{% endif %}"
)


def letters(bos: bool = False, eos: bool = True, template: str | None = TEMPLATE) -> PreTrainedTokenizerFast:
    """A tokenizer whose tokens are single characters: `^` begins and `$` ends a sequence."""
    vocabulary = {character: index for index, character in enumerate("?^$" + "".join(map(chr, range(97, 123))) + "<> ")}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="?"))
    tokenizer.pre_tokenizer = Split("", "isolated")
    if bos:
        tokenizer.post_processor = TemplateProcessing(single="^ $A", special_tokens=[("^", vocabulary["^"])])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="?",
        bos_token="^",
        eos_token="$" if eos else None,
        chat_template=template,
    )


def read(path: Path, *rows: object, tokenizer: PreTrainedTokenizerFast | None = None, max_length: int = 99) -> Dataset:
    file = path / "rows.jsonl"
    file.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows), encoding="utf-8")
    return read_examples(file, tokenizer or letters(), max_length)


def show(sequence: TokenSequence, tokenizer: PreTrainedTokenizerFast | None = None) -> tuple[str, str]:
    """The tokens as characters, and a `*` under each target."""
    characters = (tokenizer or letters()).convert_ids_to_tokens(list(sequence.ids))
    return "".join(characters), "".join(".*"[counted] for counted in sequence.counted)


def test_of_a_text_every_token_but_the_first_is_learnt_and_the_end_with_them(tmp_path: Path) -> None:
    (example,) = read(tmp_path, {"text": "abc"}).examples
    assert show(example.train) == ("abc$", ".***")
    assert (example.choices, example.answer) == ((), None)


def test_a_sequence_opens_with_bos_where_the_tokenizer_does_so_by_itself(tmp_path: Path) -> None:
    rows = [{"text": "abc"}, {"prompt": "ab", "completion": "cd"}]
    text, completion = read(tmp_path, *rows, tokenizer=letters(bos=True)).examples
    assert show(text.train) == ("^abc$", ".****")
    assert show(completion.train) == ("^abcd$", "...***")


def test_no_end_is_added_where_the_tokenizer_has_none(tmp_path: Path) -> None:
    (example,) = read(tmp_path, {"text": "abc"}, tokenizer=letters(eos=False)).examples
    assert show(example.train) == ("abc", ".**")


def test_of_a_completion_row_only_the_completion_and_the_end_are_learnt(tmp_path: Path) -> None:
    (example,) = read(tmp_path, {"prompt": "ab", "completion": " cd"}).examples
    assert show(example.train) == ("ab cd$", "..****")


def test_of_a_conversation_every_assistant_turn_is_learnt_and_nothing_else(tmp_path: Path) -> None:
    said = [("system", "s"), ("user", "u"), ("assistant", "xy"), ("user", "v"), ("assistant", "z"), ("user", "w")]
    row = {"messages": [{"role": role, "content": content} for role, content in said]}
    (example,) = read(tmp_path, row).examples
    assert show(example.train) == ("<s>s$<u>u$<a>xy$<u>v$<a>z$", "." * 13 + "***" + "." * 8 + "**")


def test_choices_share_the_prompt_and_training_takes_the_right_one(tmp_path: Path) -> None:
    (example,) = read(tmp_path, {"prompt": "ab", "choices": ["c", "de"], "answer": 1}).examples
    assert [show(choice) for choice in example.choices] == [("abc", "..*"), ("abde", "..**")]
    assert example == Example(example.choices[1], example.choices, 1)


def test_a_long_text_loses_its_end_and_is_reported(tmp_path: Path) -> None:
    data = read(tmp_path, {"text": "abcdef"}, {"text": "ab"}, max_length=4)
    assert [show(example.train)[0] for example in data.examples] == ["abcd", "ab$"]
    assert data.truncated == 1


def test_a_long_prompt_loses_its_beginning_but_never_the_completion_or_bos(tmp_path: Path) -> None:
    row = {"prompt": "abcdef", "completion": "xy"}
    data = read(tmp_path, row, max_length=5)
    assert show(data.examples[0].train) == ("efxy$", "..***")
    assert data.truncated == 1
    with_bos = read(tmp_path, row, max_length=5, tokenizer=letters(bos=True))
    assert show(with_bos.examples[0].train) == ("^fxy$", "..***")


def test_all_choices_are_scored_after_the_same_shortened_prompt(tmp_path: Path) -> None:
    data = read(tmp_path, {"prompt": "abcdef", "choices": ["x", "xyz"], "answer": 0}, max_length=5)
    assert [show(choice)[0] for choice in data.examples[0].choices] == ["efx", "efxyz"]
    assert data.truncated == 1


def test_a_long_conversation_keeps_its_last_answer(tmp_path: Path) -> None:
    said = [("user", "u"), ("assistant", "xy"), ("user", "v"), ("assistant", "z")]
    row = {"messages": [{"role": role, "content": content} for role, content in said]}
    data = read(tmp_path, row, max_length=12)
    assert show(data.examples[0].train) == ("y$<u>v$<a>z$", ".*........**")


def test_a_completion_that_fills_the_whole_length_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"rows\.jsonl:1: .* 4 tokens.* maximum length of 4; raise --max-length"):
        read(tmp_path, {"prompt": "a", "completion": "xyz"}, max_length=4)


def test_blank_lines_a_byte_order_mark_and_windows_line_ends_are_read_over(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_bytes(b'\xef\xbb\xbf{"text": "ab"}\r\n\r\n  \n{"text": "cd"}\r\n')
    assert [show(example.train)[0] for example in read_examples(file, letters(), 9).examples] == ["ab$", "cd$"]


def test_a_template_that_rewrites_earlier_turns_is_refused(tmp_path: Path) -> None:
    rewrites = "{{ messages | length }}" + TEMPLATE
    row = {"messages": [{"role": "user", "content": "u"}, {"role": "assistant", "content": "x"}]}
    with pytest.raises(DataError, match="does not extend its own prefix"):
        read(tmp_path, row, tokenizer=letters(template=rewrites))


def test_a_conversation_without_a_template_or_refused_by_it_is_refused_here(tmp_path: Path) -> None:
    row = {"messages": [{"role": "user", "content": "u"}, {"role": "assistant", "content": "x"}]}
    with pytest.raises(DataError, match=r":1: .*needs a chat template"):
        read(tmp_path, row, tokenizer=letters(template=None))
    with pytest.raises(DataError, match=r":1: the chat template refuses the conversation \(no users\)"):
        read(tmp_path, row, tokenizer=letters(template="{{ raise_exception('no users') }}"))


USER = {"role": "user", "content": "u"}
ASSISTANT = {"role": "assistant", "content": "x"}


@pytest.mark.parametrize(
    ("row", "complaint"),
    [
        ("{", "is not JSON"),
        ("[1]", "is not a JSON object"),
        ("null", "is not a JSON object"),
        ("[" * 100_000, "nesting beyond"),
        ('{"text": NaN}', "holds NaN"),
        ('{"text": "a", "text": "b"}', "key 'text' twice"),
        ('{"text": "\\ud800"}', "surrogate"),
        ({}, "has no keys"),
        ({"txt": "a"}, "unknown key 'txt'; accepted are"),
        ({"text": "a", "weight": 1}, "unknown key 'weight'"),
        ({"text": "ab", "prompt": "a"}, "'text', 'prompt', which is no shape; accepted are"),
        ({"prompt": "a", "choices": ["b", "c"]}, "which is no shape"),
        ({"text": "a", "label": 1}, "has a label, and the first row of what was trained on has none"),
        ({"text": ""}, '"text" is empty'),
        ({"text": 3}, '"text" is not a string'),
        ({"prompt": "", "completion": "a"}, '"prompt" is empty'),
        ({"prompt": "a", "completion": ""}, '"completion" is empty'),
        ({"prompt": "a", "completion": None}, '"completion" is not a string'),
        ({"prompt": "a", "choices": "bc", "answer": 0}, "at least two strings"),
        ({"prompt": "a", "choices": ["b"], "answer": 0}, "at least two strings"),
        ({"prompt": "a", "choices": ["b", 1], "answer": 0}, 'choice 1 of "choices" is not a string'),
        ({"prompt": "a", "choices": ["", "b"], "answer": 0}, 'choice 0 of "choices" is empty'),
        ({"prompt": "a", "choices": ["b", "c"], "answer": 2}, "integer from 0 to 1"),
        ({"prompt": "a", "choices": ["b", "c"], "answer": -1}, "integer from 0 to 1"),
        ({"prompt": "a", "choices": ["b", "c"], "answer": True}, "integer from 0 to 1"),
        ({"prompt": "a", "choices": ["b", "c"], "answer": 1.0}, "integer from 0 to 1"),
        ({"messages": []}, "not a list of turns"),
        ({"messages": ["u"]}, "exactly"),
        ({"messages": [USER | {"name": "n"}, ASSISTANT]}, "turn 0 .*exactly"),
        ({"messages": [USER, ASSISTANT | {"role": "asistant"}]}, "turn 1 .*'asistant'; use one of"),
        ({"messages": [USER, ASSISTANT | {"role": ["assistant"]}]}, "turn 1 .*use one of"),
        ({"messages": [USER, ASSISTANT | {"content": ""}]}, "turn 1 .*is empty"),
        ({"messages": [USER]}, "no assistant turn"),
        ({"messages": [ASSISTANT]}, "no assistant turn"),
    ],
)
def test_a_malformed_row_is_refused_with_file_line_and_a_way_out(tmp_path: Path, row: object, complaint: str) -> None:
    with pytest.raises(DataError, match=rf"rows\.jsonl:3: .*{complaint}") as refusal:
        read(tmp_path, {"text": "ab"}, "", row)
    assert "\n" not in str(refusal.value)


def test_a_text_of_one_token_and_no_end_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nothing is predicted"):
        read(tmp_path, {"text": "a"}, tokenizer=letters(eos=False))


def test_a_file_that_is_empty_absent_or_not_utf8_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no rows"):
        read(tmp_path, "", " ")
    with pytest.raises(DataError, match=r"absent\.jsonl: cannot be read"):
        read_examples(tmp_path / "absent.jsonl", letters(), 9)
    (tmp_path / "latin.jsonl").write_bytes(b'{"text": "ab"}\n{"text": "caf\xe9"}\n')
    with pytest.raises(DataError, match=r"latin\.jsonl:2: is not UTF-8"):
        read_examples(tmp_path / "latin.jsonl", letters(), 9)


def test_a_length_that_leaves_nothing_to_predict_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="at least 2"):
        read(tmp_path, {"text": "ab"}, max_length=1)


def test_an_unknown_model_or_domain_is_refused_with_the_known_names(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="known names: smollm2-135m"):
        fetch("smollm3", tmp_path / "model")
    with pytest.raises(UsageError, match="known domains: movies, products, tweets, news"):
        prepare(tmp_path, cast(Domain, "books"), 10)


def test_a_model_is_not_fetched_into_a_folder_that_holds_something_else(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ModelError, match="holds something else"):
        fetch("smollm2-135m", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def written(path: Path, *rows: object) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def labels_of(tmp_path: Path, *rows: object) -> tuple[str | int, ...] | None:
    return read_labels(written(tmp_path / "rows.jsonl", *rows))


def test_labels_are_those_of_the_file_in_order_and_are_none_where_its_first_row_has_none(tmp_path: Path) -> None:
    assert labels_of(tmp_path, *({"text": "a", "label": label} for label in ("yes", "no", "yes"))) == ("no", "yes")
    assert labels_of(tmp_path, *({"text": "a", "label": label} for label in (3, -1, 10, 3))) == (-1, 3, 10)
    assert labels_of(tmp_path, {"text": "a"}, {"text": "a", "label": 1}) is None


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"text": "a", "label": "x"}, {"text": "a"}], r"rows.jsonl:2: has no label, and the rows before it do"),
        ([{"text": "a", "label": "x"}] * 3, r"rows.jsonl: has 1 labels where 2 to 10,000"),
        ([{"text": "a", "label": 1}, {"text": "a", "label": "1"}], "strings in some rows and integers in others"),
        ([{"text": "a", "label": 1}, {"text": "a", "label": 1.5}], r"rows.jsonl:2: \"label\" is neither a string nor"),
        (
            [{"text": "a", "label": True}, {"text": "a", "label": False}],
            r"jsonl:1: \"label\" is neither a string",
        ),
        ([{"text": "a", "label": ""}], r"rows.jsonl:1: \"label\".* is empty"),
    ],
)
def test_labels_that_cannot_be_told_apart_are_refused(rows: list[object], message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=message):
        labels_of(tmp_path, *rows)


def test_a_row_with_a_label_is_its_text_with_the_label_as_the_last_token(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    path = written(tmp_path / "rows.jsonl", {"text": "abcdef", "label": "b"}, {"text": "ab", "label": "a"})
    found = read_examples(path, tokenizer, 4, ("a", "b"))
    first, second = found.examples
    ids = tuple(tokenizer("abcd")["input_ids"])
    assert found.truncated == 1
    assert (first.train.ids, first.choices, first.answer, first.labelled) == ((*ids, 1), (), 1, True)
    assert first.train.counted == (False, False, False, False, True)
    assert {first.train.padding, second.train.padding} == {tokenizer.pad_token_id}
    assert second.answer == 0
