"""What the benchmarks count on the published architectures, that they run, and that documents have their numbers."""

import re
from itertools import combinations, product
from pathlib import Path
from unittest import mock

import cost
import mechanism
import numpy as np
import pytest
import report
import rows as runs
import starts
import torch
import tuning
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import T5Config
from variants import VARIANTS, variant

from diffusers_tsam import tsam
from diffusers_tsam.evaluation.__main__ import main as evaluation
from diffusers_tsam.evaluation.prompts import Prompt
from diffusers_tsam.evaluation.report import Scores
from diffusers_tsam.evaluation.runs import Run
from tiny import tiny_components, tiny_pixart_components, tiny_unet


ROOT = Path(__file__).parent.parent
COUNTED = [  # the forward pass as far as the last map, back, and the maps: GFLOP, of a plain step's
    (cost.simulate, "sd", 512, (398 + 445 + 6) / 1607),
    (cost.simulate, "pixart", 512, (817 + 896 + 44) / 2472),
    (cost.simulate_modular, "sdxl", 1024, 11268 / 13522),
]


@pytest.mark.parametrize("simulate, kind, size, ratio", COUNTED)
def test_a_guided_pass_computes_and_keeps_only_what_it_needs(simulate, kind, size, ratio):
    plain, *_, guided = simulate(kind, size, "meta")
    assert guided.flop / plain.flop == pytest.approx(ratio, rel=0.005)
    if simulate is cost.simulate:
        *others, guidance = simulate(kind, size, "cpu")
        assert guidance.peak < 1.25 * max(counter.peak for counter in others)


def test_the_presets_make_the_updates_that_are_counted_and_a_fast_picture_takes_at_most_half_as_much_again():
    updates = cost.number_of_updates
    expected = {"sd": (85, 40), "pixart": (55, 34), "sdxl": (85, 40), "sd3": (55, 34), "flux": (55, 34)}
    assert {kind: (updates(kind, "paper", 50), updates(kind, "fast", 50)) for kind in expected} == expected
    for (kind, ratio), steps in product({"sd": 0.528, "pixart": 0.711}.items(), (10, 20, 25, 50, 100)):
        assert 1 + ratio * updates(kind, "fast", steps) / steps <= 1.5


def test_counting_without_data_leaves_none_behind():
    def types():
        maps = torch.rand(1, 2, 16, 16)
        return type(tsam.smooth(maps)), type(tsam.spread_of(maps))

    with cost.made_in(torch.float32, "cpu"):
        assert types() == (FakeTensor, FakeTensor)
    assert types() == (torch.Tensor, torch.Tensor)
    assert torch.get_default_dtype() is torch.float32


def test_the_models_that_are_counted_have_no_dropout():
    config = {"d_model": 8, "d_ff": 8, "num_heads": 1, "vocab_size": 9}
    with mock.patch.multiple(cost, T5Config=lambda **_: T5Config(**config, num_layers=1), build_denoiser=mock.Mock()):
        encoder = cost.build_components("pixart")["text_encoder"]
    assert encoder.config.dropout_rate > 0 and not any(module.training for module in encoder.modules())


@pytest.mark.parametrize("kind, components", [("sd", tiny_components), ("pixart", tiny_pixart_components)])
def test_what_pictures_cost_is_measured_of_a_batch_of_every_method(kind, components, monkeypatch):
    def drawn(pipe, kind, device, arguments):
        one = measure(pipe, kind, device, arguments) if arguments.get("preset") == "light" else {"guided_passes": 1}
        return len(pipe(cost.PROMPT, **arguments).images), one["guided_passes"]

    unet = {"unet": tiny_unet(4, (8, 16, 16, 16, 16), 16)} if kind == "sd" else {}  # Attend-and-Excite reads 2x2 maps
    measure = cost.measure
    monkeypatch.setattr(cost, "build_components", lambda _: components() | unet)
    monkeypatch.setattr(cost, "measure", drawn)
    found = cost.pictures(kind, torch.device("cpu"), torch.float32, 64, 2, 2)
    assert found == dict.fromkeys([*cost.WAYS, *["Attend-and-Excite"] * (kind == "sd")], (2, 1))


def test_attention_is_counted_on_a_cpu_too():
    def flop(device):
        q = torch.ones(1, 2, 8, 4, device=device)
        return cost.counted([lambda: scaled_dot_product_attention(q, q, q)])[0].flop

    assert flop("cpu") == flop("meta") > 0


@pytest.mark.parametrize(
    "setting, words",
    [
        ("stock", "stock"),
        ("tsam", "`l1`"),
        ("tsam:preset=fast", "`contrast`, preset fast"),
        ("tsam:preset=light:objective=attainable:alpha=4:gamma=4", "`attainable`, preset light, α 4"),
        ("conform:sharpness=none:alpha=4:preset=fast", "CONFORM's loss, words given, preset fast, α 4"),
    ],
)
def test_a_method_has_words(setting, words):
    assert report.described(setting) == words


def test_tables_rows_figure_and_cards_are_those_of_the_runs_whose_solids_were_counted(tmp_path, monkeypatch):
    found = {"stock": 2, "tsam:preset=fast": 4, "conform:preset=light:alpha=1": 3, "syngen": None}  # right, of four
    found |= {"tsam:preset=light": 3, "tsam": 1}
    settings = {"methods": {name: {} for name in found}, "seeds": 2, "format": "png", "model": "pixart"}
    settings |= {"prompt_set": "shapes:2:test:2", "kind": "pixart", "arguments": {"num_inference_steps": 25}}
    prompts = [Prompt(str(k), text, []) for k, text in enumerate(("a red cube and a blue ring", "a white star"))]
    run = Run.create(tmp_path / "evaluation" / "pixart-2-counted", settings, prompts)
    (run.folder / "score-judge.json").write_text('{"counted": true}')
    for (method, right), k in product(enumerate(found.values()), range(4)):
        if right:
            own = {"method": method, "prompt": k // 2, "seed": k % 2}
            seen = [["red", "cube"], ["blue", "ring"]] if k < 2 else [["white", "star"]]
            with run.writer("drawn", 0) as drawn, run.writer("score-judge", 0) as scored:
                drawn([own | {"updates": method}])
                count = len(seen) + (k >= right)  # a double
                more = dict.fromkeys(("touching", "missing", "swap"), 0) | {"double": int(k >= right)}
                scored([own | more | {"counted": int(k < right), "right": 1, "seen": seen, "count": count}])
    for module in (report, runs):
        monkeypatch.setattr(module, "RESULTS", tmp_path)

    counted, *_ = report.measured()
    table = report.counted_table(counted).splitlines()
    assert table[0] == "| counted right | PixArt-α |" and table[2].startswith("| stock, two solids | 50.0 ± 98.0 % |")
    assert table[3] == '| T-SAM, `preset="fast"` | +50.0 ± 98.0 |'
    assert table[5] == '| T-SAM, `preset="paper"` | -25.0 ± 49.0 |'
    assert table[6] == "| the best peer of these pictures, told the words | +25.0 ± 49.0 (CONFORM, light) |"
    assert table[7:9] == ["| stock, three solids |  |", '| T-SAM, `preset="fast"` |  |']  # not drawn
    every = report.counted_tables(counted[2])
    assert "| CONFORM's loss, words given, preset light, α 1 (4) | 75.0 ± 49.0 % | +25.0 ± 49.0 | 50 % of 2 |" in every
    assert "| 100 % of 2 | 25.0 ± 49.0 % |" in every and "nan" not in every
    assert "(4) | 100.0 ± 0.0 % | +50.0 ± 98.0 | 100 % of 2 | 100 % of 2 |" in every
    assert [len(axes.containers) for axes in report.counted_figure(counted).axes] == [4, 4]
    assert "100.0 ± 0.0 % of 4 pictures" in report.card_sentence(Scores(run))
    rows = runs.of_run(run)
    assert [row["right"] for row in rows if row["setting"] == "stock"] == [True, True, False, False]
    assert [row["caption"] for row in rows[:4]] == ["a red cube and a blue ring"] * 2 + ["a white star"] * 2
    assert {row["updates"] for row in rows} == {0, 1, 2, 4, 5}  # what was kept of drawing it


def test_the_documents_say_what_the_data_say_and_ask_only_for_what_is_there():
    for path, text in report.outputs(*report.measured()).items():
        assert path.read_text() == text, f"{path.name}: run `python benchmarks/report.py`"
    assert not re.search(r"<!-- ([\w-]+) -->\n<!-- /\1 -->", "".join(path.read_text() for path in report.DOCUMENTS))
    with pytest.raises(ValueError, match="No part is called 'nothing'; there are operations"):
        report.filled("<!-- nothing -->\n<!-- /nothing -->", {"operations": ""})


def drawn_and_kept(folder, methods, prompts, keep):
    """Rows of the small SD's pictures of two steps."""
    for _ in range(2):  # the second time nothing is left to do
        draw = ["generate", "--model", "sd", "--steps", "2", "--methods", methods, "--prompts", prompts]
        evaluation([*draw, "--keep", str(ROOT / "benchmarks" / keep), "--output", str(folder)])
        evaluation(["score", str(folder), "--metrics", "judge"])
    return runs.of_run(Run(folder))


def test_the_mechanism_is_measured_of_every_kind_of_pair_and_resampled(tmp_path):
    method = "tsam:alpha=0:gamma=1:refinement_steps=none:tsam_steps=2"
    rows = drawn_and_kept(tmp_path, method, "shapes:2:tune:2", "mechanism.py:kept")
    assert len(rows) == 2 and 0 < mechanism.sink_of(rows) < 1
    for row in rows:
        assert [pair["kind"] for pair in row["pairs"]] == ["bound", "bound", "unbound", "unbound", "objects"]
        assert all(-1 <= value <= 1 for pair in row["pairs"] for value in (pair["embeddings"], *pair["maps"]))
        assert row["matrices"]["words"] == row["caption"].split()
    pairs = [{"kind": kind, "syntax": value} for kind, value in (("bound", 3), ("bound", 1), ("unbound", 2))]
    assert mechanism.separable(pairs, "syntax") == 0.5
    assert mechanism.separable(pairs[:1] + pairs[2:], "syntax") == 1


def test_the_best_of_n_is_the_mean_over_all_choices_of_n():
    right, losses = [True, False, True, False, False], [0.3, 0.1, 0.2, 0.5, 0.4]
    for number in (1, 2, 3, 5):
        groups = list(combinations(range(5), number))
        expected = np.mean([right[min(group, key=lambda k: losses[k])] for group in groups])
        assert starts.best_of(number, np.argsort(losses), right) == pytest.approx(expected)
    prompts = [[{"stock": r, "fast": True, "contrast": [loss] * 3} for r, loss in zip(right, losses)]] * 2
    assert starts.chosen(prompts, 2, "judge", 5)[0] == pytest.approx(100 * (1 - 3 / 10))
    assert starts.chosen(prompts, 2, "contrast", 5, "fast") == (100, 0)
    right, losses = np.array(right), np.array(losses)
    assert starts.auc(losses[right], losses[~right]) == pytest.approx(4 / 6)


def test_every_loss_of_a_watched_picture_is_kept_and_none_of_a_guided_one(tmp_path, monkeypatch):
    lines = (ROOT / "benchmarks" / "variants.py").read_text().replace("STEPS = (1, 5, 10)", "STEPS = (1, 2)")
    (tmp_path / "variants.py").write_text(lines)
    watched = "tsam:alpha=0:objective=contrast:tsam_steps=2:refinement_steps=none"
    rows = drawn_and_kept(
        tmp_path / "run", f"{watched},tsam:preset=fast", "shapes:2:test:2", tmp_path / "variants.py:losses"
    )
    assert [set(row.get("starts", ())) for row in rows] == [{*VARIANTS, *starts.LOSSES}] * 2 + [set()] * 2
    assert all(own["contrast"] == pytest.approx(row["loss"], abs=1e-3) for row in rows[:2] for own in [row["starts"]])


def test_variants_change_one_constant_of_the_contrast_and_are_counted_beside_stock():
    torch.manual_seed(0)
    maps, t, content = torch.rand(2, 6, 4, 4), torch.rand(2, 6, 6).tril(), torch.ones(2, 6, dtype=torch.bool)
    text = tsam.Syntax(t, t, content, [], tsam.relation_of(t, content))
    loss = {name: own(maps, text) for name, own in VARIANTS.items()}
    torch.testing.assert_close(variant()(maps, text), loss["contrast"])
    torch.testing.assert_close(loss["place_0"], tsam.relation(maps, text))
    doubled = loss["place_0"] + 2 * (loss["place_half"] - loss["place_0"])
    torch.testing.assert_close(loss["place_1"], doubled)
    assert not any(torch.allclose(loss["contrast"], own) for name, own in loss.items() if name != "contrast")
    table = tuning.tables()
    assert all(f"| {words} |" in table for words in tuning.CHANGED.values())
    assert all(f"| {name} |" in table for name in VARIANTS)
