"""Numbers and names for people."""

import pytest

from flexmoe.plan import Member
from flexmoe.reports.report import count, measured_rows, member_row, size


@pytest.mark.parametrize(
    ("number", "bytes_", "counted"),
    [
        (0, "0 B", "0"),
        (999.4, "999 B", "999"),
        (999.6, "1 kB", "1 k"),
        (999_600_000, "1 GB", "1 B"),
        (4_643_584, "4.64 MB", "4.64 M"),
        (2_680 * 10**12, "2,680 TB", "2,680,000 B"),
    ],
)
def test_numbers_have_three_digits_and_no_exponent(number, bytes_, counted):
    assert (size(number), count(number)) == (bytes_, counted)


def test_budgets_are_named_to_the_digit():
    figures = {"achieved": 0.1254, "routed_parameters": 7, "active_parameters": 3, "bytes": 14}
    assert member_row(Member(pruned=0.125, **figures)) == ["12.5%", "12.54%", "7", "3", "14 B"]


def test_names_of_files_and_tasks_are_as_they_are():
    rows = measured_rows([{"files": {"my_file.v_2": 2.0}, "pairs": {"margin_ratio": 0.5}}])
    assert set(rows) == {"loss: my_file.v_2", "pairs: margin ratio"}
