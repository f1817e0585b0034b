"""The two-step way: samples with all that agents need, answers given elsewhere, agents that learn from them."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
import torch
from probes import probe_agent

from agents.d3po import D3PO
from agents.hil_dd import HilDD
from prefenv.cli import main
from prefenv.errors import ConfigError, FeedbackError
from prefenv.feedback import FeedbackStore, Judgement, model_hash
from prefenv.feedback.files import Feedback, dump, read_feedback, write_jsonl
from prefenv.offline import make_samples, need_offline, origin, rounds, study
from prefenv.packing import pack, unpack
from prefenv.registry import AGENTS, make_agent
from prefenv.rollout import collect
from prefenv.runs import RunConfig
from prefenv.testing.probe import right

OFFLINE = {"hil-dd", "pfm", "d3po", "flow-dpo", "dspo", "kto", "mapo", "rwr", "best-of-n", "rft"}


def agent_of(name: str, **settings):
    return probe_agent(name, num_envs=32, **settings)


def answer(store: FeedbackStore) -> None:
    """What the probe's oracle says to every waiting question."""
    for panel in store.waiting("script"):
        x = torch.stack([torch.from_numpy(store.sample(s).x.copy()) for s in panel.samples])
        store.answer(Judgement(panel.samples, tuple(right(x).tolist()), "script"))


def samples_for(agent, path, count: int = 96) -> FeedbackStore:
    store = FeedbackStore(path)
    policy = agent.env.policy(agent.reference, agent.kernel())
    make_samples(store, policy, count, 4, seed=1, paths=agent.requires.log_prob, task="probe")
    answer(store)
    return store


# Samples


def test_samples_are_the_references_with_all_that_made_them(tmp_path):
    agent = agent_of("d3po")
    with samples_for(agent, tmp_path / "f.sqlite") as store:
        samples = store.samples()
        assert len(samples) == 96 and len(store.panels()) == 24
        frozen = agent.env.policy(agent.reference, agent.kernel())
        path = torch.stack([torch.from_numpy(s.path.copy()) for s in samples], 1)
        for i, sample in enumerate(samples):
            assert torch.equal(path[0, i], torch.from_numpy(sample.noise.copy()))
            assert torch.equal(path[-1, i], torch.from_numpy(sample.x.copy()))
            assert sample.model == model_hash(agent.reference) and sample.seed == 1
        for step in range(8):
            index = torch.full((96,), step)
            if frozen.std(step) == 0:
                mean, _ = frozen.act(path[step], step)
                torch.testing.assert_close(mean, path[step + 1])
                continue
            expected = frozen.log_prob(path[step], index, path[step + 1]).detach()
            told = torch.tensor([float(s.log_prob[step]) for s in samples])
            torch.testing.assert_close(told, expected, rtol=1e-4, atol=1e-2)
        before = dump(store)
        policy = agent.env.policy(agent.reference, agent.kernel())
        make_samples(store, policy, 96, 4, seed=1, paths=True)
        assert [s.id for s in store.samples()] == [s.id for s in before.samples], "nothing new"
        make_samples(store, policy, 4, 4, seed=2)
        assert len(store.samples()) == 100


def test_counts_that_do_not_fill_panels(tmp_path):
    agent = agent_of("flow-dpo")
    with (
        FeedbackStore(tmp_path / "f.sqlite") as store,
        pytest.raises(ConfigError, match="do not fill"),
    ):
        make_samples(store, agent.env.reference, 10, 4)


# Who may


def test_online_agents_are_refused():
    """Offline are those whose proposals are the reference's, as they are set, and D3PO."""
    names = {name: agent_of(name).offline for name in AGENTS}
    assert {n for n, offline in names.items() if offline} == OFFLINE
    for name, settings in (
        ("rft", {"iterate": True}),
        ("flow-dpo", {"proposals": "model"}),
        ("pfm", {"iterate": 1}),
        ("ppo", {}),
    ):
        with pytest.raises(ConfigError, match="is online: it must ask"):
            need_offline(agent_of(name, **settings))


# Learning


@pytest.mark.parametrize("name", sorted(OFFLINE))
def test_offline_agents_learn_from_a_file(name, tmp_path):
    agent = agent_of(name)
    with samples_for(agent, tmp_path / "f.sqlite") as store:
        write_jsonl(dump(store), tmp_path / "f.jsonl")
    given = rounds(read_feedback(tmp_path / "f.jsonl"), agent)
    assert [len(r.judgement) for r in given] == [32] * 3
    noise = torch.randn(8, 2)
    before = agent.sample(noise)
    study(agent, given)
    assert not torch.equal(before, agent.sample(noise)) and agent.rounds == 3
    assert (agent.env.ledger.queries, agent.env.ledger.panels) == (96, 24)
    assert study(agent, given).rounds == 3, "all is learned already"


@pytest.mark.parametrize("name", ["d3po", "flow-dpo", "hil-dd"])
def test_a_file_teaches_what_asking_teaches(name, tmp_path):
    """Rounds that an agent plays itself, put into a file and read back, leave it the same to the bit."""
    asking, reading, player = (agent_of(name) for _ in range(3))
    played = [collect(player.env, player.behaviour()) for _ in range(3)]
    with FeedbackStore(tmp_path / "f.sqlite") as store:
        for rollout in played:
            path = rollout.path.transpose(0, 1).unflatten(0, (-1, 4))
            store.ask(
                *(path[:, :, -1], path[:, :, 0], path, rollout.log_prob.T.unflatten(0, (-1, 4))),
                model=model_hash(asking.reference),
                info=origin(asking.env.policy(asking.reference, asking.kernel())),
            )
        answer(store)
        given = rounds(dump(store), reading)
    study(reading, given)
    for rollout, read in zip(played, given, strict=True):
        torch.testing.assert_close(rollout.judgement, read.judgement)
        asking.update(dataclasses.replace(rollout, judgement=read.judgement))
        asking.rounds += 1
    noise = torch.randn(8, 2)
    torch.testing.assert_close(asking.sample(noise), reading.sample(noise), rtol=0, atol=0)


def test_a_killed_study_goes_on_exactly(tmp_path):
    whole, first, second = (agent_of("flow-dpo") for _ in range(3))
    with samples_for(whole, tmp_path / "f.sqlite") as store:
        given = rounds(dump(store), whole)
    study(whole, given)
    study(first, given, callback=lambda agent, _: agent.rounds < 2)
    (tmp_path / "state").write_bytes(pack(first.state()))
    second.restore(unpack(tmp_path / "state"))
    assert second.rounds == 2
    study(second, given)
    for one, other in zip(whole.model.parameters(), second.model.parameters(), strict=True):
        assert torch.equal(one, other)


def test_answers_of_several_annotators_are_averaged_and_undone_ones_gone(tmp_path):
    agent = agent_of("flow-dpo")
    with samples_for(agent, tmp_path / "f.sqlite") as store:
        first = store.panels()[0]
        store.answer(Judgement(first.samples, (1.0, 0.0, None, 1.0), "ann"))
        store.answer(Judgement(first.samples, (0.0,) * 4, "bob"))
        store.undo("bob")
        script = next(j for j in store.judgements("script") if j.panel == first.id)
        (rollout, *_) = rounds(dump(store), agent)
    told = dict(zip(script.samples, script.scores, strict=True))
    expected = [
        (told[s] + v) / 2
        for s, v in zip(first.samples, (1, 0, told[first.samples[2]], 1), strict=True)
    ]
    torch.testing.assert_close(rollout.judgement[:4], torch.tensor(expected))


def test_what_does_not_fit_is_refused(tmp_path):
    plain = agent_of("flow-dpo")
    with samples_for(plain, tmp_path / "f.sqlite") as store:
        feedback = dump(store)
    with pytest.raises(FeedbackError, match="d3po learns from how .*prefenv sample --agent d3po"):
        rounds(feedback, agent_of("d3po"))
    rounds(feedback, agent_of("hil-dd"))
    strange = [dataclasses.replace(s, model="another") for s in feedback.samples]
    bare = [dataclasses.replace(s, noise=None) for s in feedback.samples]
    for samples in (strange, bare):
        with pytest.raises(FeedbackError, match="hil-dd learns from how"):
            rounds(Feedback(samples, feedback.panels, feedback.events), agent_of("hil-dd"))
        study(plain, rounds(Feedback(samples, feedback.panels, feedback.events), plain))
        plain = agent_of("flow-dpo")
    with pytest.raises(FeedbackError, match="was not made"):
        rounds(Feedback(strange, [], feedback.events), agent_of("d3po"))
    learner = agent_of("d3po")
    with samples_for(learner, tmp_path / "paths.sqlite") as store:
        paths = dump(store)
    assert len(rounds(paths, learner)) == 3
    paths.samples = [dataclasses.replace(s, info={**s.info, "steps": 9}) for s in paths.samples]
    with pytest.raises(FeedbackError, match="was not made by this reference in its way"):
        rounds(paths, learner)
    assert (HilDD.requires.noise, D3PO.requires.log_prob) == (True, True)
    with FeedbackStore(tmp_path / "g.sqlite") as store:
        (panel,) = store.ask(torch.zeros(1, 4, 3, 2))
        store.answer(Judgement(panel.samples, (1, 0, 0, 0)))
        with pytest.raises(FeedbackError, match=r"shape \(3, 2\), probe has \(2,\)"):
            rounds(dump(store), plain)


# The commands


def test_sample_label_align(tmp_path, capsys, monkeypatch):
    """From nothing to a run's summary; the answers come from a script here."""
    folder = tmp_path / "labels"
    command = ["sample", "--count", "64", "--out", str(folder), "--steps", "4"]
    assert main([*command, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"out": str(folder), "samples": 64, "panels": 16}
    with FeedbackStore(folder / "feedback.sqlite") as store:
        pictures = {p.stem for p in (folder / "pictures").iterdir()}
        assert pictures == {s.id for s in store.samples()}
        align = [
            "align",
            "--feedback",
            str(folder),
            "--steps",
            "4",
            "--rows",
            "64",
            "--out",
            str(tmp_path / "run"),
        ]
        assert main([*align, "--agent", "flow-dpo"]) == 2
        assert "has no answers" in capsys.readouterr().err
        for panel in store.waiting("script"):
            store.answer(Judgement(panel.samples, (1, 0, 0, None), "script"))
    assert main([*align, "--agent", "ppo"]) == 2
    assert "ppo is online" in capsys.readouterr().err
    monkeypatch.setattr("prefenv.runs._summary", lambda *_: {})
    monkeypatch.setattr(RunConfig, "judge", lambda self: None)
    monkeypatch.setattr("prefenv.runs.shapes_figure", lambda *_: _Figure())
    align[-1] = str(tmp_path / "offline")
    assert main([*align, "--agent", "flow-dpo", "--json"]) == 0
    record = json.loads((tmp_path / "offline" / "config.json").read_text())
    assert (record["queries"], record["panel_size"]) == (64, 4)
    lines = (tmp_path / "offline" / "metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[-1])["queries"] == 64 and math.isfinite(json.loads(lines[-1])["loss"])
    with FeedbackStore(folder / "feedback.sqlite") as store:
        panel = store.panels()[0]
        store.answer(Judgement(panel.samples, (0, 0, 1, 0), "script"))
    assert main([*align, "--agent", "flow-dpo"]) == 2, "other answers are another run"
    assert "holds another run" in capsys.readouterr().err
    assert main(["sample", "--count", "6", "--out", str(folder)]) == 2
    assert main(["sample", "--count", "8", "--out", str(folder), "--agent", "ppo"]) == 2


class _Figure:
    def savefig(self, path) -> None:
        path.write_bytes(b"")


@pytest.mark.cuda
def test_cuda_samples_and_rounds(tmp_path):
    config = RunConfig(agent="flow-dpo", queries=96, rows=32, steps=4, device="cuda")
    agent = make_agent("flow-dpo", config.make_env())
    with FeedbackStore(tmp_path / "f.sqlite") as store:
        policy = agent.env.policy(agent.reference, agent.kernel())
        make_samples(store, policy, 96, 4, paths=True)
        for panel in store.panels():
            store.answer(Judgement(panel.samples, (1, 0, 0, None)))
        given = rounds(dump(store), agent)
    assert given[0].path.is_cuda
    assert study(agent, given).rounds == 3
