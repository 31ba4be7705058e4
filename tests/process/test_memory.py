"""The handler's memory for the largest result of a job with a large input: `make bench` has the table."""

from benchmarks.memory import INPUT_MB, LIMIT_SHARE, SIZES_MB, measure


def test_the_largest_result_takes_little_more_memory_than_an_empty_handler() -> None:
    assert measure(max(SIZES_MB), INPUT_MB)["share"] <= LIMIT_SHARE
