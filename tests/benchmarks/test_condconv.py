"""The figures of conditional convolutions: ratios of one round, and what the assembled twin's blocks add up to."""

from benchmarks import condconv, condconv_forms


def test_ratios_are_taken_within_a_round(monkeypatch) -> None:
    now = [0.0]
    monkeypatch.setattr("time.process_time", lambda: now[0])
    slow_round = [1, 1, 10, 1]  # the first warms up; everything takes ten times as long in the third

    def takes(seconds):
        rounds = iter(slow_round)

        def run():
            now[0] += seconds * next(rounds)

        return run

    figures = condconv_forms.ratios({"plain": takes(2.0), "other": takes(3.0)}, "plain", 3)
    assert figures["plain"] == {"ratio": 1, "low": 1, "high": 1, "ms": 2000}
    assert figures["other"] == {"ratio": 1.5, "low": 1.5, "high": 1.5, "ms": 3000}


def test_blocks_without_experts_count_as_the_twins() -> None:
    def rows(**ms):
        return [{"router": router, "batch": batch, "ms": batch * value} for batch in (1, 2) for router, value in ms.items()]

    sums = condconv._sums({"down.0": rows(assembled=10, timestep=12), "mid": rows(assembled=30)}, ["assembled", "timestep"])
    assert sums == [
        {"router": "assembled", "batch": 1, "ratio": 1, "ms": 40},
        {"router": "timestep", "batch": 1, "ratio": 1.05, "ms": 42},
        {"router": "assembled", "batch": 2, "ratio": 1, "ms": 80},
        {"router": "timestep", "batch": 2, "ratio": 1.05, "ms": 84},
    ]
