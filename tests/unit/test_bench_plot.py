"""The picture of the README is that of the results."""

from pathlib import Path

from bench.plot import OUT, draw


def test_the_picture_is_up_to_date(tmp_path: Path) -> None:
    draw(tmp_path / "benchmarks.svg")
    assert (tmp_path / "benchmarks.svg").read_bytes() == OUT.read_bytes(), "python -m bench.plot"
