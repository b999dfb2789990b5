"""The status page as a person sees it, in a headless Chromium: true, fresh, and fit for a phone."""

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from cloud_node.status import shown_name
from isthmus.wire.gen import backbone_pb2 as pb
from tests.faults.frames import wire
from tests.harness import serving
from tests.watching.browser import Browser, browsing
from tests.watching.conftest import CANARY, OPEN, ROWS, WIDTH, Watched
from tests.watching.reading import StatusPort

PHONE, DESKTOP = 390, 1280
TOO_WIDE = """[...document.querySelectorAll("body *")]
    .filter((each) => each.getBoundingClientRect().right > innerWidth + 0.5)
    .map((each) => each.outerHTML.slice(0, 80))"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with browsing(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


@pytest.fixture
def page(browser: Browser, watched: Watched) -> Browser:
    """The page of the node, with its first figures."""
    browser.complaints.clear()
    browser.open(watched.status.url + "/", DESKTOP)
    browser.until("document.getElementById('state').textContent === 'serving'")
    return browser


def test_it_shows_the_model_the_session_and_what_was_done(page: Browser, watched: Watched) -> None:
    told = watched.status.figures()
    assert page.text("name") == told["model"]["name"] == "tiny-llama"
    assert told["model"]["digest"] in page.text("model")
    assert page.text("sessions") == str(told["sessions"]["open"])
    rows = page.read("[...document.querySelectorAll('#open tbody tr')].map((row) => row.innerText)")
    (row,) = (row for row in rows if shown_name(OPEN) in row)
    assert all(words in row for words in ("train", "1:1", "none"))
    requests = page.text("requests")
    assert f"backward\t{told['passes']['backward']['answered']}" in requests
    assert "of a budget of 4.0 GiB" in page.text("memory")


def test_it_asks_again_by_itself(page: Browser, watched: Watched) -> None:
    forwards = "document.querySelector('#requests tbody tr td:nth-child(2)').textContent"
    before = int(page.read(forwards))
    with wire(watched.server.address, watched.identity("alice"), "comes-later") as stream:
        stream.next()
        stream.call(1, pb.PASS_FORWARD, torch.ones(ROWS.tokens, WIDTH), rows=ROWS)
        stream.answer()
        page.until(f"Number({forwards}) === {before + 1}")
        page.until("document.getElementById('open').innerText.includes(" + repr(shown_name("comes-later")) + ")")
        page.until("document.getElementById('in-rate').textContent.endsWith('/s')")


@pytest.mark.parametrize("dark", [False, True])
def test_it_fits_a_phone(page: Browser, watched: Watched, dark: bool) -> None:
    page.open(watched.status.url + "/", PHONE, dark=dark)
    page.until("document.getElementById('state').textContent === 'serving'")
    assert page.read("innerWidth") == PHONE
    assert page.read("document.documentElement.scrollWidth") == PHONE
    assert page.read(TOO_WIDE) == []
    paper = page.read("getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)")
    assert (max(paper) < 80) == dark


def test_it_breaks_no_policy_of_its_own_and_asks_nobody_else(page: Browser, watched: Watched) -> None:
    assert page.complaints == []
    asked = page.read("performance.getEntriesByType('resource').map((each) => each.name)")
    assert set(asked) == {watched.status.url + "/status.json"}


def test_it_shows_neither_text_nor_whole_names(page: Browser) -> None:
    shown = page.read("document.documentElement.outerHTML")
    assert CANARY not in shown
    assert OPEN not in shown
    assert "alice" not in shown


def test_stages_in_processes_of_their_own_have_a_table(page: Browser) -> None:
    assert page.read("document.getElementById('stages').checkVisibility()") is False
    stage = "{...before.load, place: 1, weight_bytes: 3 * 1024 ** 2, waiting: 5}"
    page.read(f"show({{...before, load: {{...before.load, stages: [{stage}], restarts: 7, missing: 1}}}})")
    assert page.read("[...document.querySelectorAll('#stages td')].slice(0, 3).map((cell) => cell.innerText)") == [
        "Stage 2",
        "5",
        "3.0 MiB",
    ]
    assert "Stage restarts\n7; 1 do not answer" in page.text("node")


def test_while_the_model_is_loaded_it_says_so_and_shows_no_figures(page: Browser) -> None:
    page.read("show({ready: false, missing: 'loading the model', uptime_s: 3, versions: before.versions})")
    assert page.text("state") == "loading the model"
    assert page.read("document.querySelector('.grid').checkVisibility()") is False


def test_what_a_peer_names_is_shown_as_text(page: Browser) -> None:
    page.read("show({...before, model: {...before.model, name: '<img src=x onerror=alert(1)>'}})")
    assert page.text("name") == "<img src=x onerror=alert(1)>"
    assert page.read("document.images.length") == 0


def test_it_says_so_when_the_node_does_not_answer_any_more(
    browser: Browser, tiny_models: dict[str, Path], cache: Path
) -> None:
    with serving(tiny_models["llama"], "--cut", "1:1", "--status-port", "0", cache=cache) as server:
        browser.open(StatusPort.of(server).url + "/", DESKTOP)
        browser.until("document.getElementById('state').textContent === 'serving'")
        assert browser.read("document.getElementById('lost').hidden")
        server.process.send_signal(signal.SIGKILL)
        server.process.wait(10)
        browser.until("document.getElementById('state').textContent === 'no answer'")
    assert "has not answered since" in browser.text("lost")
    assert browser.text("name") == "tiny-llama"


def test_without_a_browser_these_tests_fail_and_say_what_to_install(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(AssertionError, match="install chromium"), browsing(tmp_path):
        pass
