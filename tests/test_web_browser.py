"""The annotation page in a real browser: episodes by keyboard and by mouse, reloads, a phone, a screen reader."""

from __future__ import annotations

import os
import shutil
import time
from dataclasses import replace
from pathlib import Path

import pytest
from people import Held, Playing, oracle, samples

from prefenv.feedback import FeedbackStore, Retraction
from prefenv.play import PlayConfig

pytest.importorskip("selenium", reason="selenium drives the browser")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
DRIVER = shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(
    not (CHROMIUM and DRIVER),
    reason="no chromium and chromedriver: apt-get install chromium-driver",
)
OPTIONS = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--window-size=1150,800",
)  # fmt: skip
SHOTS = os.environ.get("PREFENV_SHOTS")  # a folder to put pictures of the page into
CONFIG = PlayConfig(
    agent="learned-reward:pool=256,anchors=16,growth=1,updates=40", seed=100, steps=8, device="cpu"
)


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for option in (*OPTIONS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(option)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(DRIVER))
    yield driver
    driver.quit()


class Page:
    """The page as a person uses it."""

    def __init__(self, driver, link):
        self.driver = driver
        driver.get("about:blank")
        driver.get(link)

    def find(self, css):
        return self.driver.find_element("css selector", css)

    def cards(self):
        return self.driver.find_elements("css selector", "#cards button")

    def text(self, css):
        return self.find(css).text

    def pressed(self):
        return [c.get_attribute("aria-pressed") == "true" for c in self.cards()]

    def press(self, *keys):
        for key in keys:
            self.driver.switch_to.active_element.send_keys(key)

    def until(self, true, what):
        end = time.monotonic() + 90
        while not true():
            assert time.monotonic() < end, f"{what}; the page says {self.text('main')!r}"
            time.sleep(0.05)

    def said(self, text):
        self.until(lambda: self.text("#said").startswith(text), f"never said {text!r}")

    def asked(self, text="Which of these"):
        self.until(lambda: self.text("#title").startswith(text), f"never asked {text!r}")

    def name(self, name):
        self.until(lambda: self.find("#given").is_displayed(), "asks for a name")
        self.press(name, "\ue007")

    def shot(self, name):
        if SHOTS:
            time.sleep(2.5)  # for the board
            self.driver.save_screenshot(str(Path(SHOTS) / f"{name}.png"))

    def log(self):
        """What went wrong in the page: errors of scripts, and what its policy forbade."""
        lines = [line["message"] for line in self.driver.get_log("browser")]
        # A closing server cuts connections, and tells a look at its state that was cut short so: 400.
        cut = (
            "favicon",
            "ERR_CONNECTION",
            "/api/state - Failed to load resource: the server responded with a",
        )
        return [line for line in lines if not any(words in line for words in cut)]


@pytest.fixture
def episode(tmp_path, monkeypatch):
    """Starts an episode of so many rounds in a thread; returns its link and where its summary comes."""
    monkeypatch.setattr("oracles.web.play.LINGER", 3.0)
    started = []

    def start(rounds, config=CONFIG, **settings):
        playing = Playing(config, tmp_path, rounds=rounds, **settings)
        started.append(playing)
        return playing.link, playing.thread, playing.result

    yield start
    for playing in started:
        playing.thread.join(60)


def shown(folder):
    """The answers that stand, as places from 1 in the order shown."""
    with FeedbackStore(folder / "feedback.sqlite", readonly=True) as store:
        return [[i + 1 for i, s in enumerate(j.scores) if s] if None not in j.scores else "skip"
                for j in store.judgements()]  # fmt: skip


def test_an_episode_by_keyboard_alone(chromium, episode, tmp_path):
    link, thread, result = episode(5)
    page = Page(chromium, link)
    page.shot("welcome")
    page.name("ann")
    page.asked()
    page.press("2", "3", "2")
    assert page.pressed() == [False, False, True, False]
    page.shot("question")
    page.press("\ue007")
    page.said("Kept: 3.")
    page.asked()
    page.press("\ue007")
    page.said("Choose one first")
    page.press(
        "1", "\ue012", "\ue014", "\ue014", " "
    )  # arrows: left at the edge, right, right; space
    assert page.pressed() == [True, False, True, False]
    page.press("\ue007")
    page.said("Kept: 1, 3.")
    page.asked()
    page.press("0")
    page.said("Kept: none.")
    page.press("u")
    page.said("Taken back.")
    page.asked()
    page.press("s")
    page.said("Kept: skip.")
    page.asked()
    page.press("t")
    page.said("Kept: tie.")
    page.asked()
    page.press("4", "\ue007")
    page.asked("All done")
    page.shot("done")
    assert page.log() == []
    thread.join(60)
    assert shown(tmp_path) == [[3], [1, 3], "skip", [1, 2, 3, 4], [4]]
    (summary,) = result
    assert (summary["answers"], summary["undone"], summary["annotators"]) == (5, 1, ["ann"])
    assert summary["rounds"] == 5 and summary["rates_before"].keys() == {"roll", "s-curve"}


def test_an_episode_by_mouse(chromium, episode, tmp_path):
    link, thread, _ = episode(4, panels=2)
    page = Page(chromium, link)
    page.name("bo")
    page.find("#rename").click()
    page.name("bob")
    page.asked()
    for card in (0, 3, 0):
        page.cards()[card].click()
    assert page.pressed() == [False, False, False, True]
    page.find("#submit").click()
    page.said("Kept: 4.")
    for button, told in (("none", "none"), ("tie", "tie"), ("skip", "skip")):
        page.asked()
        page.find(f"#{button}").click()
        page.said(f"Kept: {told}.")
    page.find("#undo").click()
    page.said("Taken back.")
    page.asked()
    page.cards()[1].click()
    page.find("#submit").click()
    page.said("Kept: 2.")
    for _ in range(4):
        page.asked()
        count = page.text("#facts")
        page.cards()[0].click()
        page.find("#submit").click()
        page.until(lambda before=count: page.text("#facts") != before, "counts it")
    page.asked("All done")
    assert page.log() == []
    thread.join(60)
    assert shown(tmp_path)[:4] == [[4], [], [1, 2, 3, 4], [2]]
    with FeedbackStore(tmp_path / "feedback.sqlite", readonly=True) as store:
        assert {j.annotator for j in store.judgements()} == {"bob"} and len(store.judgements()) == 8
        assert all(0 < j.seconds < 60 for j in store.judgements())
        assert sum(isinstance(e, Retraction) for e in store.history()) == 1


def test_a_person_answers_while_the_model_learns(chromium, episode, tmp_path):
    Held.hold()
    agent = CONFIG.agent.replace("learned-reward", "people:HeldReward")
    link, thread, result = episode(3, replace(CONFIG, agent=agent))
    try:
        page = Page(chromium, link)
        page.name("ann")
        page.asked()
        page.press("1", "\ue007")
        page.said("Kept: 1.")
        assert Held.began.wait(60)
        page.asked()
        page.until(lambda: "0, learning" in page.text("#facts"), "says that it learns")
        page.shot("learning")
        page.press("2", "\ue007")
        page.said("Kept: 2.")
        page.asked("Learning; the next questions come in a moment")
        page.shot("moment")
        page.press("u")
        page.said("Taken back.")
        page.asked()
        page.press("3", "\ue007")
        page.said("Kept: 3.")
        assert not Held.may.is_set(), "the first round is still being learned from"
    finally:
        Held.may.set()
    page.asked()
    page.until(lambda: "learning" not in page.text("#facts"), "has learned")
    page.shot("learned")
    page.press("4", "\ue007")
    page.asked("All done")
    assert page.log() == []
    thread.join(60)
    assert shown(tmp_path) == [[1], [3], [4]] and result[0]["rounds"] == 3


def test_reload_and_restart_go_on_where_they_were(chromium, tmp_path):
    web = oracle(tmp_path)
    web.session.questions.put(web.session.store.ask(panels := samples(3)))
    page = Page(chromium, web.start())
    page.name("eve")
    page.asked()
    picture = "return document.querySelector('#cards canvas').toDataURL()"
    before = chromium.execute_script(picture)
    chromium.refresh()
    page.asked()
    assert chromium.execute_script(picture) == before, "the same question, in the same order"
    port, question = web.session.server.port, web.session.questions.next("eve")
    web.close()
    page.press("1", "\ue007")
    page.said("The server is away. Your answer is kept here")
    web = oracle(tmp_path, port=port)
    web.session.questions.put(web.session.store.ask(panels))
    page.said("Kept: 1.")
    (kept,) = web.session.store.judgements()
    assert kept.id == question.id and kept.scores == (1, 0)
    page.asked()
    web.close()
    page.press("2", "\ue007")
    page.said("The server is away. Your answer is kept here")
    chromium.get("about:blank")  # the page is closed before it could send
    web = oracle(tmp_path, port=port)
    web.session.questions.put(web.session.store.ask(panels))
    page = Page(chromium, web.start())
    page.said("Kept: 2.")
    assert [j.scores for j in web.session.store.judgements()] == [(1, 0), (0, 1)]
    web.close()


def test_a_phone_and_a_screen_reader(chromium, tmp_path):
    web = oracle(tmp_path)
    web.session.questions.put(web.session.store.ask(samples(2, 4)))
    size = {"width": 360, "height": 740, "deviceScaleFactor": 1, "mobile": True}
    chromium.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    try:
        page = Page(chromium, web.start())
        page.name("zoe")
        page.asked()
        page.cards()[1].click()
        page.shot("phone")
        wide = chromium.execute_script("return document.documentElement.scrollWidth")
        assert wide <= 360, "nothing to scroll sideways"
        boxes = [
            b.rect for b in chromium.find_elements("css selector", "#cards button, #keys button")
        ]
        assert all(b["height"] >= 40 and b["width"] >= 60 for b in boxes), "a thumb hits them"
        assert boxes[0]["y"] == boxes[1]["y"] and boxes[2]["y"] > boxes[1]["y"], "two by two"
    finally:
        chromium.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    assert [c.accessible_name for c in page.cards()] == [f"Sample {i} of 4" for i in (1, 2, 3, 4)]
    keys = {b: page.find(f"#{b}") for b in ("submit", "none", "tie", "skip", "undo")}
    assert {b: e.text.split()[-1] for b, e in keys.items()} == {
        "submit": "Enter", "none": "0", "tie": "t", "skip": "s", "undo": "u"
    }  # fmt: skip
    assert page.find("#said").aria_role == "status" and page.find("#a").aria_role in (
        "img",
        "image",
    )
    assert page.find("#cards").accessible_name == page.text("#title")
    assert page.find("html").get_attribute("lang") == "en"
    page = Page(chromium, web.start().split("#")[0] + "#wrong")
    page.said("This link has no valid token")
    web.close()
