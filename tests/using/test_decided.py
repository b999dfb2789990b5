"""What decides an answer: the user, and of a model's own settings where a text ends, whatever else stands there."""

import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from edge_client.chatting import converse
from edge_client.finished import Using, continue_prompt, reassembled
from edge_client.generation import Drawing, added_to
from edge_client.predicting import predict
from isthmus.errors import ModelError
from isthmus.ledger.record import Ledger
from tests.using.plain import Plain

QUIET = Console(quiet=True)
NEW_TOKENS = 9
PROMPTS = ["a gem", "dull", "the film was so", "why"]
LETTERS = "abcdefghijklmnopqrstuvwxyz "

HOSTILE: dict[str, dict[str, Any]] = {
    "beams": {"num_beams": 3, "length_penalty": -9.0, "early_stopping": True},
    "several": {"num_beams": 2, "num_return_sequences": 2},
    "drawn": {"do_sample": True, "temperature": 90.0, "num_return_sequences": 2},
    "time": {"max_time": 1e-9, "max_length": 1},
    "lookup": {"prompt_lookup_num_tokens": 2},
    "strings": {"stop_strings": list(LETTERS)},
    "cache": {"cache_implementation": "static", "use_cache": False},
    "least": {"min_length": 300, "min_new_tokens": NEW_TOKENS},
    "repeats": {"no_repeat_ngram_size": 1, "repetition_penalty": 50.0, "encoder_repetition_penalty": 50.0},
    "forced": {"forced_eos_token_id": 5, "suppress_tokens": [6, 7, 8], "sequence_bias": [[[9], 50.0]]},
    "shape": {"return_dict_in_generate": True, "output_scores": True, "output_logits": True},
    "guided": {"guidance_scale": 3.0, "renormalize_logits": True, "exponential_decay_length_penalty": [1, 9.0]},
    "padding": {"pad_token_id": 10**6, "bos_token_id": -1},
    "methods": {"update": 1, "to_dict": 2, "validate": 3},
}


def served(talker: Path, folder: Path, settings: dict[str, Any]) -> Using:
    """The whole model, whose owner has added settings to its `generation_config.json`."""
    shutil.copytree(talker, folder)
    path = folder / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    return Using("local", model=str(folder))


@pytest.mark.parametrize("name", HOSTILE)
def test_all_three_commands_answer_greedily_whatever_the_models_settings_say(
    run: Path, talker: Path, plain: Plain, tmp_path: Path, name: str
) -> None:
    using, data, out = (
        served(talker, tmp_path / "model", HOSTILE[name]),
        tmp_path / "rows.jsonl",
        tmp_path / "out.jsonl",
    )
    due = [plain.after(prompt, NEW_TOKENS) for prompt in PROMPTS]
    data.write_text("".join(f"{json.dumps({'prompt': prompt})}\n" for prompt in PROMPTS))
    predict(run, data, out, using, QUIET, NEW_TOKENS, batch_size=len(PROMPTS))
    assert [json.loads(row)["prediction"] for row in out.read_text().splitlines()] == due
    assert continue_prompt(run, PROMPTS[0], NEW_TOKENS, using, QUIET).text == due[0]
    pieces: list[str] = []
    converse(run, using, ["why"], pieces.append, Console(file=io.StringIO()), NEW_TOKENS)
    assert "".join(pieces) == plain.after(plain.conversation(("user", "why")), NEW_TOKENS) + "\n"


def test_draws_are_not_narrowed_by_the_models_settings(run: Path, talker: Path, plain: Plain, tmp_path: Path) -> None:
    using = served(talker, tmp_path / "model", {"do_sample": True, "top_k": 1, "min_p": 0.9, "typical_p": 0.01})
    torch.manual_seed(0)
    with reassembled(run, using, Ledger(), QUIET) as (_, edge, tuning):
        drawn = added_to(edge, tuning, [plain.ids("why")] * 2000, 1, Drawing(1e6))
    assert {(letter,) for letter in plain.ids(LETTERS)} <= set(map(tuple, drawn)), "so hot a draw is of all 259 tokens"


def test_a_text_ends_where_any_of_the_models_ends_of_sequence_stands(
    run: Path, talker: Path, plain: Plain, tmp_path: Path
) -> None:
    whole = plain.after("a gem", NEW_TOKENS)
    ends = [plain.tokenizer.eos_token_id, *plain.ids(whole[3])]
    using = served(talker, tmp_path / "model", {"eos_token_id": ends})
    assert continue_prompt(run, "a gem", NEW_TOKENS, using, QUIET).text == whole[: whole.index(whole[3])]


@pytest.mark.parametrize("named", ["x", -1, 10**6, True, 2.0, [2, None], list(range(65)), {"2": 2}], ids=str)
def test_an_end_of_sequence_that_is_no_token_is_told_in_a_line(
    run: Path, talker: Path, tmp_path: Path, named: object
) -> None:
    using = served(talker, tmp_path / "model", {"eos_token_id": named})
    with pytest.raises(ModelError, match=r"eos_token_id is not one to 64 of its 259 tokens; have its owner correct"):
        continue_prompt(run, "a gem", NEW_TOKENS, using, QUIET)


def test_a_models_settings_are_left_as_they_were(run: Path, talker: Path, plain: Plain, tmp_path: Path) -> None:
    using = served(talker, tmp_path / "model", {"num_beams": 3})
    with reassembled(run, using, Ledger(), QUIET) as (_, edge, tuning):
        own = tuning.base.generation_config
        added_to(edge, tuning, [plain.ids("why")], 1)
        assert tuning.base.generation_config is own
