"""The report says what the rows say: scores, figures, page, README."""

from __future__ import annotations

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from bench_rows import VARIANTS, experiments, failed, frontier, row, rows
from scipy import stats

from benchmarks import agents_page, report, report_curves, report_figures, report_rows, report_style
from benchmarks import report_tables as tables
from benchmarks.report_html import inline, page
from benchmarks.report_sections import figure
from benchmarks.statistics import Estimate
from prefenv import plotting
from prefenv.cli import main
from prefenv.errors import RunError

ROOT = Path(__file__).resolve().parents[1]
AGENTS, NAMES = ("ppo", "adjoint", "best-of-n", "mapo"), ("basic", "pairs", "noisy", "proxy")
FEW = rows(AGENTS, NAMES, seeds=8)
DARK = "#14171c"


@pytest.fixture(scope="module")
def found():
    return report_rows.bench(FEW, experiments(NAMES))


def scores(rows, agent, experiment, variant=""):
    """By hand, whole runs of four: the middle two."""
    mine = [
        r
        for r in rows
        if (r["agent"], r["experiment"], r["variant"]) == (agent, experiment, variant)
    ]
    return [min(max(r.get("score", 0.0), 0.0), 1.0) for r in mine]


# Rows


def test_rows_are_read_and_the_later_of_two_counts(tmp_path):
    again = {**FEW[0], "score": 0.123}
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(r) + "\n" for r in [*FEW, again]))
    got = report_rows.read(tmp_path)
    assert len(got) == len(FEW) and got[0]["score"] == 0.123 and got[1:] == FEW[1:]


def test_what_is_no_row_is_refused(tmp_path):
    with pytest.raises(RunError, match="no results"):
        report_rows.read(tmp_path)
    for text in (b"{", b"[1]", b'{"agent": "ppo"}', b'"\xff"'):
        (tmp_path / "a.jsonl").write_bytes(json.dumps(FEW[0]).encode() + b"\n" + text + b"\n")
        with pytest.raises(RunError, match=r"a.jsonl, line 2: .*not the row"):
            report_rows.read(tmp_path)


def test_order_is_the_experiments_own_and_unknown_ones_come_last():
    extra = [{**r, "experiment": "another"} for r in FEW if r["experiment"] == "basic"]
    got = report_rows.bench([*extra, *reversed(FEW)], experiments())
    assert list(got.variants) == [*NAMES, "another"]
    assert got.variants["noisy"] == VARIANTS["noisy"] and got.variants["basic"] == ("",)
    assert got.questions["pairs"] == "What does pairs ask?" and not got.questions["another"]


def test_runs_count_what_they_should():
    rng = np.random.default_rng(0)
    assert report_rows.run_score(row("basic", "", "ppo", 0, 1.3, rng)) == 1
    assert report_rows.run_score(row("basic", "", "ppo", 0, -2.0, rng)) == 0
    assert report_rows.run_score(row("basic", "", "ppo", 0, 0.5, rng)) == 0.5
    for why in ({"error": "NonFiniteError: loss"}, {"refused": "no"}):
        assert report_rows.run_score(failed("basic", "", "ppo", 0, **why)) == 0
    nothing = row("basic", "", "ppo", 0, math.nan, rng)
    assert report_rows.run_score(nothing) == 0 and not report_rows.finished(nothing)
    assert report_rows.trouble(nothing) == "the score is nan"


def test_scores_are_the_interquartile_means(found):
    for agent in AGENTS:
        both = [stats.trim_mean(scores(FEW, agent, "noisy", v), 0.25) for v in VARIANTS["noisy"]]
        assert found.scores[agent, "noisy"].value == pytest.approx(np.mean(both))
        basic = stats.trim_mean(scores(FEW, agent, "basic"), 0.25)
        assert found.scores[agent, "basic"].value == pytest.approx(basic)
        # Experiments alike: the runs of the one with two variants count half.
        every = [2 * scores(FEW, agent, n) for n in ("basic", "pairs", "proxy")]
        every += [scores(FEW, agent, "noisy", v) for v in VARIANTS["noisy"]]
        want = stats.trim_mean(np.concatenate(every), 0.25)
        assert found.overall[agent].value == pytest.approx(want)
        assert found.overall[agent].low < want < found.overall[agent].high
    order = [found.overall[a].value for a in found.agents]
    assert order == sorted(order, reverse=True)


def test_a_refusal_counts_nothing_with_certainty(found):
    got = found.scores["adjoint", "pairs"]
    assert (got.value, got.low, got.high) == (0, 0, 0)
    assert found.refused("adjoint", "pairs") and not found.refused("ppo", "pairs")
    single = [r for r in FEW if "refused" not in r or r["seed"] == 0]
    alone = report_rows.bench(single, experiments(NAMES))
    assert alone.overall["adjoint"].low == pytest.approx(found.overall["adjoint"].low, abs=0.03)
    assert alone.overall["adjoint"].value == pytest.approx(found.overall["adjoint"].value)


def test_an_agent_that_lacks_runs_has_no_score_over_all():
    some = [r for r in FEW if (r["agent"], r["variant"]) != ("ppo", "0.3") and r["agent"] != "mapo"]
    got = report_rows.bench(some, experiments(NAMES))
    assert (
        got.agents[-1] == "ppo"
        and "ppo" not in got.complete
        and math.isnan(got.overall["ppo"].value)
    )
    assert math.isnan(got.scores["ppo", "noisy"].value)
    assert math.isfinite(got.scores["ppo", "basic"].value)
    assert tables.missing_table(got).rows == [["`ppo`", "noisy 0.3"]]
    line = next(r for r in tables.score_table(got).rows if r[0] == "`ppo`")
    assert line[1] == line[4] == "" and line[2]
    assert "Not finished" in [s.title for s in report.appendix(got)]
    assert len(report_figures.profiles(got).axes) == 2 and len(report_figures.radar(got).axes) == 4


def test_a_benchmark_that_has_only_begun_has_a_report():
    """One seed, one agent, an experiment where all failed, no frontier: less is shown, nothing breaks."""
    begun = rows(("ppo",), ("basic", "noisy"), seeds=1)
    begun += [failed("thin", "", "ppo", 0, error="NonFiniteError: loss")]
    got = report_rows.bench(begun, experiments())
    titles = [
        s.title for s in [*report.overview(got), *report.details(got, {}), *report.appendix(got)]
    ]
    assert "Probability of improvement" not in titles and "Score against variant" in titles
    lines = {r[0]: r for r in tables.score_table(got).rows}
    assert lines["`ppo`"][4] == "0.00 †" and "[" not in lines["`ppo`"][2]
    nothing = report_rows.bench([failed("thin", "", "ppo", 0, error="Error: no")], experiments())
    assert report.details(nothing, {"thin": frontier()})


def test_learning_curves_join_the_points_of_every_run():
    def run(seed, curve, budget=100):
        made = row("basic", "", "ppo", seed, 0.5, np.random.default_rng(0), budget)
        return {**made, "curve": [[*p, 0.0, None] for p in curve]}

    few = [
        run(0, [(50, 1.0, 0.4), (100, 3.0, 2.0)]),
        run(1, [(100, 2.0, 0.6)]),
        run(2, [(9, 9.0, 9.0)], 9),
    ]
    queries, seconds, score = report_rows.learning(
        report_rows.bench(few, experiments(["basic"])), "ppo", "basic"
    )
    np.testing.assert_allclose(queries, [0, 50, 100])
    np.testing.assert_allclose(seconds, [0, 1, 2.5])
    np.testing.assert_allclose(score, [0, 0.35, 0.8], err_msg="the score is clipped to 1")


def test_runs_above_the_frontier_are_told():
    rng = np.random.default_rng(0)
    fine, above = (row("basic", "", "ppo", seed, 0.5, rng) for seed in (0, 1))
    above |= {"kl_nats": above["frontier_kl_nats"] - 0.2, "kl_stderr": 0.05}
    near = {**above, "seed": 2, "kl_stderr": 0.06}  # 0.1 of it are the integrator's
    got = report_rows.bench([fine, above, near], experiments(["basic"]))
    assert got.above_frontier == [above]
    assert [r[0] for r in tables.frontier_table(got).rows] == [f"`{above['name']}`"]


def test_no_kl_belongs_to_samples_of_another_law():
    """``coarse`` draws with few steps; the likelihood is the flow's."""
    made = rows(("ppo",), ("basic", "coarse"), seeds=1)
    made = [{**r, "kl_nats": 0.0, "kl_stderr": 0.0} for r in made]
    got = report_rows.bench(made, experiments(["basic", "coarse"]))
    assert {r["experiment"] for r in got.above_frontier} == {"basic"}
    drawn = report_curves.reward_against_kl(got, {n: frontier() for n in ("basic", "coarse")})
    assert [a.get_title() for a in drawn.axes] == ["basic"]


# Tables


def test_the_best_is_bold_where_its_interval_is_above_the_others():
    second, first = Estimate(0.5, 0.3, 0.51), Estimate(0.6, 0.52, 0.7)
    third = Estimate(0.4, 0.1, 0.55)  # the least of the values, not of the intervals
    assert tables.leader({"a": second, "b": first}) == "b"
    assert tables.leader({"a": second, "b": first, "c": third}) is None
    assert tables.leader({"a": second, "b": Estimate(0.6, 0.48, 0.7)}) is None
    assert tables.leader({"a": first, "b": first}) is None
    assert tables.leader({"b": first}) is None
    none = Estimate(0.6, math.nan, math.nan)
    assert tables.leader({"b": none, "a": second}) is None
    assert tables.leader({"b": first, "a": Estimate(0.1, math.nan, math.nan)}) is None


@pytest.mark.parametrize("seeds", [4, 5])
def test_fewer_than_five_seeds_single_nobody_out(seeds):
    made = rows(("ppo", "mapo"), ("basic",), seeds=seeds)
    made = [{**r, "score": 0.9 if r["agent"] == "ppo" else 0.1} for r in made]
    table = tables.score_table(report_rows.bench(made, experiments(["basic"])))
    assert ("**" in "".join(table.rows[0])) == (seeds == 5)


def test_the_score_table_says_what_the_scores_are(found):
    table = tables.score_table(found)
    assert table.head == ["agent", "all", *NAMES]
    assert [r[0] for r in table.rows] == [*(f"`{a}`" for a in found.agents), "optimum"]
    for line in table.rows[:-1]:
        agent = line[0].strip("`")
        for cell, name in zip(line[2:], NAMES, strict=True):
            e = found.scores[agent, name]
            if found.refused(agent, name):
                assert cell == "refused"
            else:
                assert f"{e.value:.2f} [{e.low:.2f}, {e.high:.2f}]" in cell
    marked = [(r[0], n) for r in table.rows for n, c in zip(table.head, r, strict=True) if "†" in c]
    assert marked == [("`mapo`", "noisy")]
    assert table.rows[-1][2:] == ["0.99"] * 4


def test_quality_is_the_median_of_what_is_known(found):
    lines = {r[0].strip("`"): r for r in tables.quality_table(found).rows}
    head = tables.quality_table(found).head
    kl = [r["kl_nats"] for r in FEW if r["agent"] == "ppo"]
    assert lines["ppo"][head.index("KL (nats)")] == f"{np.median(kl):.1f}"
    assert lines["best-of-n"][head.index("KL (nats)")] == ""
    assert lines["best-of-n"][head.index("KL at most")] == "1.8"


def test_failures_and_refusals_are_listed_with_their_reasons(found):
    got = [tuple(r[:5]) for r in tables.trouble_table(found).rows]
    assert got == [
        ("failed", "`mapo`", "`noisy`", "0.1, 0.3", "2"),
        ("refused", "`adjoint`", "`pairs`", "", "8"),
    ]
    assert tables.trouble_table(found).rows[0][5] == "NonFiniteError: loss"


def test_every_run_has_its_command_machine_and_versions(found):
    lines = tables.run_table(found, every_seed=True).rows
    commands = {r[6] for r in lines}
    assert len(lines) == len(FEW) and commands == {f"`{r['command']}`" for r in FEW}
    other = {**FEW[0], "machine": "another"}
    got = report_rows.bench([other, *FEW[1:]], experiments(NAMES))
    assert [r[:2] for r in tables.place_table(got).rows] == [
        ["P1", "another"],
        ["P2", FEW[1]["machine"]],
    ]
    assert "torch 2.13.0" in tables.place_table(got).rows[0][2]
    strata = tables.run_table(got, every_seed=False).rows
    mine = next(r for r in strata if r[:3] == ["basic", "", FEW[0]["agent"]])
    assert (
        mine[3] == "0 1 2 3 4 5 6 7" and mine[5] == "P1 P2" and mine[6] == f"`{FEW[0]['command']}`"
    )


# Figures


def luminance(color):
    parts = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in parts]
    return float(np.dot([0.2126, 0.7152, 0.0722], linear))


@pytest.mark.parametrize("color", [*report_style.COLORS, plotting.GREY])
def test_colours_read_on_white_and_on_dark(color):
    """WCAG's contrast for graphics, 3 to 1."""
    for paper in ("#ffffff", DARK):
        high, low = sorted((luminance(color), luminance(paper)), reverse=True)
        assert (high + 0.05) / (low + 0.05) >= 3, paper


def test_agents_differ_in_colour_or_line_and_marker():
    whole = report_rows.bench(rows(names=("basic",), seeds=2), experiments(["basic"]))
    looks = [report_style.look(whole, a) for a in whole.agents]
    assert len({(k["color"], k["marker"]) for k in looks}) == 21
    assert len({(k["color"], str(k["linestyle"])) for k in looks}) == 21


def test_radars_are_the_scores(found):
    drawn = report_figures.radar(found)
    assert len(drawn.axes) == 1 + len(AGENTS)
    for panel, agent in zip(drawn.axes[1:], found.agents, strict=True):
        want = [found.scores[agent, n].value for n in NAMES]
        np.testing.assert_allclose(panel.lines[0].get_ydata(), [*want, want[0]])
        assert panel.get_title().startswith(agent)
        crosses = panel.lines[1].get_xdata()
        np.testing.assert_allclose(crosses, [np.pi / 2] if agent == "adjoint" else [])
    assert {t.get_text() for t in drawn.axes[0].texts} >= set(NAMES)


def test_the_matrix_says_who_beats_whom(found):
    wins = report_figures.improvements(found)
    for (x, y), p in wins.items():
        parts = []
        for name in NAMES:
            each = [
                stats.mannwhitneyu(scores(FEW, x, name, v), scores(FEW, y, name, v)).statistic / 64
                for v in VARIANTS[name]
            ]
            parts.append(np.mean(each))
        assert p.value == pytest.approx(np.mean(parts))
        assert p.low <= p.value <= p.high and wins[y, x].value == pytest.approx(1 - p.value)
    axes = report_figures.improvement_matrix(found, wins).axes[0]
    told = {tuple(map(int, t.get_position())): t.get_text() for t in axes.texts}
    for (x, y), p in wins.items():
        place = found.complete.index(y), found.complete.index(x)
        assert told[place] == f"{100 * p.value:.0f}"


def test_the_frontier_the_optimum_and_the_agents_are_where_they_belong(found):
    curve = frontier()
    drawn = report_curves.reward_against_kl(found, {"basic": curve})
    panel = drawn.axes[list(NAMES).index("basic")]
    x, y = panel.lines[1].get_data()
    np.testing.assert_allclose(x, ((y - 0.3) / 0.3) ** 2 / 2)
    star = panel.lines[2]
    assert star.get_ydata()[0] == 0.92
    assert star.get_xdata()[0] == pytest.approx((0.62 / 0.3) ** 2 / 2, rel=0.01)
    hollow = [c.lines[0] for c in panel.containers if c.lines[0].get_markerfacecolor() == "none"]
    (bound,) = hollow
    assert bound.get_marker() == "<" and bound.get_xdata() == [1.8]
    points = {c.lines[0].get_color(): c.lines[0] for c in panel.containers}
    mine = [r for r in FEW if (r["agent"], r["experiment"]) == ("ppo", "basic")]
    point = points[report_style.look(found, "ppo")["color"]]
    assert point.get_xdata()[0] == pytest.approx(np.median([r["kl_nats"] for r in mine]))
    assert point.get_ydata()[0] == pytest.approx(np.median([r["reward"] for r in mine]))
    assert len(drawn.axes[1].lines) < len(panel.lines), "no frontier, no curve"
    assert drawn.axes[2].get_title() == "noisy, 0.1", "the frontier is that of one variant"


def test_variants_stand_in_the_order_of_their_numbers():
    assert report_rows.in_order(["16", "256", "64", "0.5"]) == ["0.5", "16", "64", "256"]
    assert report_rows.in_order(["s-rate", "16", "8"]) == ["s-rate", "16", "8"]


def test_only_a_proxy_is_over_optimised_and_only_variants_vary(found):
    assert report_curves.over_optimisation(found, "basic") is None
    drawn = report_curves.over_optimisation(found, "proxy")
    first = drawn.axes[0].lines[0]
    mine = next(r for r in FEW if (r["agent"], r["experiment"]) == (found.agents[0], "proxy"))
    np.testing.assert_allclose(
        first.get_data(), [[p[4] for p in mine["curve"]], [p[2] for p in mine["curve"]]]
    )
    assert [a.get_title() for a in report_curves.score_by_variant(found).axes] == ["noisy"]
    alone = report_rows.bench([r for r in FEW if r["experiment"] == "basic"], experiments(NAMES))
    assert report_curves.score_by_variant(alone) is None


def test_a_drawing_has_the_pages_ink_no_paper_and_its_own_names(found):
    drawn = report_figures.radar(found)
    one, other = (figure(name, "what <it> shows", drawn).svg for name in ("one", "other"))
    assert report_style.INK not in one and "currentColor" in one and "fill: #ffffff" not in one
    tree = ElementTree.fromstring(one)
    assert tree.get("role") == "img" and tree.get("aria-label") == "what <it> shows"
    ids = [
        [e.get("id") for e in ElementTree.fromstring(s).iter() if e.get("id")] for s in (one, other)
    ]
    assert len(set(ids[0])) == len(ids[0]) and set(ids[0]).isdisjoint(ids[1])
    used = set(re.findall(r'(?:href="#|url\(#)([^")]+)', one))
    assert used and used <= set(ids[0])
    alone = ElementTree.fromstring(report_style.standalone(one))
    assert "prefers-color-scheme:dark" in alone[0].text
    assert figure("one", "what <it> shows", report_figures.radar(found)).svg == one


# Page and command


class Reader(HTMLParser):
    """Names, links and open elements of a page."""

    def __init__(self, text):
        super().__init__()
        self.ids, self.links, self.tags, self.depth, self.words = [], [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        got = dict(attrs)
        self.tags.append(tag)
        self.ids += [got["id"]] if "id" in got else []
        self.links += [got[k] for k in ("href", "src", "xlink:href") if k in got]
        if tag not in ("meta", "br"):
            self.depth.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        self.depth.pop()

    def handle_endtag(self, tag):
        assert self.depth.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bench")
    for name in NAMES:
        mine = [r for r in FEW if r["experiment"] == name]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in mine))
    (folder / "frontier.json").write_text(json.dumps({n: frontier() for n in NAMES}))
    return folder


def test_the_command_writes_one_page_that_needs_nothing_else(
    results, found, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(report, "known_experiments", lambda _: experiments(NAMES))
    readme = (ROOT / "README.md").read_bytes()
    assert main(["report", "--results", str(results), "--out", str(tmp_path), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert sorted(told["files"]) == sorted(str(p) for p in tmp_path.iterdir())
    assert (ROOT / "README.md").read_bytes() == readme, "only its own results go there"
    e = found.scores["ppo", "basic"]
    assert told["agents"]["ppo"]["basic"] == pytest.approx([e.value, e.low, e.high])

    text = (tmp_path / "report.html").read_text()
    seen = Reader(text)
    assert not seen.depth and len(set(seen.ids)) == len(seen.ids)
    assert (
        all(link.startswith("#") for link in seen.links)
        and "url(http" not in text
        and "@import" not in text
    )
    assert {link[1:] for link in seen.links} <= set(seen.ids) and "script" not in seen.tags
    assert seen.tags.count("svg") == seen.tags.count("figure") == len(told["files"]) - 2
    assert text.count('role="img"') == seen.tags.count("svg")
    words = " ".join(seen.words)
    for made in FEW:
        assert made["command"] in words
    for section in ("Radar", "Probability of improvement", "Over-optimisation: proxy", "Places"):
        assert section in words
    lines = (tmp_path / "report.md").read_text()
    for line in tables.score_table(found).rows:
        assert f"| {' | '.join(line)} |" in lines
    for picture in re.findall(r"\]\((\S+\.svg)\)", lines):
        ElementTree.parse(tmp_path / picture)


def test_words_of_a_row_cannot_become_markup():
    assert inline("`a` **b** <i> [0.1, 0.2]") == (
        "<code>a</code> <strong>b</strong> &lt;i&gt; <small>[0.1, 0.2]</small>"
    )
    assert "<b>" not in page("<b>", [])


def test_a_mistake_is_one_line(tmp_path, capsys):
    assert main(["report", "--results", str(tmp_path)]) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and "no results" in told


def test_own_results_go_to_the_readme(tmp_path, monkeypatch):
    few = [r for r in FEW if r["agent"] == "ppo" and r["experiment"] != "noisy"]
    results, found = tmp_path / "rows", report_rows.bench(few, experiments(NAMES))
    results.mkdir()
    (results / "all.jsonl").write_text("".join(json.dumps(r) + "\n" for r in few))
    monkeypatch.setattr(report, "known_experiments", lambda _: experiments(NAMES))
    monkeypatch.setattr(report, "RESULTS", tmp_path / "benchmarks" / "results")
    readme = tmp_path / "README.md"
    readme.write_text("before\n<!-- bench -->\nstale\n<!-- /bench -->\nafter\n")
    page = tmp_path / "agents" / "README.md"
    page.parent.mkdir()
    page.write_text("<!-- results -->stale<!-- /results -->\n")
    report.write(results, tmp_path / "benchmarks" / "results" / "report")
    text = readme.read_text()
    assert text.startswith("before\n<!-- bench -->") and text.endswith("<!-- /bench -->\nafter\n")
    assert "stale" not in text and "(benchmarks/results/report/radar.svg)" in text
    e = found.overall["ppo"]
    assert f"| `ppo` | {e.value:.2f} [{e.low:.2f}, {e.high:.2f}]" in text
    basic = [r for r in few if r["experiment"] == "basic"]
    assert agents_page.line(basic, "ppo") in page.read_text() and "stale" not in page.read_text()


def test_the_experiments_are_asked_for_their_names_questions_and_variants():
    home = pytest.importorskip("benchmarks.experiments")
    known = report.known_experiments()
    assert tuple(known) == home.NAMES
    for name, told in known.items():
        assert told.question == home.question(name) and told.variants == tuple(
            home.load(name).variants
        )


def test_the_readme_says_what_the_results_say():
    folder = report.RESULTS / "bench"
    if not list(folder.glob("*.jsonl")):
        pytest.skip("no results of the benchmarks are committed yet")
    found, _ = report.load(folder)
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    lines, note = report.readme_lines(found)
    assert "\n".join(lines) in text and note in text
    assert (report.RESULTS / "report" / "radar.svg").is_file()
    whole = (report.RESULTS / "report" / "report.md").read_text(encoding="utf-8")
    for line in tables.score_table(found).rows:
        assert f"| {' | '.join(line)} |" in whole
