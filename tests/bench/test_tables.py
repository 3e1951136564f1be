import pytest

from distopt.bench.tables import text_table


def test_columns_are_as_wide_as_their_longest_cell():
    assert text_table(["name", "n"], [["a", "1"], ["longer", "100"]]) == (
        "name      n\n------  ---\na         1\nlonger  100"
    )


def test_a_row_with_a_cell_too_few_is_refused():
    with pytest.raises(ValueError, match="2 cells, got 1"):
        text_table(["a", "b"], [["1"]])
