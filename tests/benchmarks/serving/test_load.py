"""What the load benchmark makes of answers, and that its page shows what it wrote."""

from pathlib import Path

from benchmarks.serving.load import Answer, Row, markdown, row_of


def test_a_picture_that_two_requests_got_was_lost_to_one() -> None:
    answers = [Answer(0.1 * (number + 1), picture) for number, picture in enumerate(["a", "b", "b", None])]
    row = row_of(2, answers, 4, 2.0, 1.5, batches=True)
    assert (row.answered, row.requests, row.per_second) == (2, 4, 1.0)
    assert row.p50 == 0.25
    assert 0.35 < row.p95 <= 0.4


def test_the_table_compares_with_one_by_one() -> None:
    rows = [Row(1, True, 10, 10, 1.0, 10.0, 0.1, 0.2, 1.0), Row(4, False, 10, 9, 0.5, 18.0, 0.3, 0.4, 1.0)]
    table = markdown(rows, {"requests": 20, "answered": 20, "clients": 4, "resident_mib": [100.0, 101.0, 102.4]})
    assert "| 1 | 1.0 | 10.0 | 1.00 | 0.100 | 0.200 | 10 of 10 |" in table.splitlines()
    assert "| 4 | 1 (`--max-batch 1`) | 18.0 | 1.80 | 0.300 | 0.400 | 9 of 10 |" in table.splitlines()
    assert "was 100 MiB before them, 101 in the middle and 102 after them." in table


def test_the_page_shows_the_table_that_was_written() -> None:
    assert Path("benchmarks/results/serving.md").read_text().strip() in Path("docs/serving.md").read_text()
