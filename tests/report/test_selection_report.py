import base64
import copy
import json
import struct
from html.parser import HTMLParser

import pytest

from trl_robust.report.examples import redact
from trl_robust.report.figures import THEMES
from trl_robust.report.selection import write_selection_report
from trl_robust.report.selection_figures import draw_scores, draw_sources, draw_visits

EVIL = '<script>alert("x")</script>&\'"'
VOID = {"meta", "img", "br", "source"}
FIGURES = {f"{name}.{form}" for name in ("scores", "sources", "visits") for form in ("png", "svg")}

_EXAMPLE = {
    "row": 4, "hash": "ab12" * 16, "copies": 2, "score": 0.25, "weight": 1.25, "kept": True, "label": False,
    "source": "web", "text": {"prompt": "PROMPT", "completion": [{"role": "assistant", "content": "ANSWER"}]},
}  # fmt: skip

_SUMMARY = {
    "schema": 1,
    "method": "seal",
    "function": "softmax",
    "normalized": True,
    "settings": {"method": "seal", "seed": 7, "penalty_strength": 0.5},
    "rows": {
        "dataset": 10, "scored": 9, "unknown": 1, "unvisited": 0, "missing": 3, "kept": 8, "kept_without_score": 0,
    },
    "mean_score": 0.1,
    "threshold": 0.75,
    "threshold_score": -0.5,
    "tied": 2,
    "mixed_in": 4,
    "histograms": {
        "score": {"edges": [-1.0, 0.0, 1.0], "counts": {"all": [4, 5], "kept": [3, 5], "labelled": [2, 0]}},
        "weight": {"edges": [0.5, 1.0, 1.5], "counts": {"all": [4, 5], "kept": [3, 5], "labelled": [2, 0]}},
    },
    "visits": {"min": 2, "max": 3, "mean": 2.5, "width": 1, "counts": [[2, 5], [3, 5]]},
    "effective_fraction": {"all": 0.875, "kept": 0.9},
    "correlations": {
        "length": {"rho": -0.25, "n": 9, "why": None},
        "first_loss": None,
        "last_visit_step": {"rho": 0.375, "n": 9, "why": None},
        "visits": {"rho": None, "n": 9, "why": "the other is the same in every row"},
    },
    "labels": {
        "column": "unsafe", "labelled": 2, "unlabelled": 8, "auroc": 0.9375, "kept_labelled": 1,
        "kept_labelled_share": 0.5, "precision_kept": 0.875, "precision_all": 0.8,
        "precision_at": [{"share": 0.2, "k": 2, "precision": 1.0}],
    },
    "sources": {
        "web": {"rows": 6, "kept": 5, "keep_rate": 0.8333, "mean_weight": 1.1, "labelled": 1, "kept_labelled": 1},
        "book": {"rows": 4, "kept": 3, "keep_rate": 0.75, "mean_weight": None, "labelled": 1, "kept_labelled": 0},
    },
    "agreement": {
        "another seed": {
            "method": "seal", "n": 9, "rho": 0.625, "why": None, "jaccard": 0.6, "jaccard_by_chance": 0.5,
            "within_source": {"web": {"rho": 0.5, "n": 6}, "book": {"rho": None, "n": 3}}, "flagged": False,
        },
    },
    "examples": {"top": [_EXAMPLE], "borderline": [], "bottom": [_EXAMPLE | {"row": 9, "label": True, "kept": False}]},
    "run": {"versions": {"trl_robust": "9.9"}, "arguments": {"keep": 0.8, "count": None}, "dataset": {"rows": 10}},
    "warnings": ["The score goes along with something."],
}  # fmt: skip


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


@pytest.fixture
def found():
    return copy.deepcopy(_SUMMARY)


@pytest.fixture
def write(tmp_path):
    """Writes a summary, and a report from it; returns the page and the Markdown."""

    def write_both(summary, **options):
        (tmp_path / "selection.json").write_text(json.dumps(summary, allow_nan=False), encoding="utf-8")
        page = write_selection_report(tmp_path, **options)
        assert page == tmp_path / "report.html"
        return page.read_text(encoding="utf-8"), (tmp_path / "report.md").read_text(encoding="utf-8")

    return write_both


def cells(html, start):
    """Cells of the first line of a table that begins with this text."""
    page = Page("")
    line = next(line for line in html.splitlines() if f'<th scope="row">{start}</th>' in line)
    texts = []
    page.handle_data = texts.append
    page.feed(line)
    return [text for text in texts if text.strip()]


class TestContent:
    def test_writes_what_the_contract_names(self, found, write, tmp_path):
        write(found)
        assert {path.name for path in tmp_path.iterdir()} == {
            "selection.json", "report.html", "report.md", "figures",
        }  # fmt: skip
        assert {path.name for path in (tmp_path / "figures").iterdir()} == FIGURES

    def test_the_numbers_are_there(self, found, write):
        html, markdown = write(found)
        text = Page(html).text
        for said in (
            "8 of 10 rows are kept, by seal; 4 safety demonstrations are mixed in.",
            "weight 0.75, score -0.5",
            "0.875 (kept: 0.900)",
            "0.938 (chance 0.5; 1 where all rows with the label come last)",
            "1 of 2 rows with unsafe",
            "0.875 of the rows kept (of all rows: 0.800)",
            "The score goes along with something.",
            "2 to 3, mean 2.50",
            "penalty_strength",
            "trl_robust=9.9",
        ):
            assert said in text
            assert said in markdown
        assert cells(html, "web") == ["web", "6", "5", "0.833", "1.100", "1", "1"]
        assert cells(html, "book") == ["book", "4", "3", "0.750", "-", "1", "0"]
        assert cells(html, "2") == ["2", "0.2", "1.000"]
        assert cells(html, "step of the last visit") == ["step of the last visit", "+0.375", "9"]
        assert cells(html, "number of visits")[1] == "none: the other is the same in every row"
        assert cells(html, "another seed") == [
            "another seed", "seal", "9", "+0.625", "web +0.50, book -", "0.600 (chance 0.500)",
        ]  # fmt: skip
        assert "| of this choice: arguments | keep=0.8 |" in markdown  # what was not given is left out
        assert "| web | 6 | 5 | 0.833 | 1.100 | 1 | 1 |" in markdown

    def test_says_what_a_selection_cannot_promise(self, found, write):
        assert all("no guarantee" in text for text in write(found))

    @pytest.mark.parametrize("part", [name for name in _SUMMARY if name != "schema"])
    def test_any_part_may_be_missing_or_null(self, part, found, write, monkeypatch):
        monkeypatch.setattr("trl_robust.report.selection.encode", lambda figure, form: b"")  # drawn, and not written
        for summary in ({**found, part: None}, {name: value for name, value in found.items() if name != part}):
            html, markdown = write(summary)
            Page(html)
            assert markdown.startswith("# Selection of rows\n") and "None" not in html + markdown

    def test_nothing_but_a_schema_is_still_a_page(self, write, tmp_path):
        html, _ = write({"schema": 1})
        assert "Rows chosen." in Page(html).text
        assert list((tmp_path / "figures").iterdir()) == []

    def test_what_a_selector_that_knows_no_row_gives(self, found, write):
        found["histograms"] = {"score": None, "weight": None}
        found["labels"] |= {"auroc": None, "kept_labelled_share": None, "precision_kept": None, "precision_at": []}
        found |= {"threshold": None, "threshold_score": None, "sources": {}, "agreement": {}, "visits": None}
        html, _ = write(found)
        assert "- (chance 0.5" in Page(html).text

    def test_a_figure_of_an_earlier_report_goes(self, found, write, tmp_path):
        write(found)
        found["visits"] |= {"max": 2, "counts": [[2, 10]]}
        write(found)
        assert {path.name for path in (tmp_path / "figures").iterdir()} == FIGURES - {"visits.png", "visits.svg"}

    def test_the_same_file_makes_the_same_page(self, found, write):
        assert write(found) == write(found)

    @pytest.mark.parametrize(
        ("content", "message"),
        [('{"schema": 2}', "has schema 2, and this version reads 1"), ("{", "cannot be read"), ("[]", "holds a list")],
    )
    def test_refuses_what_it_cannot_read(self, content, message, tmp_path):
        with pytest.raises(FileNotFoundError, match="is not there"):
            write_selection_report(tmp_path)
        (tmp_path / "selection.json").write_text(content, encoding="utf-8")
        with pytest.raises(ValueError, match=message):
            write_selection_report(tmp_path)
        assert not (tmp_path / "report.html").exists()


class TestRows:
    TEXT = "prompt: PROMPT\nassistant: ANSWER"

    def test_their_text_is_left_out_unless_it_is_asked_for(self, found, write):
        for text in write(found):
            assert "PROMPT" not in text and "ANSWER" not in text
            assert redact(self.TEXT) in text and f"[{len(self.TEXT)} characters, " in text
            assert "ab12ab12ab12" in text and "4 (2 copies)" in text
        html, markdown = write(found, show_rows=True)
        assert self.TEXT in Page(html).text
        assert "prompt: PROMPT assistant: ANSWER" in markdown and "characters" not in markdown

    def test_a_row_with_the_label_is_marked(self, found, write):
        html, _ = write(found)
        marked = [line for line in html.splitlines() if line.startswith("<tr class=marked>")]
        assert len(marked) == 1 and ">not kept<" in marked[0] and ">9 (2 copies)<" in marked[0]

    def test_everything_from_the_file_is_escaped(self, found, write):
        text = {EVIL: EVIL, "messages": [{"role": EVIL, "content": EVIL}, {"role": "user", "content": [{EVIL: EVIL}]}]}
        example = _EXAMPLE | {"text": text, "source": EVIL, "hash": EVIL, "row": EVIL}
        found["examples"] = {name: [example] for name in ("top", "borderline", "bottom")}
        found |= {"method": EVIL, "function": EVIL, "warnings": [EVIL], "settings": {EVIL: [EVIL, {EVIL: EVIL}]}}
        found["labels"]["column"] = EVIL
        found["sources"] = {EVIL: found["sources"]["web"]}
        agreement = found["agreement"]["another seed"] | {"rho": None, "why": EVIL, "method": EVIL}
        found["agreement"] = {EVIL: agreement | {"within_source": {EVIL: {"rho": 0.5, "n": 3}}}}
        found["correlations"]["visits"]["why"] = EVIL
        for show in (True, False):
            html, markdown = write(found, show_rows=show)
            page = Page(html)
            assert "<script" not in html and "script" not in {tag for tag, _ in page.tags}
            assert "<script" not in markdown
            assert page.text.count(EVIL) > (25 if show else 15)

    def test_a_long_text_is_cut(self, found, write):
        found["examples"]["top"][0]["text"]["prompt"] = "x" * 5000
        html, _ = write(found, show_rows=True)
        assert "characters more]" in html and "x" * 2100 not in html


class TestPage:
    def test_opens_offline_and_fits_a_phone(self, found, write):
        html, _ = write(found)
        page = Page(html)
        assert not {tag for tag, _ in page.tags} & {"script", "link", "iframe", "object"}
        for _, attributes in page.tags:
            for name in {"src", "srcset", "href"} & set(attributes):
                assert attributes[name].startswith("data:image/svg+xml;base64,")
        assert "url(" not in html and "@import" not in html and "http" not in html
        assert ("meta", {"name": "viewport", "content": "width=device-width, initial-scale=1"}) in page.tags
        # Whatever is wider than a phone scrolls by itself.
        tables = html.count("<table>")
        assert tables == html.count('<div class="scroll" role="region"') == 6

    def test_every_image_has_a_text_and_both_themes(self, found, write):
        page = Page(write(found)[0])
        images = [attributes for tag, attributes in page.tags if tag == "img"]
        sources = [attributes for tag, attributes in page.tags if tag == "source"]
        assert len(images) == len(sources) == 3
        for image, source in zip(images, sources, strict=True):
            assert "8 of 10 rows are kept" in image["alt"]
            assert "dark" in source["media"] and source["srcset"] != image["src"]
            assert b"<svg" in base64.b64decode(image["src"].split(",")[1])

    def test_figures_are_wide_enough_to_read(self, found, write, tmp_path):
        write(found)
        for name in ("scores", "sources", "visits"):
            width, _ = struct.unpack(">II", (tmp_path / "figures" / f"{name}.png").read_bytes()[16:24])
            assert width == 768


class TestFigures:
    def test_bars_are_kept_rows_below_the_others(self, found):
        figure = draw_scores(found, THEMES["dark"])
        bars = [(bar.get_y(), bar.get_height()) for bar in figure.axes[0].patches if hasattr(bar, "get_height")]
        assert bars == [(0, 3), (0, 5), (3, 1), (5, 0)]
        line = figure.axes[0].lines[0]
        assert list(line.get_xdata()) == [-0.5, -0.5] and list(figure.axes[1].lines[0].get_xdata()) == [0.75, 0.75]
        names = [text.get_text() for text in figure.legends[0].get_texts()]
        assert set(names) == {"kept", "not kept", "with unsafe", "last row kept"}

    def test_sources_come_by_size_and_of_many_the_largest(self, found):
        figure = draw_sources(found)
        assert [bar.get_width() for bar in figure.axes[0].patches] == [0.8333, 0.75]
        found["sources"] = {str(number): found["sources"]["web"] | {"rows": number} for number in range(100)}
        figure = draw_sources(found)
        assert len(figure.axes[0].patches) == 30 and figure.axes[0].texts[0].get_text() == "99: 5 of 99"

    def test_visits(self, found):
        bars = draw_visits(found).axes[0].patches
        assert [(bar.get_x() + bar.get_width() / 2, bar.get_height()) for bar in bars] == [(2, 5), (3, 5)]
        assert draw_visits({}) is None and draw_scores({}) is None and draw_sources({}) is None
