"""The handler's memory for the largest result of a job with a large input: `make bench` has the table."""

import statistics

from benchmarks.memory import INPUT_MB, LIMIT_SHARE, SIZES_MB, measure


def test_the_largest_result_takes_little_more_memory_than_an_empty_handler() -> None:
    # Of some fourteen runs one was at 0.85, the others below 0.5, and its cause is not known; without a safeguard all
    # were above 1.
    shares = [measure(max(SIZES_MB), INPUT_MB)["share"] for _ in range(2)]
    if min(shares) <= LIMIT_SHARE < max(shares):
        shares.append(measure(max(SIZES_MB), INPUT_MB)["share"])
    assert statistics.median_low(shares) <= LIMIT_SHARE
