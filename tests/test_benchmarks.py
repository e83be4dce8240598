"""What the benchmarks count on the published architectures, that they run, and that documents have their numbers."""

import re
import runpy
import sys
from pathlib import Path

import pytest


BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture
def cost():
    import cost

    return cost


# The forward pass as far as the last map, and back, 398 + 445 of 1607 GFLOP and 817 + 896 of 2472, and the maps beside
@pytest.mark.parametrize("kind, ratio, memory", [("sd", 849 / 1607, 1.25), ("pixart", 1757 / 2472, 1.25)])
def test_a_guided_pass_computes_and_keeps_only_what_it_needs(cost, kind, ratio, memory):
    (plain, _, guided), _ = cost.simulate(kind, 512, "meta")
    assert guided / plain == pytest.approx(ratio, rel=0.005)
    _, (step, decoding, guidance) = cost.simulate(kind, 512, "cpu")
    assert guidance < memory * max(step, decoding)


def test_a_guided_pass_of_sdxl_costs_less_than_its_plain_step(cost):
    (plain, guided), _ = cost.simulate_modular("sdxl", 1024, "meta")
    assert guided / plain == pytest.approx(11268 / 13522, rel=0.005)


@pytest.mark.parametrize("kind", ["sd", "pixart"])
@pytest.mark.parametrize("steps", [10, 20, 25, 50, 100])
def test_a_fast_picture_takes_at_most_one_and_a_half_times_the_operations(cost, kind, steps):
    ratio = {"sd": 0.528, "pixart": 0.711}[kind]
    assert 1 + ratio * cost.number_of_updates(kind, "fast", steps) / steps <= 1.5
    assert cost.number_of_updates(kind, "paper", 50) == {"sd": 85, "pixart": 55}[kind]


def test_alignment_goes_on_where_it_was_stopped(tmp_path, monkeypatch, capsys):
    def run(*settings):
        few = "--prompts 2 --seeds 1 --steps 2 --solids 3 --output".split()
        monkeypatch.setattr(sys, "argv", ["alignment.py", *few, str(results), "--setting", *settings])
        runpy.run_path(str(BENCHMARKS / "alignment.py"), run_name="__main__")
        return capsys.readouterr().out

    results = tmp_path / "results" / "alignment.jsonl"
    first, lines = run("tuned"), results.read_text()
    assert "| tuned (2) |" in first and "tuned: 2 pictures" in first
    again = run("tuned")
    assert "pictures" not in again and "| tuned (2) |" in again and results.read_text() == lines
    assert "conform,alpha=4: 2 pictures" in run("tuned", "conform,alpha=4")


def test_the_documents_say_what_the_data_say():
    import report

    for path, text in report.outputs().items():
        assert path.read_text() == text, f"{path.name}: run `python benchmarks/report.py`"
    assert not re.search(r"<!-- ([\w-]+) -->\n<!-- /\1 -->", "".join(path.read_text() for path in report.DOCUMENTS))


def test_a_document_asks_only_for_what_is_there():
    import report

    with pytest.raises(ValueError, match="No part is called 'nothing'; there are operations"):
        report.filled("<!-- nothing -->\n<!-- /nothing -->", {"operations": ""})
