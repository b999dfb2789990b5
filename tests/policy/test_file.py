"""A policy file: default deny, misspelt keys by name, read anew while a node runs; a broken one changes nothing."""

import json
import logging
from collections.abc import Callable
from itertools import product
from pathlib import Path

import pytest
from typer.testing import CliRunner

from cloud_node.cli import app
from cloud_node.policy.authority import Authority
from cloud_node.policy.rules import METHODS, read_policy
from cloud_node.session import Session
from isthmus.cut import Cut
from isthmus.errors import ForbiddenError, IsthmusError, UsageError
from isthmus.wire.gen import backbone_pb2 as pb

ALICE = "spiffe://isthmus/edge/alice"
MODEL = ("tiny", "digest")

Written = Callable[[str], Path]


@pytest.fixture
def written(tmp_path: Path) -> Written:
    def write(text: str) -> Path:
        file = tmp_path / "policy.yaml"
        file.write_text(text)
        return file

    return write


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("tenant: {}", "no key 'tenant'; known there are tenants"),
        ("tenants: {a: {methds: [split]}}", "no key 'tenants.a.methds'; known there are models, methods"),
        ("tenants: {a: {limits: {tokens: 3}}}", "no key 'tenants.a.limits.tokens'; known there are tokens_per_day"),
        ("tenants: {limits: {tokens: 3}}", "no key 'tenants.limits.tokens'; known there are models"),
        ("default: {limits: {tokens: 3}}", "no key 'default.limits.tokens'; known there are tokens_per_day"),
        ("tenants: {a: {methods: [guess]}}", "tenants.a.methods.0: Input should be 'split'"),
        ("tenants: {a: {cuts: [two]}}", "tenants.a.cuts: cut 'two' is not of the form"),
        ("tenants: {a: {limits: {sessions: 0}}}", "tenants.a.limits.sessions: Input should be greater"),
        ("tenants: {a: {submit: perhaps}}", "tenants.a.submit: Input should be a valid boolean"),
        ("tenants: {a: {}, 'spiffe://isthmus/edge/a': {}}", "a tenant is named twice"),
        ("- a", "must hold `name: value` lines"),
    ],
)
def test_what_does_not_fit_is_refused_by_its_key(text: str, said: str, written: Written) -> None:
    with pytest.raises(UsageError) as caught:
        read_policy(written(text))
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_whoever_is_not_named_is_told_which_line_to_add_and_a_default_is_only_by_choice(written: Written) -> None:
    with pytest.raises(ForbiddenError, match="add `alice:` under `tenants:`"):
        read_policy(written("tenants: {bob: {models: ['*']}}")).rights(ALICE)
    with pytest.raises(ForbiddenError, match="add tiny to its `models:`"):
        Authority(written("hidden_margin: 0\ntenants:\n  alice:\n"), MODEL).rights(ALICE)
    chosen = read_policy(written("tenants: {bob: {}}\ndefault: {models: ['*']}"))
    assert chosen.rights(ALICE).models == ["*"]
    assert not chosen.rights("spiffe://isthmus/edge/bob").models


def test_a_named_tenant_may_do_nothing_that_its_lists_lack(written: Written) -> None:
    authority = Authority(written("hidden_margin: 0\ntenants: {alice: {models: ['*']}}"), MODEL)
    opening = pb.Open(session="one", bottom=1, top=1)
    for refused in (
        lambda: authority.require_cut(ALICE, Cut(1, 1)),
        lambda: authority.open(ALICE, opening, []),
        lambda: authority.require_emulator(ALICE, "half", "id"),
        lambda: authority.require_submit(ALICE),
    ):
        with pytest.raises(ForbiddenError, match="ask the model owner to add"):
            refused()
    assert authority.refused["right"] == 4
    assert not authority.card(ALICE, pb.ModelCard(cuts=[pb.CutOffer(bottom=1, top=1)])).cuts


def test_another_model_than_those_named_is_refused(written: Written) -> None:
    file = written("hidden_margin: 0\ntenants: {alice: {models: [large]}}")
    with pytest.raises(ForbiddenError, match="add tiny to its `models:`"):
        Authority(file, MODEL).rights(ALICE)
    assert Authority(file, ("tiny", "large")).rights(ALICE), "by its digest"


KINDS = {
    "split": pb.Open(),
    "top": pb.Open(forward_only=True),
    "side": pb.Open(forward_only=True, ports=[pb.Port(kind="tap")]),
    "dlora": pb.Open(ports=[pb.Port(kind="lora")]),
}
MAY_OPEN = {("split", "split"), ("split", "top"), ("top", "top"), ("decode", "top"), ("side", "side")}
"""By method granted and kind of session; `dlora` needs its exchange too. Who may go back may also only go forward."""


@pytest.mark.parametrize(("granted", "kind", "exchange"), list(product(METHODS, KINDS, (False, True))))
def test_each_method_opens_its_own_sessions(granted: str, kind: str, exchange: bool, written: Written) -> None:
    exchanges = "[activations]" if exchange else "[]"
    rights = f"{{models: ['*'], cuts: ['*'], methods: [{granted}], exchanges: {exchanges}}}"
    authority = Authority(written(f"hidden_margin: 0\ntenants: {{alice: {rights}}}"), MODEL)
    expected = (granted, kind) in MAY_OPEN or (granted == kind == "dlora" and exchange)
    assert (refusal_of(lambda: authority.open(ALICE, KINDS[kind], [])) is None) == expected


@pytest.mark.parametrize("granted", ["[]", "[activations]", "[parameters]", "['*']"])
def test_values_of_adapters_come_only_from_those_who_may_send_them(granted: str, written: Written) -> None:
    rights = f"{{models: ['*'], cuts: ['*'], methods: [dlora], exchanges: {granted}}}"
    authority = Authority(written(f"hidden_margin: 0\ntenants: {{alice: {rights}}}"), MODEL)
    opening = pb.Open(ports=[pb.Port(kind="lora-values")])
    refused = refusal_of(lambda: authority.open(ALICE, opening, []))
    assert (refused is None) == (granted in ("[parameters]", "['*']"))
    assert refused is None or "add parameters to its `exchanges:`" in str(refused)


PASSES = {
    "split": {pb.PASS_FORWARD},
    "top": {pb.PASS_FORWARD},
    "decode": {pb.PASS_DECODE},
    "side": set(),
    "dlora": set(),
}
"""By method granted: what may be asked in a session that runs forward only."""


@pytest.mark.parametrize(("granted", "kind"), list(product(METHODS, (pb.PASS_FORWARD, pb.PASS_DECODE))))
def test_a_session_that_only_runs_forward_continues_texts_for_those_alone_who_may(
    granted: str, kind: "pb.Pass.ValueType", written: Written
) -> None:
    rights = f"{{models: ['*'], cuts: ['*'], methods: [{granted}]}}"
    authority = Authority(written(f"hidden_margin: 0\ntenants: {{alice: {rights}}}"), MODEL)
    session = Session("one", ALICE, Cut(1, 1), "none", "none", forward_only=True, ports=(), codec_port="")
    assert (refusal_of(lambda: authority.require_pass(session, kind)) is None) == (kind in PASSES[granted])


def refusal_of(asked: Callable[[], object]) -> IsthmusError | None:
    try:
        asked()
    except ForbiddenError as error:
        return error
    return None


def test_a_changed_file_holds_at_once_and_a_broken_one_leaves_the_old(
    written: Written, caplog: pytest.LogCaptureFixture
) -> None:
    authority = Authority(written("hidden_margin: 0\ntenants: {alice: {models: ['*']}}"), MODEL)
    assert not authority.now.reload()
    written("hidden_margin: 0\ntenants: {alice: {modles: ['*']}}")
    with caplog.at_level(logging.WARNING):
        assert not authority.now.reload()
    assert "the old one holds" in caplog.text
    assert "tenants.alice.modles" in caplog.text
    assert authority.rights(ALICE)
    written("hidden_margin: 0\ntenants: {bob: {models: ['*']}}")
    assert authority.now.reload()
    with pytest.raises(ForbiddenError):
        authority.rights(ALICE)


def test_without_a_file_every_identity_may_do_all_and_the_node_says_so() -> None:
    authority = Authority()
    assert authority.rights("spiffe://isthmus/edge/anyone").submit
    assert "every identity of the authority may do all" in authority.now.in_words()
    assert not any(authority.refused.values())


def test_check_prints_what_each_may_do(written: Written) -> None:
    file = written("tenants: {alice: {models: [tiny], methods: [split], limits: {tokens_per_day: 1000000}}}")
    shown = CliRunner().invoke(app, ["policy", "check", str(file)])
    assert shown.exit_code == 0
    lines = [" ".join(line.split()) for line in shown.output.splitlines()]
    assert lines[:4] == [ALICE, "models tiny", "methods split", "exchanges none"]
    assert {"tokens_per_day 1,000,000", "everybody else", "is refused"} <= set(lines)
    told = json.loads(CliRunner().invoke(app, ["policy", "check", str(file), "--json"]).output)
    assert told["tenants"][ALICE]["limits"]["tokens_per_day"] == 1_000_000
    assert told["default"] is None
