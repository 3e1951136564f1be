"""docs/codecs.md lists every codec with its bytes, and its examples run."""

import re
from pathlib import Path

import numpy as np
import pytest

from distopt.aggregators import codecs

TEXT = (Path(__file__).parent.parent / "docs" / "codecs.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
ROWS = dict(re.findall(r"^\| `(\w+)[^|]*\|[^|]*\| ([^|]*?) \|", TEXT, re.MULTILINE))


def test_every_codec_has_a_row():
    assert list(ROWS) == list(codecs.NAMES)


@pytest.mark.parametrize(
    ("name", "bytes_in_words", "expected"),
    [
        ("fp16", "2n + n/b", lambda n, b: 2 * n + n // b),
        ("bf16", "2n", lambda n, b: 2 * n),
        ("int8", "n + 4n/b", lambda n, b: n + 4 * n // b),
        ("sign", "n/8 + 4n/b", lambda n, b: n // 8 + 4 * n // b),
    ],
)
def test_the_bytes_of_a_row_are_what_is_sent(name, bytes_in_words, expected):
    assert ROWS[name] == bytes_in_words
    n = 3 * 4096
    assert codecs.get(name).encode(np.ones(n, np.float32)).size == expected(n, 4096)


def test_the_first_example_makes_an_optimizer():
    names = {}
    exec(BLOCKS[0], names)
    assert names["optimizer"].gradient_aggregator.codec.name == "ef-topk:0.01:fp16"


def test_a_codec_of_ones_own_does_what_the_page_says(capsys):
    own = re.search(r"class Steps.*?(?=\n\n\n)", BLOCKS[1], re.DOTALL)[0]
    assert len(own.splitlines()) <= 30
    names = {}
    exec(compile(BLOCKS[1], "docs/codecs.md", "exec"), names)
    assert capsys.readouterr().out == "[0.375, 0.375]\n"
    codec = names["Steps"]()
    assert codec.wire_bytes(1000) == 1000
    decoded = codec.decode(codec.encode(np.array([np.nan, np.inf, 1.06, -99], "f4")), 4)
    np.testing.assert_array_equal(decoded, [np.nan, np.nan, 1.0, -127 / 8])
