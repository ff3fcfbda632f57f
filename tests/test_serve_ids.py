"""Model ids and settings."""

import pytest

from flexmoe.errors import FlexmoeError
from flexmoe.serve.engine import ServeSettings, Slo
from flexmoe.serve.ids import Budgets, label
from serving import settings


def test_labels_are_percent():
    shares = (0.0, 0.07, 0.125, 0.29, 0.4, 0.57)
    assert [label(s) for s in shares] == ["0", "7", "12.5", "29", "40", "57"]


def test_ids_name_shares():
    budgets = Budgets("org/moe", (0.0, 0.125, 0.4))
    assert budgets.ids == ("org/moe", "org/moe:0", "org/moe:12.5", "org/moe:40")
    assert [budgets.find(i) for i in budgets.ids] == [None, "0", "12.5", "40"]
    assert [budgets.share(b) for b in budgets.labels] == [0.0, 0.125, 0.4]


def test_a_plain_model_has_one_id_an_export_two():
    assert Budgets("moe", (0.0,)).ids == ("moe",)
    assert Budgets("moe-40", (0.4,)).ids == ("moe-40", "moe-40:40")
    with pytest.raises(FlexmoeError, match="unknown model 'moe:0'"):
        Budgets("moe", (0.0,)).find("moe:0")


def test_tasks_have_ids_beside_budgets():
    budgets = Budgets("moe", (0.0, 0.4), ("law", "math"))
    assert budgets.ids == ("moe", "moe:0", "moe:40", "moe:law", "moe:math", "moe:auto")
    assert budgets.labels == ("0", "40") and budgets.rows == ("0", "40", "law", "math")
    assert [budgets.find(i) for i in budgets.ids] == [None, "0", "40", "law", "math", "auto"]
    full = Budgets("moe", (0.0,), ("law",))
    assert full.ids == ("moe", "moe:law", "moe:auto") and full.find("moe:law") == "law"
    for task in ("auto", "40", "möbel"):
        with pytest.raises(FlexmoeError, match=f"task '{task}' cannot be served"):
            Budgets("moe", (0.0, 0.4), (task,))


@pytest.mark.parametrize("found", ["moe:39", "moe:040", "moe:40.0", "moe:", "MOE:40", ":40", ""])
def test_unknown_ids_list_the_known(found):
    with pytest.raises(FlexmoeError, match=r"Known: moe, moe:0, moe:40$"):
        Budgets("moe", (0.0, 0.4)).find(found)


@pytest.mark.parametrize(
    ("found", "nearest"), [("38", "40"), ("0.4", "40"), ("90", "40"), ("-3", "0"), ("1", "0")]
)
def test_unknown_budgets_name_the_nearest(found, nearest):
    with pytest.raises(FlexmoeError, match=rf"Did you mean '{nearest}'\? Known: 0, 20, 40"):
        Budgets("moe", (0.0, 0.2, 0.4)).share(found)


def test_an_unknown_number_in_an_id_gets_the_nearest_one():
    with pytest.raises(
        FlexmoeError, match=r"unknown model 'moe:50'. Did you mean 'moe:40'\? Known"
    ):
        Budgets("moe", (0.0, 0.2, 0.4, 0.8)).find("moe:50")


@pytest.mark.parametrize("name", ["", "two words", 'quote"', "back\\slash", "tab\t", "ümlaut"])
def test_names_that_do_not_fit_into_ids_are_refused(name):
    with pytest.raises(FlexmoeError, match="model name"):
        Budgets(name, (0.0,))


def test_settings_survive_json():
    found = settings(
        api_key="k", slo=Slo(ttft_ms=500, tpot_ms=50, richest="0", poorest="40"), base="weights"
    )
    assert ServeSettings.model_validate_json(found.model_dump_json()) == found
