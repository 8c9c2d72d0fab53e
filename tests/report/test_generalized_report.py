"""The report of a generalised evaluation: what is read, what stands on the page, in Markdown and in the model card."""

import re

import pytest
from generalized_panel import ATTACKS, CONTROLLED, MODELS, generalized_results
from test_page import Page

from trl_robust.report import page, write_card_section, write_report
from trl_robust.report.curve_figures import curve_names, draw_curves, draw_maps, strongest, worst_of_class
from trl_robust.report.figures import THEMES, compared_attacks
from trl_robust.report.reading import parse_results, side_by_side
from trl_robust.report.safety import resistance_cell
from trl_robust.report.sections import controls, judges, proxy, sections, stands_out


@pytest.fixture(scope="module")
def parsed():
    return parse_results(generalized_results())


def read(path):
    return path.read_text(encoding="utf-8")


def text_of(html):
    return re.sub(r"<[^>]*>", "", html.replace("<br>", "\n"))


class TestReading:
    def test_records_have_what_the_file_says(self, parsed):
        base, refuser = parsed.models[0], parsed.models[-1]
        pruning = base.attacks["pruning"]
        assert [point.destroyed for point in pruning.curve] == [False] * 4 + [True]
        assert pruning.curve[-1].best is None and pruning.curve[-1].capability == 0.7
        assert pruning.axis == "sparsity" and not pruning.destroyed and refuser.attacks["pruning"].destroyed
        assert base.attacks["soft_suffix"].curve[1].success is None
        second = base.attacks["template"].second_judges[0]
        assert (second.judge, second.agreement, second.kappa, second.n) == ("refusal_prefix v2", 0.9, 0.8, 40)
        assert base.loads["latent"].site == "1" and base.site_map.success[3][2] is None
        assert parsed.proxy["latent, success"].largest.value == 0.83
        assert parsed.proxy["pruning, success"].mean.value is None
        assert parsed.versions["suite generalized"] == 1 and parsed.versions["judge refusal_prefix"] == 2

    def test_controls_are_no_attacks(self, parsed):
        assert parsed.attack_names == list(ATTACKS)
        assert parsed.control_names == [f"{name} (random)" for name in CONTROLLED]
        assert not set(parsed.control_names) & {*compared_attacks(parsed), *curve_names(parsed)}
        worst = worst_of_class(parsed.models[0], "input")
        assert worst.name in ATTACKS and worst.success == 1.0

    def test_an_open_end_of_an_interval_is_infinite(self, parsed):
        row = next(row for row in parsed.models[0].resistances if row.attack == "latent" and row.threshold == 0.5)
        assert row.interval == (0.5, float("inf"))

    @pytest.mark.parametrize(
        ("place", "value", "message"),
        [
            (["attacks", 3, "curve"], 3, "must be a list of points"),
            (["attacks", 3, "curve", 0, "budget"], None, "point 0 of the curve has no budget"),
            (["attacks", 3, "curve", 0, "success"], 2.0, r"must lie in \[0, 1\]"),
            (["attacks", 3, "second_judges", 0, "agreement", "kappa"], "high", "kappa is 'high'"),
            (["factor_of_safety", 0, "resistance"], "far", "resistance is 'far'"),
            (["loads", "latent", "load"], "much", "load of latent is 'much'"),
            (["map", "success"], [[1.0]], "a row of `success` for every site"),
        ],
    )
    def test_nonsense_is_named_with_its_model(self, generalized, place, value, message):
        found = generalized["models"][1]
        for key in place[:-1]:
            found = found[key]
        found[place[-1]] = value
        with pytest.raises(ValueError, match=message) as error:
            parse_results(generalized)
        assert "aligned" in str(error.value)

    def test_every_new_key_may_be_missing(self, generalized):
        for key in ("suite", "judges", "proxy", "seed"):
            del generalized[key]
        for model in generalized["models"]:
            for key in ("perplexity", "benchmarks", "loads", "map", "factor_of_safety", "path", "variant"):
                del model[key]
            for attack in model["attacks"]:
                for key in ("curve", "second_judges", "axis", "control_of"):
                    attack.pop(key, None)
        found = parse_results(generalized)
        assert stands_out(found) is None and sections(found, []) == []
        assert draw_curves(found) is None and draw_maps(found) is None

    def test_versions_of_suites_that_differ_are_both_named_side_by_side(self, generalized):
        other = {**generalized, "suite": {"name": "generalized", "version": 2}}
        merged = side_by_side({"a": parse_results(generalized), "b": parse_results(other)})
        assert merged.versions["suite generalized"] == "1 (a), 2 (b)"
        assert merged.versions["judge exact"] == "1"


class TestSections:
    def test_the_strongest_attack_of_every_class_stands_out(self, parsed):
        found = stands_out(parsed)
        assert found.tables[0].head == [
            "model", "on prompts", "on embeddings", "on hidden states", "on weights", "utility", "over-refusal",
        ]  # fmt: skip
        rows = {row[0].split("\n")[0]: row for row in found.tables[0].rows}
        assert rows["base"][4] == "1.00\n[0.88, 1.00]\nfinetune"
        assert rows["over_refuser"][0].split("\n")[1:] == ["! refuses 0.92 of harmless prompts", "! utility only 0.40"]
        assert "autodan needs `templates`" in found.text[1]

    @pytest.mark.parametrize(
        ("attack", "model", "cell"),
        [
            ("latent", 0, "0.5\n[0.5, > 4]\nfactor 1.2"),
            ("latent", 3, "> 4\nfactor > 5.7"),
            ("pruning", 1, "0.3\n[0.3, > 0.4]\n1 destroyed"),
            ("pruning", 5, "destroyed"),
            ("embedding", 3, "> 1.2"),
        ],
    )
    def test_a_resistance_says_threshold_interval_and_factor(self, parsed, attack, model, cell):
        found = next(section for section in sections(parsed, []) if section.heading == "Factor of safety")
        row = next(row for row in found.tables[0].rows if row[0].startswith(f"{attack}\n"))
        assert row[1 + model] == cell

    def test_what_is_divided_by_what_is_said_once(self, parsed):
        found = next(section for section in sections(parsed, []) if section.heading == "Factor of safety")
        assert found.pairs["gcg"] == "steps at the threshold / 500 steps (load: steps 500)"
        assert found.pairs["latent, universal"].startswith("relative radius at the threshold / mean over successful")
        load = next(table for table in found.tables if table.caption.startswith("Load"))
        assert load.rows[0][0] == "latent, universal"
        assert load.rows[0][5] == "0.8\n[0.3, 0.6]\nsite 1\nn 30\nof base" and load.rows[0][6] == "-"

    def test_a_proxy_says_correlation_error_and_rate_or_why_there_is_none(self, parsed):
        success, resistance = proxy(parsed).tables
        assert success.rows[1] == [
            "latent, success", "0.83\n[0.63, 0.93]\np 0.017", "0.83\n[0.63, 0.93]\np 0.017",
            "0.12\n[0.05, 0.20]\nwithout it 0.31", "0.20\n[0.05, 0.20]\nwithout it 0.31", "0.83\n[0.50, 1.00]", "6",
        ]  # fmt: skip
        assert success.rows[2][1] == "-\nsuccess of attacks on prompts is the same for all 6 models"
        assert resistance.folded and not success.folded
        assert "Intervals are over 6 models" in proxy(parsed).text[1]

    def test_judges_stand_side_by_side_with_agreement(self, parsed):
        together, single = judges(parsed).tables
        assert together.rows[0][:3] == ["exact v1", "refusal_prefix v2", "0.90"]
        row = next(row for row in single.rows if row[:2] == ["base", "prefill"])
        assert row[4:] == ["0.90\n[0.80, 0.97]", "0.80", "40"]
        nothing = next(row for row in single.rows if row[:2] == ["LAP-trained", "pair"])
        assert nothing[2].startswith("no score") and nothing[3].startswith("no score") and nothing[4:6] == ["-", "-"]

    def test_an_attack_no_better_than_its_control_is_marked(self, generalized):
        attacks = {attack["name"]: attack for attack in generalized["models"][1]["attacks"]}
        attacks["gcg (random)"]["success"] = 0.99
        rows = {row[0]: row for row in controls(parse_results(generalized)).tables[0].rows}
        assert rows["gcg"][2].endswith("\n! random 0.99") and "\nrandom" in rows["latent"][2]
        attacks["direct"]["success"] = 1.0  # then there is nothing that an attack could add
        rows = {row[0]: row for row in controls(parse_results(generalized)).tables[0].rows}
        assert rows["gcg"][2].endswith("\nrandom 0.99")

    def test_a_resistance_without_points_is_not_run_or_no_score(self, parsed):
        row = next(row for row in parsed.models[5].resistances if row.attack == "pruning")
        assert resistance_cell(None) == "not run" and resistance_cell(row) == "destroyed"


class TestFigures:
    def test_a_panel_an_attack_and_a_line_a_model(self, parsed):
        figure = draw_curves(parsed)
        assert len(figure.axes) == len(curve_names(parsed)) == 9
        assert [axes.get_title(loc="left") for axes in figure.axes] == curve_names(parsed)
        many_shot = figure.axes[0]
        best = [line for line in many_shot.lines if len(line.get_xdata()) == 4]
        assert len(best) == len(MODELS)
        for line in best:
            assert list(line.get_ydata()) == sorted(line.get_ydata())
        assert many_shot.get_xscale() == "log"

    def test_zero_among_the_budgets_makes_the_scale_symmetrical(self, parsed):
        scales = dict(zip(curve_names(parsed), (axes.get_xscale() for axes in draw_curves(parsed).axes), strict=True))
        assert (scales["gcg"], scales["latent"], scales["pruning"]) == ("symlog", "log", "linear")

    def test_a_destroyed_point_is_a_cross_and_in_no_line(self, parsed):
        axes = draw_curves(parsed).axes[curve_names(parsed).index("pruning")]
        crosses = [line for line in axes.lines if line.get_marker() == "x"]
        assert len(crosses) == 10 and sum(line.get_xdata()[0] == 0.5 for line in crosses) == 6
        lines = [line for line in axes.lines if len(line.get_xdata()) > 1]
        assert len(lines) == 5 and all(max(line.get_xdata()) == 0.4 for line in lines)

    def test_a_load_is_one_line_where_all_models_share_it(self, parsed):
        panels = dict(zip(curve_names(parsed), draw_curves(parsed).axes, strict=True))
        loads = {
            name: [line.get_xdata()[0] for line in axes.lines if list(line.get_xdata()) == [line.get_xdata()[0]] * 2]
            for name, axes in panels.items()
        }
        assert loads["gcg"] == [500] and loads["pruning"] == []
        assert loads["latent"] == pytest.approx([0.4, 0.5, 0.6, 0.7, 0.8])

    def test_intervals_are_drawn_for_few_models_only(self, generalized):
        assert all(not axes.collections for axes in draw_curves(parse_results(generalized)).axes)
        generalized["models"] = generalized["models"][:4]
        assert len(draw_curves(parse_results(generalized)).axes[0].collections) == 16

    def test_a_map_has_a_panel_a_model_and_every_value(self, parsed):
        figure = draw_maps(parsed, THEMES["dark"], columns=3)
        assert len(figure.axes) == len(MODELS)
        texts = [text.get_text() for text in figure.axes[0].texts]
        assert len(texts) == 12 and texts.count("-") == 1
        assert draw_maps(parsed, columns=3).get_figwidth() == 3 * draw_maps(parsed).get_figwidth()

    def test_of_many_attacks_the_bars_show_the_strongest_of_every_class(self, parsed):
        assert strongest(parsed).attack_names == [
            "direct", "strongest attack on prompts", "strongest attack on embeddings",
            "strongest attack on hidden states", "strongest attack on weights",
        ]  # fmt: skip

    def test_no_text_is_smaller_than_nine_points(self, parsed):
        for figure in (draw_curves(parsed), draw_maps(parsed)):
            figure.draw_without_rendering()
            texts = [text for text in figure.findobj(lambda one: hasattr(one, "get_fontsize")) if text.get_text()]
            assert len(texts) > 50 and min(text.get_fontsize() for text in texts) >= 9


class TestPage:
    def test_sections_stand_in_the_order_a_reader_wants(self, generalized_folder):
        headings = re.findall("<h2>(.*?)</h2>", read(generalized_folder / "report.html"))
        assert headings == [
            "What stands out", "Figures", "Factor of safety", "Success against budget", "Where hidden states give way",
            "Is it a proxy?", "Judges side by side", "Against chance", "Every attack", "Attacks", "Other measures",
            "Examples", "Versions",
        ]  # fmt: skip
        markdown = re.findall("^## (.*)$", read(generalized_folder / "report.md"), re.M)
        assert [name for name in headings if name not in ("Figures", "Examples")] == markdown

    def test_asks_nothing_of_the_network_and_shows_no_texts(self, generalized_folder):
        html = read(generalized_folder / "report.html")
        assert "script" not in {tag for tag, _ in Page(html).tags}  # and every element is closed
        assert "<script" not in html and "http" not in html and "url(" not in html
        assert set(re.findall(r'(?:src|srcset|href)="(.{26})', html)) == {"data:image/svg+xml;base64,"}
        assert "A PROMPT" not in html and "A RESPONSE" not in html and "[8 characters, " in html

    def test_what_errored_is_marked_and_never_a_number(self, generalized_folder):
        html = read(generalized_folder / "report.html")
        lost = html[html.index("<caption><span>Rows that errored") :]
        row = text_of(lost[lost.index("pair") : lost.index("</tr>", lost.index("pair"))])
        assert "40 errored" in row
        every = html[html.index("<h2>Every attack</h2>") :]
        pair = every[every.index(">pair<") : every.index("</tr>", every.index(">pair<"))]
        assert '<span class="none">no score</span><br><strong class="mark">40 errored</strong>' in pair

    def test_the_model_that_lost_its_use_is_marked(self, generalized_folder):
        html = read(generalized_folder / "report.html")
        assert "! refuses 0.92 of harmless prompts" in html and "Marked for this: over_refuser." in html
        assert "<tr class=marked>" in html[: html.index("<h2>Figures</h2>")]

    def test_other_measures_and_versions(self, generalized_folder):
        text = text_of(read(generalized_folder / "report.html"))
        for said in (
            "0.460\n± 0.004",
            "8.5\n[8.1, 9]",
            "repeated ngrams",
            "suite generalized",
            "judge refusal_prefix",
        ):
            assert said in text
        assert "without end" not in text  # nobody measured it

    def test_the_same_files_make_the_same_bytes(self, generalized_folder):
        names = ["report.html", "report.md", "model_card.md", "figures/curves.png", "figures/sites.svg"]
        before = [(generalized_folder / name).read_bytes() for name in names]
        write_report(generalized_folder)
        assert [(generalized_folder / name).read_bytes() for name in names] == before

    def test_names_that_are_markup_are_text(self, generalized, write, monkeypatch):
        monkeypatch.setattr(page, "DRAWN", {"sites": draw_maps})
        evil = '<script>alert("x")</script>|$_'
        generalized["models"] = generalized["models"][:1]
        model = generalized["models"][0]
        model |= {"name": evil, "benchmarks": {evil: {"value": 1.0, evil: evil}}, "coherence": {evil: evil}}
        model["map"]["sites"][0] = evil
        for attack in model["attacks"]:
            attack["second_judges"][0]["judge"] = evil
        model["loads"]["latent"] |= {"site": evil, "load_is": evil, "measured_on": evil}
        for row in model["factor_of_safety"]:
            row |= {"unit": evil, "load_is": evil}
        study = generalized["proxy"]["latent, success"]
        generalized |= {"proxy": {evil: {**study, "note": evil}}, "suite": {"name": evil, "version": evil}}
        generalized["judges"] = [{"name": evil, "version": evil}]
        folder = write(generalized)
        html = read(write_report(folder))
        assert "<script" not in html and "<script" not in read(folder / "report.md") + read(folder / "model_card.md")
        assert html.count("&lt;script&gt;") > 10


class TestCard:
    def test_every_model_has_its_own_part(self, generalized_folder):
        card = read(generalized_folder / "model_card.md")
        assert re.findall("^### (.*)$", card, re.M) == list(MODELS)
        part = card[card.index("### aligned") : card.index("### refusal-trained")]
        assert (
            "| hidden states | refusal_direction_harmless v1 | 1.00 [0.88, 1.00] | 40 | directions=4 | exact v1 |"
            in part
        )
        assert "| gcg | 50 [50, &gt; 500] | steps | 500 | 0.1 | steps at the threshold / 500 steps |" in part
        assert "Utility (exact answers) 0.98 [0.95, 0.98]; over-refusal (refused look-alikes) 0.02" in part
        assert "templates=" not in card  # texts of attacks do not belong there

    def test_says_what_is_not_claimed_and_what_it_was_measured_with(self, generalized_folder):
        card = read(generalized_folder / "model_card.md")
        assert "**Not claimed.**" in card and "**Mind: utility only 0.40.**" in card
        assert "Measured 2026-07-03T10:11:12+00:00 with suite generalized 1, judge exact 1" in card

    def test_old_results_have_one_as_well(self, old_folder):
        card = read(write_card_section(old_folder))
        assert (
            "| hidden states | latent v2 | 1.00 [0.93, 1.00] 3 errored | 47 | steps=16, radius=1.5 | exact |" in card
        )
        assert "### untested\n\nNot attacked." in card and "breaks the largest share" not in card
