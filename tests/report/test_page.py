import base64
import re
import struct
from html.parser import HTMLParser

import pytest

from trl_robust.report import write_report
from trl_robust.report.figures import THEMES, compared_attacks, draw_success, draw_trade_off, encode, mean_success
from trl_robust.report.reading import parse_results

EVIL = '<script>alert("x")</script>&\'"'
VOID = {"meta", "img", "br", "source", "wbr"}


class Page(HTMLParser):
    """Collects tags, attributes and text, and fails where an element is closed that is not open."""

    def __init__(self, html):
        super().__init__()
        self.open, self.tags, self.text = [], [], ""
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def generation(**changes):
    row = {"model": "base", "attack": "prefill", "id": "p1", "prompt": "PROMPT", "response": "RESPONSE"}
    return row | {"status": "scored", "success": True, "reason": "REASON"} | changes


def read(path):
    return path.read_text(encoding="utf-8")


class TestPage:
    def test_writes_what_the_contract_names(self, results, write):
        folder = write(results)
        assert write_report(folder) == folder / "report.html"
        assert {path.name for path in folder.iterdir()} == {
            "results.json", "generations.jsonl", "report.html", "report.md", "model_card.md", "figures",
        }  # fmt: skip

    def test_asks_nothing_of_the_network_and_runs_no_script(self, results, write):
        html = read(write_report(write(results, [generation()])))
        page = Page(html)
        assert "script" not in {tag for tag, _ in page.tags} and "link" not in {tag for tag, _ in page.tags}
        for _, attributes in page.tags:
            for name in {"src", "href", "srcset", "action", "data"} & set(attributes):
                assert attributes[name].startswith("data:image/svg+xml;base64,")
            assert not any(name.startswith("on") for name in attributes)
        assert "url(" not in html and "@import" not in html and "http" not in html

    def test_every_image_has_a_text_and_both_themes(self, results, write):
        page = Page(read(write_report(write(results))))
        images = [attributes for tag, attributes in page.tags if tag == "img"]
        sources = [attributes for tag, attributes in page.tags if tag == "source"]
        assert len(images) == len(sources) == 2
        assert "base: prefill 0.74 [0.60, 0.85]" in images[0]["alt"]
        assert "base: mean success 0.74, utility 0.98, over-refusal 0.02." in images[1]["alt"]
        for image, source in zip(images, sources, strict=True):
            assert "dark" in source["media"] and source["srcset"] != image["src"]
            assert b"<svg" in base64.b64decode(image["src"].split(",")[1])

    def test_escapes_whatever_comes_from_files(self, results, write):
        model = results["models"][0]
        model |= {"name": EVIL, "description": EVIL, "coherence": {EVIL: EVIL}, "factor_of_safety": [{EVIL: EVIL}]}
        model["attacks"][0] |= {"name": EVIL, "class": EVIL, "judge": EVIL, "budget": {EVIL: EVIL}, "version": EVIL}
        model["utility"]["name"] = EVIL
        results |= {"versions": {EVIL: EVIL}, "summary": {EVIL: EVIL}, "created": EVIL}
        row = dict.fromkeys(("model", "attack", "id", "prompt", "response", "reason"), EVIL)
        folder = write(results, [row])
        html = read(write_report(folder, show_generations=True))
        page = Page(html)
        assert "<script" not in html and "script" not in {tag for tag, _ in page.tags}
        # Seen as text in every place: name, judge, prompt and the others.
        assert page.text.count(EVIL) > 20
        assert "<script" not in read(folder / "report.md")

    def test_shows_counts_budget_judge_and_version(self, results, write):
        html = read(write_report(write(results)))
        row = next(line for line in html.splitlines() if "steps=16, radius=1.5" in line)
        cells = re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row)
        assert [re.sub("<.*?>", "", cell) for cell in cells] == [
            "base", "latent", "latent", "47", "3", "1", "steps=16, radius=1.5", "exact", "2",
        ]  # fmt: skip
        # Errors are marked in the row, in the cell, and said in words above the table.
        assert row.startswith("<tr class=marked>") and '<strong class="mark">3</strong>' in row
        assert "53 rows errored and are in no share" in html

    def test_marks_the_model_whose_low_success_means_nothing(self, results, write):
        html = read(write_report(write(results)))
        assert "! refuses 1.00 of harmless prompts" in html and "! utility only 0.10" in html
        assert "Marked for this: refuser." in html
        del results["models"][1]
        assert "Marked for this" not in read(write_report(write(results)))

    def test_shows_what_errored_in_the_other_measures_and_the_judges_version(self, results, write):
        results["models"][0]["utility"]["n_errored"] = 4
        results["models"][0]["attacks"][0]["judge_version"] = 3
        html = read(write_report(write(results)))
        assert html.count('<strong class="mark">4 errored</strong>') == 2 and "<td>exact v3</td>" in html

    def test_no_score_is_never_a_number(self, results, write):
        html = read(write_report(write(results)))
        row = next(line for line in html.splitlines() if "refuses everything" in line and "<tr" in line)
        assert '<span class="none">no score</span>' in row and "50 errored" in row

    @pytest.mark.parametrize("models", [[], [{"name": "only a name"}]])
    def test_a_page_without_attacks_is_still_a_page(self, models, write):
        folder = write({"schema": 1, "models": models})
        assert "No attack was run." in Page(read(write_report(folder))).text
        assert list((folder / "figures").iterdir()) == []

    def test_the_same_files_make_the_same_page(self, results, write):
        folder = write(results, [generation()])
        assert write_report(folder).read_bytes() == write_report(folder).read_bytes()
        page = read(folder / "report.html")
        assert read(write_report(folder)) == page


class TestExamples:
    def test_texts_are_left_out_by_default(self, results, write):
        folder = write(results, [generation(), generation(attack="latent", prompt="another")])
        html = read(write_report(folder))
        for text in ("PROMPT", "RESPONSE", "REASON"):
            assert text not in html and text not in read(folder / "report.md")
        assert re.search(r"\[6 characters, [0-9a-f]{8}\]", html)

    def test_equal_texts_have_equal_markers(self, results, write):
        html = read(write_report(write(results, [generation(), generation(attack="latent", response="OTHER")])))
        markers = re.findall(r"\[\d+ characters, [0-9a-f]{8}\]", html)
        assert len(markers) == 6 and len(set(markers)) == 4

    def test_texts_are_shown_when_asked_for_and_long_ones_cut(self, results, write):
        folder = write(results, [generation(response="y" * 5000)])
        html = read(write_report(folder, show_generations=True))
        assert "PROMPT" in html and "[... 3000 characters more]" in html and "y" * 2001 not in html

    def test_one_example_of_each_outcome(self, results, write):
        rows = [generation(id=f"p{i}", success=i % 2 == 0) for i in range(8)]
        rows += [generation(id="e", status="errored", success=None), generation(id="s", status="skipped")]
        text = Page(read(write_report(write(results, rows)))).text
        assert "base (4 examples)" in text and "p0" in text and "p1" in text and "p2" not in text

    def test_half_a_line_is_counted_and_does_not_stop_the_report(self, results, write):
        html = read(write_report(write(results, [generation(), '{"model": "ba', "[1]"])))
        assert "2 lines of generations.jsonl could not be read" in html and "base (1 examples)" in html


class TestSources:
    def test_folders_stand_side_by_side_with_their_own_examples(self, results, write, tmp_path):
        first = write(results, [generation(prompt="of the first")], name="first")
        second = write(results, [generation(prompt="of the second")], name="second")
        page = Page(read(write_report(tmp_path / "both", sources=[first, second], show_generations=True)))
        assert "Examples of base (first)" in page.text and "Examples of base (second)" in page.text
        assert page.text.index("of the first") < page.text.index("of the second")
        assert not (tmp_path / "both" / "results.json").exists()

    def test_the_same_folder_twice_is_refused(self, results, write, tmp_path):
        folder = write(results)
        with pytest.raises(ValueError, match="given twice"):
            write_report(tmp_path / "both", sources=[folder, folder])


class TestFigures:
    def test_files_are_pictures(self, results, write):
        folder = write(results)
        write_report(folder)
        for name in ("attack_success", "trade_off"):
            png = (folder / "figures" / f"{name}.png").read_bytes()
            assert png[:8] == b"\x89PNG\r\n\x1a\n"
            width, height = struct.unpack(">II", png[16:24])
            assert width > 600 and height > 400 and len(png) > 5000
            assert f"figures/{name}.png" in read(folder / "report.md")
            assert b"<svg" in (folder / "figures" / f"{name}.svg").read_bytes()

    def test_a_figure_of_an_earlier_report_does_not_stay(self, results, write):
        write_report(write(results))
        for model in results["models"]:
            model.pop("utility", None), model.pop("over_refusal", None)
        folder = write(results)
        write_report(folder)
        assert {path.name for path in (folder / "figures").iterdir()} == {"attack_success.png", "attack_success.svg"}
        assert "trade_off" not in read(folder / "report.md")

    def test_bars_have_the_values_and_nothing_stands_for_no_score(self, results):
        axes = draw_success(parse_results(results)).axes[0]
        assert [patch.get_width() for patch in axes.patches] == [0.74, 0.0, 1.0]
        texts = [text.get_text() for text in axes.texts]
        assert texts.count("not run") == 2 and texts.count("no score") == 1
        assert axes.get_xlim() == (0, 1)

    def test_bars_carry_their_intervals(self, results):
        axes = draw_success(parse_results(results)).axes[0]
        spans = [collection.get_segments()[0][:, 0].tolist() for collection in axes.collections]
        assert spans == [pytest.approx([0.6, 0.85]), pytest.approx([0.0, 0.07]), pytest.approx([0.93, 1.0])]

    def test_marks_average_only_attacks_every_attacked_model_was_scored_on(self, results):
        parsed = parse_results(results)
        assert compared_attacks(parsed) == ["prefill"]
        assert [mean_success(model, ["prefill"]) for model in parsed.models] == [0.74, 0.0, None]
        utility, over_refusal = draw_trade_off(parsed).axes
        marks = [(line.get_xdata()[0], line.get_ydata()[0]) for line in utility.lines if line.get_markersize() == 9]
        assert marks == [(0.74, 0.98), (0.0, 0.1)]
        assert utility.get_ylim() == over_refusal.get_ylim() == (0, 1)

    def test_plain_prompts_are_no_attack_in_the_mean(self, results):
        for model in results["models"][:2]:
            model["attacks"].append({"name": "plain", "class": "none", "success": 0.1})
        assert compared_attacks(parse_results(results)) == ["prefill"]

    def test_utility_in_percent_is_not_drawn_on_a_scale_to_one(self, results):
        for model in results["models"][:2]:
            model["utility"]["value"] = 53.0
        assert len(draw_trade_off(parse_results(results)).axes) == 1

    def test_many_models_and_odd_names_can_be_drawn(self, results):
        model = results["models"][0]
        results["models"] = [{**model, "name": f"_$a_{i}$ " + "long " * 30} for i in range(10)]
        parsed = parse_results(results)
        for theme in THEMES.values():
            assert encode(draw_success(parsed, theme), "png")[:4] == b"\x89PNG"
            assert encode(draw_trade_off(parsed, theme), "svg")
        assert len(draw_success(parsed).legends[0].get_texts()) == 10
        marks = [line for line in draw_trade_off(parsed).axes[0].lines if line.get_markersize() == 9]
        assert len({(line.get_color(), line.get_marker()) for line in marks}) == 10
