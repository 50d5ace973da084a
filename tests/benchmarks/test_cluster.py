"""`benchmarks/cluster.py`: an estimate follows from its assumptions."""

from dataclasses import replace

import pytest
from cluster import JobAssumptions, estimate_job

JOB = JobAssumptions(
    texts=1e9, tokens_per_text=100.0, gpus=10.0, parameters=1e8, gpu_tflops=200.0, utilisation=0.5, start_minutes=0.0,
    gpu_hours_per_failure=1e12, driver_texts_per_s=1e9, price_per_gpu_hour=2.0,
)  # fmt: skip


def test_the_slower_of_gpus_and_driver_decides() -> None:
    fast = estimate_job(JOB)
    assert fast.tokens_per_s == 5e5
    assert fast.hours == pytest.approx(1e11 / 5e6 / 3600)
    assert fast.dollars == pytest.approx(20 * fast.hours)
    assert estimate_job(replace(JOB, driver_texts_per_s=1e4)).hours == pytest.approx(1e9 / 1e4 / 3600)


def test_what_is_lost_takes_time_and_an_endless_job_is_refused() -> None:
    fast, lossy = estimate_job(JOB), estimate_job(replace(JOB, preemptions_per_gpu_hour=1.0))
    # Each GPU is away for ten minutes of every hour, and computes two units again.
    assert fast.hours / lossy.hours == pytest.approx(5 / 6, abs=0.01)
    assert lossy.losses == pytest.approx(10 * lossy.hours)
    with pytest.raises(SystemExit, match="lost faster than they are replaced"):
        estimate_job(replace(JOB, preemptions_per_gpu_hour=10.0))
