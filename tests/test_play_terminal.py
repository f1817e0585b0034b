"""The terminal episode: through a pipe, through a pseudo-terminal, and killed fifty times."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from oracles.terminal import Terminal
from prefenv.checkpoints import save_checkpoint
from prefenv.cli import main
from prefenv.feedback import FeedbackStore
from prefenv.flow import RectifiedFlow
from prefenv.play import Episode, PlayConfig
from prefenv.play.canvas import Page, ascii_dots, sheet
from prefenv.registry import make_task
from prefenv.testing.probe import Probe, probe_env

PROBE = "prefenv.testing.probe:Probe"
AGENT = "hil-dd:lr=1e-3,data_batch=16"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("probe") / "probe.safetensors"
    torch.manual_seed(0)
    save_checkpoint(path, RectifiedFlow(Probe().network()), Probe(), {})
    return path


def config(checkpoint, **settings):
    return PlayConfig(
        **{"agent": AGENT, "task": PROBE, "steps": 8, "device": "cpu", **settings},
        checkpoint=str(checkpoint),
    )


def arguments(checkpoint, out):
    options = {"--agent": AGENT, "--task": PROBE, "--steps": "8", "--device": "cpu"}
    options |= {"--checkpoint": str(checkpoint), "--out": str(out)}
    return ["play", *[word for pair in options.items() for word in pair]]


def typed(checkpoint, folder, lines):
    """The transcript of an episode, and its summary."""
    out = io.StringIO()
    with Episode(config(checkpoint), folder) as episode:
        summary = Terminal.play(episode, source=io.StringIO(lines), out=out)
    return out.getvalue(), summary


# Drawing


def test_a_sheet_fits_its_width_and_shows_every_point():
    task = make_task("shapes")
    x, _ = task.data(6, torch.Generator().manual_seed(0))
    for width in (20, 40, 79, 80, 200):
        lines = sheet(task, x, "012345", width)
        assert max(map(len, lines)) <= width
        assert all(label in "".join(lines) for label in "012345")
    dots = sum(
        (ord(c) - 0x2800).bit_count() for c in "".join(sheet(task, x[:1], width=28)) if c != " "
    )
    assert 48 <= dots <= 64, "64 points, a few of them in one dot"
    assert ascii_dots("⠁⠂⠄⡀⠈⠐⠠⢀⠅⣿ a") == "''..''..:: a"
    plain = "\n".join(sheet(task, x[:1], width=28, braille=False))
    assert plain.isascii() and set(plain) <= set(" .':\n")
    ink = [[c != " " for c in line] for line in sheet(task, x[:1], width=28)]
    assert ink == [[c != " " for c in line] for line in plain.split("\n")]


@pytest.mark.parametrize(
    ("encoding", "tty", "environ", "colors", "braille"),
    [
        ("utf-8", True, {}, True, True),
        ("utf-8", True, {"NO_COLOR": "1"}, False, True),
        ("utf-8", True, {"TERM": "dumb"}, False, True),
        ("utf-8", False, {}, False, True),
        ("ascii", True, {}, True, False),
        ("latin-1", False, {}, False, False),
    ],
)
def test_the_page_suits_the_terminal(encoding, tty, environ, colors, braille):
    raw = io.BytesIO()
    out = io.TextIOWrapper(raw, encoding=encoding)
    out.isatty = lambda: tty
    page = Page.of(out, environ)
    assert (page.colors, page.braille) == (colors, braille)
    task = make_task("shapes")
    page.draw(task, task.data(2, torch.Generator())[0], "red", ["0", "1"])
    assert (b"\x1b[31m" in raw.getvalue()) == colors


# Through a pipe


def test_the_order_is_the_toys(checkpoint, tmp_path):
    text, summary = typed(checkpoint, tmp_path, "0 3\n\n")
    order = [
        "The input is no terminal: answers are read from it, one a line.",
        "6 samples of model A",
        "Question 1: which of these 4 do you like? (proposals of model A)",
        "Kept: answer 1.",
        "Model B learns",
        "Model B from the same noises",
        "6 new samples of model B",
        "Question 2: which of these 4",
        "Kept: answer 2, none will do. Model B stays as it is.",
        "Question 3: which of these 4",
        "All answers are kept",
        "2 answers (1 choice, 1 none will do, 0 skipped; 0 taken back)",
        "model A  model B",
    ]
    places = [text.find(words) for words in order]
    assert -1 not in places and places == sorted(places)
    after = text[places[8] : places[9]]
    assert "noises" not in after, "none: no update, no picture"
    assert summary["answers"] == 2


def test_every_bad_token_is_one_line_and_the_question_again(checkpoint, tmp_path):
    text, summary = typed(checkpoint, tmp_path, "7\nfoo\n0 0\np\np 2\n\x00\n?\nu\n1\nu\nq\n0\n")
    assert text.count("Allowed: numbers 0 to 3") == 6
    assert text.count("Type numbers 0 to 3") == 1
    assert "There is nothing to take back." in text
    assert "Taken back: 1. The question again." in text
    assert text.count("Question 1:") == 3 and text.count("Question 2:") == 1
    assert summary["answers"] == 0 and summary["undone"] == 1, (
        "q ends it: the last line is not read"
    )


def test_undo_names_what_it_takes_back(checkpoint, tmp_path):
    text, _ = typed(checkpoint, tmp_path, "\nu\ns\nu\np .5 1\nu\n")
    for what in ("none will do", "skipped", "p 0.5 1.0 0.0 0.0"):
        assert f"Taken back: {what}. The question again." in text


def test_it_goes_on_in_the_same_folder(checkpoint, tmp_path):
    typed(checkpoint, tmp_path, "1\n2\n")
    text, summary = typed(checkpoint, tmp_path, "u\n")
    assert "Going on after 2 answers; u takes the last one back." in text
    assert text.index("Question 3:") < text.index("Taken back: 2.") < text.rindex("Question 2:")
    assert summary["answers"] == 1


def test_bytes_that_are_no_text_are_a_bad_token(checkpoint, tmp_path):
    source = io.TextIOWrapper(io.BytesIO(b"\xff\xfe\n1\n"), encoding="utf-8")
    out = io.StringIO()
    with Episode(config(checkpoint), tmp_path) as episode:
        Terminal.play(episode, source=source, out=out)
    assert "cannot read '\\ufffd'" in out.getvalue()


def test_a_closed_input_ends_it(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stdin", None)
    assert main(arguments(checkpoint, tmp_path)) == 0
    assert json.loads((tmp_path / "summary.json").read_text())["answers"] == 0


def test_json_is_all_that_is_printed(checkpoint, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("0\n"))
    assert main([*arguments(checkpoint, tmp_path), "--json"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["answers"] == 1 and out.count("\n") == 1
    assert "Question 1" in err


def test_the_default_folder_is_one_for_each_episode(checkpoint, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    argv = [a for a in arguments(checkpoint, "") if a not in ("--out", "")]
    for seed in ("0", "0", "1"):
        monkeypatch.setattr(sys, "stdin", io.StringIO("0\n"))
        assert main([*argv, "--seed", seed]) == 0
    assert "Going on after 1 answer;" in capsys.readouterr().out
    folders = sorted(p.name for p in Path("runs").iterdir())
    assert len(folders) == 2 and all(f.startswith("play-hil-dd-Probe-s") for f in folders)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["play", "--oracle", "s-curve"], ["no person's", "terminal"]),
        (["play", "--oracle", "nobody"], ["unknown oracle"]),
        (["play", "--agent", "nobody"], ["unknown agent"]),
        (["play", "--panel-size", "0"], ["at least one"]),
        (
            ["play", "--agent", "hil-dd", "--oracle", "terminal:size=3"],
            ["terminal:size=3", "'size'"],
        ),
        (["play", "--agent", "adjoint"], ["gradient"]),
    ],
)
def test_a_mistake_is_one_line(argv, words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(argv) == 2
    out, err = capsys.readouterr()
    assert "Question" not in out and err.startswith("prefenv: ") and err.count("\n") == 1
    assert all(word in err for word in words)


# As the oracle of any run


def test_a_run_asks_what_is_not_in_the_file(tmp_path):
    out = io.StringIO()
    env, _ = probe_env(num_envs=8)
    x = torch.randn(8, 2, generator=torch.Generator().manual_seed(0))
    path = str(tmp_path / "f.sqlite")
    person = Terminal(env.task, path, source=io.StringIO("0\nu\ns\n"), out=out)
    got = person.judge(x.view(2, 4, 2))
    assert got[0].tolist() == [1, 0, 0, 0] and bool(got[1].isnan().all())
    assert "there is no undo" in out.getvalue()
    again = Terminal(env.task, path, source=io.StringIO("1 2\n"), out=io.StringIO())
    more = torch.cat([x, x + 1]).view(4, 4, 2)
    assert again.judge(more[:2])[0].tolist() == [1, 0, 0, 0], "not asked again"
    with pytest.raises(KeyboardInterrupt):
        again.judge(more)
    with FeedbackStore(path) as store:
        assert len(store.judgements()) == 3, "the one that was answered is kept"


# Through a pseudo-terminal


def test_a_person_at_a_terminal(checkpoint, tmp_path):
    pexpect = pytest.importorskip(
        "pexpect", reason="pip install pexpect plays a person at a terminal"
    )
    environ = {**os.environ, "TERM": "xterm", "COLUMNS": "80", "OMP_NUM_THREADS": "1"}
    environ.pop("NO_COLOR", None)
    command = ["-m", "prefenv.cli", *arguments(checkpoint, tmp_path)]
    child = pexpect.spawn(
        sys.executable, command, env=environ, encoding="utf-8", timeout=120, dimensions=(24, 80)
    )
    prompt = "\\? = help > "
    child.expect("6 samples of model A")
    child.expect(prompt)
    assert "\x1b[31m" in child.before, "red"
    child.sendline("maybe")
    child.expect("cannot read 'maybe'. Allowed: numbers 0 to 3")
    child.expect(prompt)
    child.sendline("0 3")
    child.expect("Kept: answer 1.")
    child.expect("Model B from the same noises")
    child.expect(prompt)
    assert "\x1b[32m" in child.before, "green"
    child.sendline("s")
    child.expect("Kept: answer 2, skipped.")
    child.expect(prompt)
    child.sendline("u")
    child.expect("Taken back: skipped.")
    child.expect(prompt)
    child.sendintr()
    child.expect("All answers are kept")
    child.expect("1 answer \\(1 choice")
    child.expect(pexpect.EOF)
    child.close()
    assert child.exitstatus == 0
    with FeedbackStore(tmp_path / "feedback.sqlite", readonly=True) as store:
        assert [j.scores for j in store.judgements()] == [(1, 0, 0, 1)]
        assert store.judgements()[0].seconds > 0
        assert len(store.history()) == 3


# Kill -9

# Plays the terminal episode in a pseudo-terminal, answering at random, while two processes keep the cores busy,
# and kills it at a random moment; fifty times, in one folder. What was acknowledged on the screen is compared with
# the file after every kill.
_KILLS = """
import json, os, pty, random, re, select, signal, sys, time
import torch
import torch._dynamo  # the first optimiser imports it, for seconds: once here, not after every fork
torch.set_num_threads(1)
from pathlib import Path
from oracles.terminal import Terminal
from prefenv.feedback import FeedbackStore
from prefenv.play import Episode, PlayConfig

folder, config = Path(sys.argv[1]), PlayConfig(**json.loads(sys.argv[2]))
rng = random.Random(int(sys.argv[3]))
burners = []
for _ in range(2):
    if (pid := os.fork()) == 0:
        while os.getppid() != 1:
            sum(range(10**5))
        os._exit(0)
    burners.append(pid)

def episode():
    with Episode(config, folder) as e:
        Terminal.play(e)

def answers():
    if not (folder / "feedback.sqlite").exists():
        return []
    try:
        with FeedbackStore(folder / "feedback.sqlite") as store:
            return [j.scores for j in store.judgements()]
    except Exception as error:
        sys.exit(f"the file cannot be read: {error}")

told = undone = 0
screen = re.compile(r"= help > |Kept: answer (\\d+)|Taken back")
try:
    for kill in range(50):
        pid, master = pty.fork()
        if pid == 0:
            episode()
            os._exit(0)
        known, sent, seen, dead = answers(), None, "", None
        stop = None  # set at the first output, or at a random moment of the start
        limit = time.monotonic() + (rng.uniform(0.0, 1.0) if kill % 5 == 0 else 60)
        while True:
            left = (stop or limit) - time.monotonic()
            if left <= 0 and dead is None:
                os.kill(pid, signal.SIGKILL)
                dead = True
            ready = dead or select.select([master], [], [], max(left, 0))[0]
            if not ready:
                continue
            try:
                data = os.read(master, 65536)
            except OSError:  # the other side is gone and all that it said is read
                break
            seen += data.decode(errors="replace")
            if stop is None:
                stop = time.monotonic() + rng.uniform(0.0, 1.2)
            while match := screen.search(seen):
                seen = seen[match.end():]
                if match[0].startswith("Kept"):
                    known = [*known, sent]
                    told += 1
                    if int(match[1]) != len(known):
                        sys.exit(f"answer {match[1]} acknowledged, {len(known)} expected")
                    sent = None
                elif match[0] == "Taken back":
                    known, sent = known[:-1], None
                    undone += 1
                elif not dead:
                    line = "u" if known and rng.random() < 0.2 else str(rng.randrange(4))
                    sent = "u" if line == "u" else tuple(float(i == int(line)) for i in range(4))
                    os.write(master, f"{line}\\n".encode())
        os.close(master)
        assert os.WTERMSIG(os.waitpid(pid, 0)[1]) == signal.SIGKILL
        kept = answers()
        under_way = [known]
        if sent == "u":
            under_way.append(known[:-1])
        elif sent is not None:
            under_way.append([*known, sent])
        if kept not in under_way:
            sys.exit(f"kill {kill}: {kept} is kept, {under_way} was acknowledged or under way")
        if len(kept) > 12:
            with FeedbackStore(folder / "feedback.sqlite") as store:
                while store.undo("person"):
                    pass
finally:
    for pid in burners:
        os.kill(pid, signal.SIGKILL)
print(told, undone)
"""


@pytest.mark.slow
def test_no_acknowledged_answer_is_lost_by_kill_9(checkpoint, tmp_path):
    settings = {"agent": AGENT, "task": PROBE, "steps": 8, "device": "cpu"}
    settings["checkpoint"] = str(checkpoint)
    done = subprocess.run(
        [sys.executable, "-c", _KILLS, str(tmp_path / "run"), json.dumps(settings), "0"],
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    told, undone = map(int, done.stdout.split())
    assert told > 50 and undone > 5, "there was something to lose"
    # What is left can be played on, and is what its answers say.
    with Episode(PlayConfig(**settings), tmp_path / "run") as episode:
        standing = episode.store.judgements("person")
        assert [j.id for j in episode.course.learned] == [j.id for j in standing]
        assert episode.store._one("PRAGMA integrity_check")[0] == "ok"
        assert episode.answer((1.0, 0.0, 0.0, 0.0)).taught
