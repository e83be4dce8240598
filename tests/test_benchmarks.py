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


def test_layout_and_long_prompts_go_on_where_they_were_stopped(tmp_path, monkeypatch, capsys):
    def run(script, *arguments):
        results = tmp_path / f"{script}.jsonl"
        few = ["--prompts", "2", "--steps", "2", "--output", str(results)]
        monkeypatch.setattr(sys, "argv", [f"{script}.py", *few, *arguments])
        runpy.run_path(str(BENCHMARKS / f"{script}.py"), run_name="__main__")
        return capsys.readouterr().out, results.read_text()

    first, lines = run("layout", "--setting", "tuned")
    assert "stock: 2 pictures" in first and "tuned: 2 pictures" in first and "| tuned (2) |" in first
    again = run("layout", "--setting", "tuned")
    assert again[1] == lines and "pictures," not in again[0] and "| tuned (2) |" in again[0]
    first, lines = run("long_prompts")
    assert "filled, stock, cut: " in first and "filled, tuned: " in first and lines.count("\n") == 10
    assert run("long_prompts")[1] == lines


@pytest.mark.parametrize("place, there", [((0.2, 0.2), True), ((0.5, 0.2), False), ((0.2, 0.7), False)])
def test_a_solid_is_where_it_was_asked_for_if_it_is_seen_inside(place, there):
    import layout

    row = {"regions": {"red cube": (0.0, 0.0, 0.5, 0.5), "blue ring": (0.5, 0.5, 1.0, 1.0)}}
    judged = layout.judged(row | {"places": [["red", "cube", *place], ["white", "star", 0.7, 0.7]]})
    assert (judged["seen"], judged["placed"], judged["all"]) == (0.5, 0.5 * there, False)


def test_the_documents_say_what_the_data_say():
    import report

    for path, text in report.outputs().items():
        assert path.read_text() == text, f"{path.name}: run `python benchmarks/report.py`"
    assert not re.search(r"<!-- ([\w-]+) -->\n<!-- /\1 -->", "".join(path.read_text() for path in report.DOCUMENTS))


def test_a_document_asks_only_for_what_is_there():
    import report

    with pytest.raises(ValueError, match="No part is called 'nothing'; there are operations"):
        report.filled("<!-- nothing -->\n<!-- /nothing -->", {"operations": ""})


def test_the_mechanism_is_measured_of_every_kind_of_pair_and_resampled(tmp_path, monkeypatch):
    import mechanism
    from alignment import load

    output = tmp_path / "mechanism.jsonl"
    monkeypatch.setattr(sys, "argv", f"mechanism.py --prompts 2 --seeds 1 --steps 2 --output {output}".split())
    mechanism.main()
    rows = load(output)
    assert len(rows) == 2 and 0 < mechanism.sink_of(rows) < 1
    for row in rows:
        assert [pair["kind"] for pair in row["pairs"]] == ["bound", "bound", "unbound", "unbound", "objects"]
        assert all(-1 <= value <= 1 for pair in row["pairs"] for value in (pair["embeddings"], *pair["maps"]))
    pairs = [{"kind": kind, "syntax": value} for kind, value in (("bound", 3), ("bound", 1), ("unbound", 2))]
    assert mechanism.separable(pairs, "syntax") == 0.5
    assert mechanism.separable(pairs[:1] + pairs[2:], "syntax") == 1
