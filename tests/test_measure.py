"""How cost is measured: in turn, in pairs, in fresh processes, and how sure it is."""

import operator
import signal
from functools import partial

import numpy as np
import pytest
import torch

from experiments.cost import measure
from experiments.cost.measure import OutOfMemory, interleave, paired_ratio, peak_in_child, peak_memory


def test_arms_take_turns():
    log = []
    calls = {name: partial(log.append, name) for name in "ABC"}
    times = interleave(calls, num_warmup=2, num_runs=4)
    assert "".join(log) == "ABC" * 6
    assert all(len(times[name].time) == len(times[name].cpu) == 4 for name in "ABC")


def test_rounds_stop_when_time_is_up_but_not_before_three():
    assert len(interleave({"A": int}, 1, 50, max_seconds=1e-9)["A"].time) == measure.MIN_RUNS
    assert len(interleave({"A": int}, 1, 2, max_seconds=1e-9)["A"].time) == 2
    assert len(interleave({"A": int}, 1, 50, max_seconds=600)["A"].time) == 50


def test_clock_and_cpu_time_differ():
    from time import sleep

    times = interleave({"sleeps": lambda: sleep(0.05), "works": lambda: sum(range(2_000_000))}, 0, 3)
    assert min(times["sleeps"].time) >= 50
    assert max(times["sleeps"].cpu) < 25
    assert min(times["works"].cpu) > 5


def test_a_ratio_is_the_median_of_ratios_within_rounds():
    fast = [1, 10, 100, 5, 50]  # the machine slows down and recovers, for both arms
    ratio = paired_ratio([3 * time for time in fast], fast)
    assert (ratio.median, ratio.low, ratio.high) == pytest.approx((3, 3, 3))
    ratio = paired_ratio([2, 4, 12, 5, 3], [1, 1, 1, 1, 1])
    assert ratio.median == 4
    assert 2 <= ratio.low < 4 < ratio.high <= 12


def test_the_interval_of_a_ratio_holds_the_truth():
    rng = np.random.default_rng(1)
    held = 0
    for _ in range(200):
        fast = np.exp(rng.normal(size=15))
        ratio = paired_ratio(2.5 * fast * np.exp(0.2 * rng.normal(size=15)), fast, num_resamples=400)
        held += ratio.low <= 2.5 <= ratio.high
    assert 175 <= held < 200


def test_memory_is_that_of_a_known_allocation():
    size = 200_000_000
    filled = partial(operator.mul, b"x")
    assert peak_in_child(partial(partial, filled, size)) == pytest.approx(size, rel=0.1)
    assert peak_memory(partial(filled, size)) == pytest.approx(size, rel=0.1)

    def twice():
        torch.ones(size // 4)  # is freed: the peak holds one of them
        return torch.ones(size // 4)

    assert peak_memory(twice) == pytest.approx(size, rel=0.1)


def test_a_child_that_may_not_take_the_memory():
    with pytest.raises(OutOfMemory, match="memory"):
        peak_in_child(partial(partial, torch.ones, 50_000_000), limit=50_000_000)


def test_a_child_that_is_killed_ran_out_of_memory():
    with pytest.raises(OutOfMemory, match="ended by SIGKILL"):
        peak_in_child(partial(partial, signal.raise_signal, signal.SIGKILL))


def test_a_child_with_a_defect_is_no_result(capfd):
    with pytest.raises(RuntimeError, match="exit code 1"):
        peak_in_child(partial(partial, operator.mul, None, None))
    assert "TypeError" in capfd.readouterr().err


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 91 GiB"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory: you tried"),
        OSError(12, "Cannot allocate memory"),
    ],
)
def test_what_full_memory_raises_has_one_name(error):
    with pytest.raises(OutOfMemory, match="memory"), measure.out_of_memory_named():
        raise error
    with pytest.raises(ValueError, match="shapes"), measure.out_of_memory_named():
        raise ValueError("shapes differ")


def test_difference():
    expected = torch.linspace(-2, 4, 6000).view(1, 3, 20, 100)
    result = expected.clone()
    result[0, 1, 7, 3] += 0.2
    assert measure.difference(result, expected) == pytest.approx(0.05)
    assert measure.difference(expected.clone(), expected) == 0
    result[0, 0, 0, 0] = torch.nan
    assert np.isnan(measure.difference(result, expected))
