"""What the benchmarks count on the published architectures, and that they run."""

import runpy
import sys
from pathlib import Path

import pytest


BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture(autouse=True)
def importable(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))


@pytest.fixture
def cost():
    import cost

    return cost


# The forward pass as far as the last map, and back: 398 + 445 of 1607 GFLOP, 817 + 896 of 2472
@pytest.mark.parametrize("kind, ratio, memory", [("sd", 843 / 1607, 1.25), ("pixart", 1713 / 2472, 1.25)])
def test_a_guided_pass_computes_and_keeps_only_what_it_needs(cost, kind, ratio, memory):
    (plain, _, guided), _ = cost.simulate(kind, 512, "meta")
    assert guided / plain == pytest.approx(ratio, rel=0.02)
    _, (step, decoding, guidance) = cost.simulate(kind, 512, "cpu")
    assert guidance < memory * max(step, decoding)


@pytest.mark.parametrize("kind", ["sd", "pixart"])
@pytest.mark.parametrize("steps", [10, 20, 25, 50, 100])
def test_a_fast_picture_takes_at_most_one_and_a_half_times_the_operations(cost, kind, steps):
    ratio = {"sd": 0.524, "pixart": 0.692}[kind]
    assert 1 + ratio * cost.number_of_updates(kind, "fast", steps) / steps <= 1.5
    assert cost.number_of_updates(kind, "paper", 50) == {"sd": 85, "pixart": 55}[kind]


def test_alignment_goes_on_where_it_was_stopped_and_passes_draws_its_curve(tmp_path, monkeypatch, capsys):
    def run(script, *arguments):
        monkeypatch.setattr(sys, "argv", [script, *arguments])
        runpy.run_path(str(BENCHMARKS / script), run_name="__main__")
        return capsys.readouterr().out

    monkeypatch.chdir(tmp_path)
    results = tmp_path / "results" / "alignment.jsonl"
    few = "--prompts 2 --seeds 1 --steps 2 --solids 3 --setting tuned".split()
    first, lines = run("alignment.py", *few), results.read_text()
    assert "| tuned (2) |" in first and "tuned: 2 pictures" in first
    again = run("alignment.py", *few)
    assert "pictures" not in again and "| tuned (2) |" in again and results.read_text() == lines
    assert "| tuned | 1 |" in run("passes.py", str(results), "--output", "curve.png")
    assert (tmp_path / "curve.png").stat().st_size > 5000
