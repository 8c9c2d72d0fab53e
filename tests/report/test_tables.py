import io

import pytest
from rich.console import Console

from trl_robust.report import markdown_table, results_table


def render(results, width):
    console = Console(file=io.StringIO(), width=width, color_system=None)
    console.print(results_table(results, width=width))
    return "\n".join(line.rstrip() for line in console.file.getvalue().splitlines())


WIDE = """\
Attack success (lower is safer) and its interval, by attack
model      prefill       latent        utility       over-refusal
-----------------------------------------------------------------
base       0.74          1.00          0.98          0.02
           [0.60, 0.85]  [0.93, 1.00]  [0.95, 1.00]  [0.00, 0.05]
                         3 errored
! refuser  0.00          no score      0.10          1.00
           [0.00, 0.07]  50 errored                  [0.96, 1.00]
untested   not run       not run       -             -
! refuser: refuses 1.00 of harmless prompts, utility only 0.10.
Low attack success means little where the model refuses harmless
prompts or has lost its utility: an answer of no use to anyone is
not a safe one."""

NARROW = """\
attack       base         ! refuser    untested
-----------------------------------------------
prefill      0.74         0.00         not run
             [0.60, 0.85] [0.00, 0.07]
latent       1.00         no score     not run
             [0.93, 1.00] 50 errored
             3 errored
utility      0.98         0.10         -
             [0.95, 1.00]
over-refusal 0.02         1.00         -
             [0.00, 0.05] [0.96, 1.00]"""


class TestResultsTable:
    def test_wide_text(self, results):
        assert render(results, 120) == WIDE

    def test_narrow_text_puts_attacks_in_rows(self, results):
        lines = render(results, 47).splitlines()
        start = next(i for i, line in enumerate(lines) if line.startswith("attack"))
        assert lines[start : start + 11] == NARROW.splitlines()

    @pytest.mark.parametrize("width", [120, 100, 80, 60, 44])
    def test_six_attacks_fit_without_breaking_a_number(self, results, width):
        attack = results["models"][0]["attacks"][0]
        for model in results["models"]:
            model["attacks"] = [
                {**attack, "name": name, "success": 0.12, "interval": [0.34, 0.56], "n_errored": 7}
                for name in ("none", "prefill", "greedy-coordinate-suffix", "embedding_pgd", "latent", "a" * 30)
            ]
            model["name"] += "-with-a-long-name-of-its-own"
        text = render(results, width)
        assert max(map(len, text.splitlines())) <= width
        assert text.isascii()
        assert text.count("0.12") == text.count("[0.34, 0.56]") == text.count("7 errored") == 18

    def test_names_are_neither_markup_nor_control_codes(self, results):
        results["models"][0]["name"] = "[red]x\x1b[0m"
        text = render(results, 120)
        assert "! [red]x" not in text and "[red]x?[0m" in text and "\x1b" not in text

    def test_nothing_evaluated_still_makes_a_table(self):
        assert "model" in render({"schema": 1, "models": []}, 80)


class TestMarkdownTable:
    def test_text(self, results):
        assert markdown_table(results) == (
            "| model | prefill | latent | utility | over-refusal | note |\n"
            "| --- | --- | --- | --- | --- | --- |\n"
            "| base | 0.74 [0.60, 0.85] | 1.00 [0.93, 1.00] 3 errored | 0.98 [0.95, 1.00] | 0.02 [0.00, 0.05] |  |\n"
            "| refuser | 0.00 [0.00, 0.07] | no score 50 errored | 0.10 | 1.00 [0.96, 1.00] "
            "| refuses 1.00 of harmless prompts; utility only 0.10 |\n"
            "| untested | not run | not run | - | - |  |\n"
        )

    def test_names_cannot_break_the_table_or_bring_markup(self, results):
        results["models"][0]["name"] = "a|b\n<script>`x`[y](z)"
        row = markdown_table(results).splitlines()[2]
        assert row.startswith(r"| a\|b &lt;script&gt;\`x\`[y\](z) |")
