"""The report: one page that asks nobody for anything, with numbers of the curve only."""

import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest
import torch

from flexmoe.checkpoint import Checkpoint
from flexmoe.data import TINY
from flexmoe.evaluation.curve import of_weights, save_curve
from flexmoe.evaluation.records import Curve
from flexmoe.evidence import Evidence
from flexmoe.exporter import write_family
from flexmoe.family import load_stock
from flexmoe.plan import Plan
from flexmoe.reports.page import build_page, measured_curve
from flexmoe.reports.report import measured_rows
from flexmoe.reports.samples import make_samples
from flexmoe.reports.sizes import GONE, KEPT, parts
from flexmoe.statistics import LayerStatistics
from helpers import command, made_curve, random_plan

NASTY = "<script>a(1)</script> $x^2$ & \"q\" 't'"
FILES = (NASTY, "books.valid")


@pytest.fixture(scope="module")
def family(tmp_path_factory):
    plan = random_plan(load_stock("tiny", device="cpu"), TINY / "model", (0.0, 0.2, 0.4))
    recipe = plan.recipe.model_copy(
        update={"base_model": f"/models/{NASTY}", "data": NASTY, "thin_experts": {1: [3]}}
    )
    out = tmp_path_factory.mktemp("page") / "family"
    write_family(TINY / "model", replace(plan, recipe=recipe), out)
    save_curve(out, made_curve(Plan.load(out), of_weights(out), FILES))
    return out


class Parsed(HTMLParser):
    """Tags with their attributes, and the text between them."""

    def __init__(self, page: str):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text, self.open = "", []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in ("meta", "br", "image", "path", "use", "stop", "img"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


@pytest.fixture(scope="module")
def page(family):
    return build_page(family, measured_curve(family), weights=family)


def test_nothing_is_fetched_and_all_text_is_escaped(page):
    text = page.html()
    parsed = Parsed(text)
    assert parsed.open == []
    names = {tag for tag, _ in parsed.tags}
    assert "svg" in names and not names & {"script", "link", "iframe", "object", "img", "base"}
    for tag, attributes in parsed.tags:
        for name, value in attributes.items():
            assert not name.startswith("on")
            if name in ("href", "xlink:href", "src", "srcset", "data", "action"):
                assert value.startswith(("#", "data:image/png;base64,")), (tag, name, value[:80])
    # names of XML namespaces are no addresses
    assert set(re.findall(r"https?://[\w./]+", text)) <= {
        "http://www.w3.org/2000/svg",
        "http://www.w3.org/1999/xlink",
    }
    assert not re.search(r"url\((?!#)|@import", text)
    assert NASTY not in text and NASTY in parsed.text
    assert "<script" not in text and "$" not in text.replace("$x^2$", "")  # all filled in


def test_every_figure_has_words_beside_it(page):
    parsed = Parsed(page.html())
    labels = [a["aria-label"] for tag, a in parsed.tags if tag == "div" and a.get("role") == "img"]
    assert len(labels) == len(page.figures) == sum(tag == "svg" for tag, _ in parsed.tags)
    assert all(len(label) > 30 for label in labels)
    assert set(page.figures) == {"quality", "domains", "widths-20", "widths-40", "parts"}
    for title in page.sections:
        assert title in parsed.text


def test_the_numbers_are_those_of_the_curve(page, family):
    curve = measured_curve(family)
    text = page.sections["Quality against size"]
    for point in curve.budgets:
        for value in (point.nll, point.increase, point.kept):
            assert f"{value:.4g}" in text
        if point.pruned:
            low, high = point.increase_interval
            assert f"({low:#.4g} to {high:#.4g})" in text
        for value in point.files.values():
            assert f"<td>{value:#.4g}</td>" in page.sections["Loss by data file"]
    rows = re.findall(r"<tr><th[^>]*>(\d+)</th>(.*?)</tr>", page.sections["Widths"])
    plan = Plan.load(family)
    for (layer, cells), (i, width_BE) in zip(rows, sorted(plan.width.items()), strict=True):
        kept = (width_BE[1:] / plan.layers[i].channels).mean(1).tolist()
        assert layer == str(i) and re.findall("<td>(.*?)</td>", cells) == [f"{k:.1%}" for k in kept]


def test_a_curve_over_another_model_and_out_of_order(family):
    curve = made_curve(Plan.load(family), of_weights(family), ("_long" * 30, "b"))
    full, some, most = curve.budgets
    losses = {name: loss - 0.5 for name, loss in full.files.items()}
    against = {"model": "big", "nll": 1.5, "files": losses, "pairs": None}
    against |= {"routed_parameters": 1, "bytes": 2}
    saved = {**curve.model_dump(), "against": against, "budgets": [most, some]}
    curve = Curve.model_validate(saved)  # as it is read
    assert [point.pruned for point in curve.budgets] == [0.2, 0.4]
    page = build_page(family, curve)
    assert "40% pruned, the smallest" in Parsed(page.summary).text.replace("\n", " ")
    drawn, caption = page.figures["domains"]
    assert caption == "Increase of the loss over big on each file"
    axes = drawn.axes[0]
    for line, name in zip(axes.lines, full.files, strict=True):
        found = [point.files[name] - full.files[name] + 0.5 for point in (some, most)]
        assert list(line.get_ydata()) == pytest.approx(found)
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert labels == ["_long_long_long_long…" + ("_long" * 4)[1:], "b"]


def test_other_measures_are_shown_by_name_whatever_they_are():
    points = [
        {
            "pruned": 0.0,
            "bytes": 9,
            "nll": 2.0,
            "kl": 0.0,
            "kl_interval": (0.0, 0.0),
            "pairs": None,
        },
        {
            "pruned": 0.4,
            "kl": 0.0123456,
            "kl_interval": (0.01, 0.02),
            "generation": {"greedy": {"looped": {"n": 7, "share": 0.5, "interval": (0.2, 0.8)}}},
        },
    ]
    assert measured_rows(points, skip=("nll",)) == {
        "KL": ["0.000", "0.01235 (0.01000 to 0.02000)"],
        "generation: greedy: looped: n": ["", "7"],
        "generation: greedy: looped: share": ["", "0.5000 (0.2000 to 0.8000)"],
    }


def test_bytes_add_up_to_the_checkpoint(family):
    plan, shares = Plan.load(family), (0.0, 0.2, 0.3)
    for weights in (family, None):
        found = parts(plan, weights, shares)
        assert {sum(sizes) for sizes in zip(*found.values(), strict=True)} == {plan.bytes_full}
        assert found[GONE] == [plan.bytes_full - plan.member(share).bytes for share in shares]
        assert found[KEPT][0] == plan.routed_parameters * plan.bytes_per_parameter
    tensors = Checkpoint(family).tensors
    shared = sum(t.bytes for name, t in tensors.items() if "shared_expert" in name)
    assert parts(plan, family, (0.0,))["shared experts"] == [shared]


def test_coverage_and_samples_show_what_there_is(page, family):
    said = page.sections["Coverage"]
    assert "fewer than 100 tokens: 1." in said and "<td>3</td>" in said
    made = make_samples(family, family, "books.valid,math.valid", [0.0, 0.4], 2)
    assert [sample.file for sample in made] == ["books.valid", "math.valid"]
    first = made[0]
    assert list(first.continued) == [0.0, 0.4] and len(set(first.continued.values())) == 2
    assert first.prompt and first.original and first.prompt != made[1].prompt
    counts = {i: LayerStatistics({"count_E": torch.arange(16.0) * 20}) for i in range(4)}
    seen = Evidence({"all": counts}, "")
    again = build_page(family, measured_curve(family), samples=made, evidence=seen)
    assert "<td>0</td><td>150</td><td>300</td><td>5</td>" in again.sections["Coverage"]
    said = again.sections["Samples"]
    assert said.count("<h3>") == 2 and said.count("40% pruned") == 2


def test_a_folder_or_one_page(family, tmp_path, capsys):
    assert command("report", family, "-o", tmp_path / "out") == 0
    names = {file.name for file in (tmp_path / "out").iterdir()}
    wanted = {"quality.png", "domains.png", "parts.png", "widths-20.png", "widths-40.png"}
    assert names == wanted | {"report.html"}
    for name in wanted:
        assert (tmp_path / "out" / name).read_bytes().startswith(b"\x89PNG")
    assert command("report", family, "-o", tmp_path / "deep" / "one.html") == 0
    assert [f.name for f in (tmp_path / "deep").iterdir()] == ["one.html"]
    again = (tmp_path / "deep" / "one.html").read_bytes()
    assert again == (tmp_path / "out" / "report.html").read_bytes()
    capsys.readouterr()


def test_a_mistake_is_one_message_and_exit_code_2(family, tmp_path, capsys):
    def refused(*words):
        assert command("report", *words) == 2
        error = capsys.readouterr().err
        assert "Traceback" not in error and len(error.splitlines()) < 10
        return error

    plan, out = tmp_path / "plan", tmp_path / "out"
    Plan.load(family).save(plan)
    assert f"flexmoe eval {plan} --save" in refused(plan, "-o", out)
    curve = measured_curve(family)
    save_curve(plan, curve)
    assert "changed since" in refused(plan, "-o", out)
    assert "--device has no effect" in refused(family, "-o", out, "--device", "cpu")
    assert "leave --base out" in refused(family, "-o", out, "--base", "tiny")
    assert "exists already" in refused(family, "-o", plan)
    assert "at least 1, found 0" in refused(family, "-o", out, "--samples", "0")
    assert "does not exist" in refused(family, "-o", out, "--samples", "1")  # the curve's text
    assert "not a flexmoe family" in refused(TINY / "model", "-o", out)
    assert not out.exists()
