"""The evaluation's commands on the model that ships, and its metrics on tiny random models beside literal ones."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    BertTokenizer,
    BlipConfig,
    BlipForConditionalGeneration,
    BlipForQuestionAnswering,
    BlipImageProcessor,
    BlipProcessor,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPProcessor,
)

from diffusers_tsam.evaluation import report as reports
from diffusers_tsam.evaluation.__main__ import main
from diffusers_tsam.evaluation.baselines import BASELINES
from diffusers_tsam.evaluation.generate import generate, parse_method, plan
from diffusers_tsam.evaluation.prompts import FORMS, Prompt, load, things_of_template
from diffusers_tsam.evaluation.runs import Run, save
from diffusers_tsam.evaluation.score import (
    TEMPLATES,
    BlipAnswers,
    Caption,
    Clip,
    Nearest,
    Shapes,
    Tifa,
    in_template,
)
from diffusers_tsam.shapes import scenes
from diffusers_tsam.tsam_arguments import Settings
from tiny import tiny_tokenizer


PROMPTS, SEEDS = "shapes:3:test:2", 2
METHODS = "stock,tuned,conform:sharpness=none:preset=light:alpha=4"
DRAW = (
    f"generate --model sd --methods {METHODS} --prompts {PROMPTS} --seeds {SEEDS} --steps 3 --batch 3 --output".split()
)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A small run, drawn, scored and reported by the three commands."""
    folder = tmp_path_factory.mktemp("evaluation") / "run"
    main([*DRAW, str(folder)])
    main(["score", str(folder), "--metrics", "judge"])
    main(["report", str(folder)])
    return folder


def pictures(folder):
    found = sorted((Path(folder) / "pictures").rglob("*.png"))
    return {path.relative_to(folder): path.read_bytes() for path in found}


def copied(run, tmp_path):
    import shutil

    return shutil.copytree(run, tmp_path / "run")


def refused(capsys, *argv):
    """What a command says when it refuses."""
    with pytest.raises(SystemExit) as stopped:
        main(list(map(str, argv)))
    return str(stopped.value.code)


def test_three_commands_draw_score_and_report(run):
    assert len(pictures(run)) == 3 * 2 * SEEDS
    assert len(set(pictures(run).values())) == 3 * 2 * SEEDS  # no two alike
    text = (run / "report.md").read_text()
    assert "| stock (4) |" in text and "| conform:sharpness=none:preset=light:alpha=4 (4) |" in text
    assert "12 of 12 pictures drawn" in text
    assert "| right, % | over stock | every solid in its colour, % | over stock | right but for a double, % |" in text
    page = (run / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 2 and "http" not in page
    assert json.loads((run / "settings.json").read_text())["methods"]["stock"] == {"tsam_steps": 0}


def test_a_stopped_run_goes_on_where_it_was(run, tmp_path):
    folder, before = copied(run, tmp_path), pictures(run)
    lost = folder / sorted(before)[5]
    lost.unlink()
    lines = (folder / "drawn-0.jsonl").read_text().splitlines(keepends=True)
    (folder / "drawn-0.jsonl").write_text("".join(lines[:-2]) + lines[-2][:20])  # as if it had been killed
    (lost.parent / f".{lost.name}").write_bytes(b"half of a picture")
    kept = sorted(set(before) - {sorted(before)[5]})[0]
    stamp = (folder / kept).stat().st_mtime_ns
    main([*DRAW, str(folder)])
    assert pictures(folder) == before
    assert (folder / kept).stat().st_mtime_ns == stamp
    again = Run(folder)
    assert again.done("drawn").all() and again.present().all()
    assert (folder / "drawn-0.jsonl").read_text().count("\n") == len(lines) + 1  # one was drawn twice


def test_two_processes_draw_the_pictures_that_one_draws(run, tmp_path):
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    paths = os.pathsep.join(path for path in sys.path if path)
    threads = str(torch.get_num_threads())  # which the launcher would set to 1: another number rounds otherwise
    environment = os.environ | {"OMP_NUM_THREADS": threads, "PYTHONPATH": paths}
    done = subprocess.run(
        [*launch, "-m", "diffusers_tsam.evaluation", *DRAW, str(tmp_path / "run")],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert pictures(tmp_path / "run") == pictures(run)
    each = [len((tmp_path / "run" / f"drawn-{k}.jsonl").read_text().splitlines()) for k in (0, 1)]
    assert sum(each) == 12 and min(each) > 0


def test_the_same_folder_takes_more_methods_and_seeds_but_no_other_settings(run, tmp_path, capsys):
    folder, before = copied(run, tmp_path), pictures(run)
    more = [*DRAW, str(folder), "--methods", "stock,tsam:alpha=1", "--seeds", "3"]
    main(more)
    after = pictures(folder)
    assert {name: after[name] for name in before} == before
    assert len(after) == 12 + 2 + 6  # a third seed of stock, three of the new method
    said = refused(capsys, *DRAW, folder, "--steps", "4")
    assert "drawn with other settings: arguments" in said and "Choose another folder" in said
    assert "prompt_set" in refused(capsys, *DRAW, folder, "--prompts", "shapes:3:test:3")


def test_a_prompt_file_that_has_changed_is_refused(tmp_path, capsys):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red cube and a blue star\n\n")
    once = ["generate", "--model", "sd", "--methods", "stock", "--steps", "1", "--prompts", str(prompts)]
    main([*once, "--output", str(tmp_path / "run")])
    prompts.write_text("a red cube and a blue ring\n")
    assert "other settings: prompts" in refused(capsys, *once, "--output", tmp_path / "run")


def test_errors_say_what_to_do(run, tmp_path, capsys):
    nothing = tmp_path / "nothing"
    assert "Run `generate` into it first" in refused(capsys, "score", nothing, "--metrics", "judge")
    assert "'clips', but has to be one of clip, caption, tifa, judge" in refused(
        capsys, "score", run, "--metrics", "clips"
    )
    assert "Pass --questions" in refused(capsys, "score", run, "--metrics", "tifa")
    unscored = copied(run, tmp_path)
    for path in unscored.glob("score-*"):
        path.unlink()
    assert "no scores yet" in refused(capsys, "report", unscored)
    victim = sorted((unscored / "pictures").rglob("*.png"))[0]
    victim.unlink()
    assert "1 pictures are missing, the first of them" in refused(capsys, "score", unscored, "--metrics", "judge")
    (unscored / "drawn-0.jsonl").unlink()
    assert "no pictures yet" in refused(capsys, "score", unscored, "--metrics", "judge")
    assert "is no file and none of" in refused(capsys, *DRAW, tmp_path / "new", "--prompts", "objekts")
    assert "but has to be one of stock" in refused(capsys, *DRAW, tmp_path / "new", "--methods", "tsma")
    assert "has no argument 'sharpness'" in refused(
        capsys, *DRAW, tmp_path / "new", "--methods", "syngen:sharpness=none"
    )
    assert "no argument and value" in refused(capsys, *DRAW, tmp_path / "new", "--methods", "tsam:alpha")
    assert not (tmp_path / "new").exists()


def test_scores_of_another_model_are_refused(run, tmp_path, capsys):
    folder = copied(run, tmp_path)
    (folder / "score-judge.json").write_text('{"clip": "another"}\n')
    assert "was scored with" in refused(capsys, "score", folder, "--metrics", "judge")


@pytest.mark.parametrize(
    "text, expected",
    [
        ("stock", {"tsam_steps": 0}),
        ("tsam:alpha=20:objective=attainable", {"alpha": 20.0, "objective": "attainable"}),
        ("tsam:refinement_steps=none:tsam_steps=5", {"refinement_steps": (), "tsam_steps": 5}),
        ("syngen:refinement_steps=0+4", {"alpha": 20.0, "preset": "paper", "refinement_steps": (0, 4)}),
        ("focus:alpha=3", {"alpha": 3.0, "preset": "paper", "refinement_steps": ()}),
        ("syngen:preset=fast:relative_step=0.05", {"preset": "fast", "relative_step": 0.05}),
        ("focus:preset=fast:refinement_steps=0", {"preset": "fast", "relative_step": 0.05, "refinement_steps": (0,)}),
        ("syngen:tsam_steps=3:preset=fast", {"alpha": 20.0, "tsam_steps": 3, "preset": "fast"}),
        ("tuned:alpha=2", {"preset": "fast", "alpha": 2.0}),
        ("tsam:attention_layers=4+7:attention_keys=all", {"attention_layers": (4, 7), "attention_keys": "all"}),
        ("conform:sharpness=none", {"alpha": 20.0, "preset": "paper", "sharpness": None}),
    ],
)
def test_a_method_is_a_name_and_changed_arguments(text, expected):
    assert parse_method(text)[0] == expected


@pytest.mark.parametrize("name", BASELINES)
def test_a_peer_at_our_preset_and_step_takes_as_many_updates_as_ours(name):
    size = {"preset": "fast", "relative_step": 0.05}
    own = parse_method(f"{name}:preset=fast:relative_step=0.05")[0]
    assert own == size and Settings(**own).plan(25) == Settings(**size).plan(25)


@pytest.mark.parametrize("model", ("sink", "pixart", "sd3"))  # and sd, everywhere else
def test_every_small_model_is_drawn_by_the_same_methods(model, tmp_path, capsys):
    methods = "stock,tuned:tsam_steps=1:refinement_steps=none,syngen:preset=light:relative_step=0.05"
    command = f"generate --model {model} --prompts shapes:2:test:1 --steps 2 --output {tmp_path} --methods".split()
    main([*command, methods])
    assert len(set(pictures(tmp_path).values())) == 3
    assert [row["updates"] for row in Run(tmp_path).rows("drawn")] == [0, 1, 1]
    arguments = Run(tmp_path).settings["methods"].values()
    assert [each.get("preset") for each in arguments] == [None, "fast", "light"]
    other = {"pixart": "attention_keys=all", "sd3": "candidates=2", "sink": "attention_layers=1+2"}[model]
    assert "has no argument" in refused(capsys, *command, f"tsam:{other}")
    if model == "sd3":
        quarters = ["--prompts", "quarters:2:test:1"]
        assert "have regions, which 'sd3' cannot hold" in refused(capsys, *command, methods, *quarters)


def test_a_run_of_a_thousand_seeds_is_complete_whatever_a_file_manager_leaves_in_it(tmp_path):
    settings = {"methods": {"stock": {"tsam_steps": 0}}, "seeds": 1002, "format": "png"}
    run = Run.create(tmp_path, settings, [Prompt("0", "a red cube", [])])
    for seed in (0, 999, 1000, 1001):
        save(Image.new("RGB", (1, 1)), run.picture(0, 0, seed))
    folder = run.picture(0, 0, 0).parent
    for stray in (folder, folder.parent, folder.parent.parent):
        (stray / ".DS_Store").write_text("")
        (stray / "Thumbs.db").write_text("")
    (folder / ".001.png").write_text("")  # half-written
    (folder.parent / "00007").mkdir()  # of no prompt of this run
    assert np.flatnonzero(run.present()[0, 0]).tolist() == [0, 999, 1000, 1001]


@pytest.mark.parametrize("batch", (1, 4, 7, 100))
def test_every_job_is_in_one_batch_and_what_binds_nothing_is_drawn_as_stock(batch):
    prompts = [
        Prompt(str(k), text, things_of_template(text)) for k, text in enumerate(("a cat and a dog", "a red bow"))
    ]
    methods = {name: parse_method(name) for name in ("stock", "syngen")}
    batches = plan(prompts, methods, 5, batch)
    jobs = [(method, *job) for method, _, own in batches for job in own]
    assert sorted(jobs) == [(m, p, s) for m in (0, 1) for p in (0, 1) for s in range(5)]
    assert all(len(own) <= batch for *_, own in batches)
    for method, (arguments, baseline), own in batches:
        assert (baseline is not None) == (method == 1 and own[0][0] == 1)
        assert (arguments == {"tsam_steps": 0}) == (baseline is None)
        assert len({prompt for prompt, _ in own}) == 1 or method == 0


def test_prompts_are_read_from_tifas_file(tmp_path):
    path = tmp_path / "tifa.json"
    path.write_text(
        json.dumps([{"id": "coco_1", "caption": "a red bow", "coco_val_id": "2"}, {"id": "x", "caption": "y"}])
    )
    assert load(str(path)) == [Prompt("coco_1", "a red bow", [[(2, 5), (6, 9)]]), Prompt("x", "y", [])]


def test_prompts_of_a_file_may_have_regions(tmp_path):
    path, box = tmp_path / "prompts.json", [0, 0, 0.5, 1]
    path.write_text(json.dumps([{"id": 0, "caption": "a red bow", "regions": {"bow": box}}, {"id": 1, "caption": "y"}]))
    assert [prompt.regions for prompt in load(str(path))] == [{"bow": box}, None]


def test_prompts_of_the_shapes_world_come_in_four_forms():
    texts = {form: [prompt.text for prompt in load(f"{form}:2:test:5")] for form in FORMS}
    assert texts["quarters"] == texts["shapes"] and len(set(texts["shapes"])) == 5
    for plain, sentences, filled in zip(texts["shapes"], texts["sentences"], texts["filled"]):
        assert sentences == plain.replace(" and ", " , ")
        assert len(filled.split()) == len(sentences.split()) + 22
        solids = [[text.split()[k] for pair in scenes.words_of_solids(text) for k in pair] for text in (plain, filled)]
        assert solids[0] == solids[1]
    for prompt in load("quarters:3:test:5"):
        assert len(set(prompt.regions.values())) == 3 == sum(solid in prompt.text for solid in prompt.regions)
    assert load("quarters:3:test:5") == load("quarters:3:test:5")


def test_each_prompt_has_its_own_regions_and_something_of_each_picture_is_kept(tmp_path):
    def keep(pipe, prompts, output):
        shares = [attention["region_shares"] if attention else {} for attention in output.attentions or [None, None]]
        return [{"shares": list(own), "text": prompt.text} for own, prompt in zip(shares, prompts)]

    methods = ["stock", "tsam:preset=light:objective=layout"]
    given = {"steps": 2, "keep": keep, "output_attentions": True}
    run = generate("sd", methods, "quarters:2:test:2", 1, tmp_path, **given)
    for row in run.rows("drawn"):
        prompt = run.prompts[row["prompt"]]
        assert row["text"] == prompt.text and row["shares"] == ([*prompt.regions] if row["method"] else [])
    main(["score", str(tmp_path), "--metrics", "judge"])
    rows = list(run.rows("score-judge"))
    assert len(rows) == 4 and all(row["placed"] in (0, 0.5, 1) for row in rows)
    assert "solids where asked, %" in reports.report(tmp_path)


def test_a_solid_is_where_it_was_asked_for_if_it_is_seen_inside():
    regions = {"red cube": (0.0, 0.0, 0.5, 0.5), "a blue ring": (0.5, 0.5, 1.0, 1.0)}
    for place, there in (((0.2, 0.2), True), ((0.5, 0.2), False), ((0.2, 0.7), False)):
        found = Shapes.placed(regions, {("red", "cube"): place, ("white", "star"): (0.7, 0.7)})
        assert found == {"placed": 0.5 * there, "all_placed": 0}
    assert Shapes.placed(regions, {("red", "cube"): (0, 0), ("blue", "ring"): (0.9, 0.5)})["all_placed"] == 1


# ----------------------------------------------------------------------------------------------------------------------
# Metrics


@pytest.fixture(scope="module")
def clip():
    torch.manual_seed(0)
    tokenizer = tiny_tokenizer()
    layers = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    text = {**layers, "vocab_size": len(tokenizer), **ends}
    config = CLIPConfig(
        text_config=text, vision_config={**layers, "image_size": 32, "patch_size": 8}, projection_dim=12
    )
    images = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    return CLIPModel(config).eval(), CLIPProcessor(images, tokenizer)


BLIP_WORDS = "[PAD] [UNK] [CLS] [SEP] [MASK] [DEC] yes no is there a cat car red black what colour it ?".split()


def blip(cls, tmp_path):
    """A tiny BLIP with random weights, and its processor."""
    torch.manual_seed(1)
    vocabulary = tmp_path / "vocab.txt"
    vocabulary.write_text("\n".join(BLIP_WORDS))
    tokenizer = BertTokenizer(str(vocabulary), bos_token="[DEC]")
    layers = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    ids = {"pad_token_id": 0, "bos_token_id": 5, "eos_token_id": 3, "sep_token_id": 3}
    text = {**layers, "vocab_size": len(BLIP_WORDS), "encoder_hidden_size": 16, **ids, "max_position_embeddings": 64}
    config = BlipConfig(text_config=text, vision_config={**layers, "image_size": 32, "patch_size": 8})
    model = cls(config).eval()
    for parameter in model.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)  # so that answers differ
    return model, BlipProcessor(BlipImageProcessor(size={"height": 32, "width": 32}), tokenizer)


@pytest.fixture
def images():
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 255, (40, 50, 3), dtype=np.uint8)) for _ in range(3)]


def test_there_are_clips_80_templates():
    assert len(set(TEMPLATES)) == 80 and all(template.count("{}") == 1 for template in TEMPLATES)
    assert in_template("a photo of the {}.", "a red car") == "a photo of a red car."
    assert in_template("a photo of many {}.", "cars") == "a photo of many cars."


def literal_prompt(model, processor, text, templates):
    """Mean over templates of unit features, made a unit again; one text at a time."""
    total = 0
    for template in templates:
        tokens = processor.tokenizer([in_template(template, text)], return_tensors="pt")
        found = model.text_projection(model.text_model(**tokens).pooler_output)[0]
        total = total + found / found.norm()
    return total / total.norm()


@torch.no_grad()
def test_clip_scores_are_the_literal_ones(clip, images):
    model, processor = clip
    templates = ["a photo of a {}.", "itap of my {}.", "the origami {}."]
    texts = ["a red car and a black dog", "a cube with a blue sphere", "the table"]
    rows = Clip(model, processor, templates)(images, [Prompt(str(k), text, []) for k, text in enumerate(texts)])
    for row, image, text in zip(rows, images, texts):
        pixels = processor.image_processor(images=image, return_tensors="pt").pixel_values
        seen = model.visual_projection(model.vision_model(pixels).pooler_output)[0]
        parts = text.split(" and ") if " and " in text else text.split(" with ")
        near = [float(literal_prompt(model, processor, t, templates) @ seen / seen.norm()) for t in (text, *parts)]
        assert row["clip_full"] == pytest.approx(near[0], abs=1e-6)
        assert row["clip_min"] == (None if len(parts) == 1 else pytest.approx(min(near[1:]), abs=1e-6))


@torch.no_grad()
def test_a_caption_is_compared_with_its_prompt(clip, images, tmp_path):
    reader = Clip(*clip, ["a photo of a {}."])
    model, processor = blip(BlipForConditionalGeneration, tmp_path)
    rows = Caption(reader, model, processor)(images, [Prompt("0", "a red car", [])] * 3)
    for row, image in zip(rows, images):
        ids = model.generate(**processor(images=image, return_tensors="pt"), num_beams=3, min_length=10, max_length=30)
        assert row["caption"] == processor.decode(ids[0], skip_special_tokens=True).strip()
        tokens = clip[1].tokenizer([row["caption"]], return_tensors="pt", truncation=True)
        said = clip[0].text_projection(clip[0].text_model(**tokens).pooler_output)[0]
        expected = literal_prompt(*clip, "a red car", ["a photo of a {}."]) @ said / said.norm()
        assert row["clip_text"] == pytest.approx(float(expected), abs=1e-6)


@torch.no_grad()
def test_blip_answers_as_it_does_alone_with_the_probability_of_each_token_in_turn(images, tmp_path):
    model, processor = blip(BlipForQuestionAnswering, tmp_path)
    questions = ["is there a cat ?", "what colour is the car it is ? it ?", "is it red ?"]
    answers = ["yes", "black car", "no"]
    free, likely = BlipAnswers(model, processor)([images[0], images[0], images[1]], questions, answers)
    assert len(set(likely)) == 3
    for k, image in enumerate((images[0], images[0], images[1])):
        inputs = processor(images=image, text=questions[k], return_tensors="pt")
        own = model.generate(**inputs, max_length=50, do_sample=False)
        assert free[k] == processor.decode(own[0], skip_special_tokens=True).strip()
        seen = model.vision_model(inputs["pixel_values"])[0]
        state = model.text_encoder(inputs["input_ids"], inputs["attention_mask"], encoder_hidden_states=seen)[0]
        said, product = [5], 1.0  # [DEC]
        for token in [*map(BLIP_WORDS.index, answers[k].split()), 3]:  # [SEP]
            logits = model.text_decoder(torch.tensor([said]), encoder_hidden_states=state).logits[0, -1]
            product *= float(logits.softmax(-1)[token])
            said.append(token)
        assert likely[k] == pytest.approx(product, rel=1e-4)


def question(caption, asked, answer, kind, choices=("yes", "no")):
    return {"caption": caption, "question": asked, "answer": answer, "element_type": kind, "choices": list(choices)}


QUESTIONS = [
    question("a red cat", "is there a cat?", "yes", "animal"),
    question("a red cat", "what colour?", "red", "color", ("red", "blue")),
    question("a dog", "is there a dog?", "yes", "animal"),
]


def known(images, questions, answers):
    """Answers that are known: the cat is there and blue, and no dog is."""
    found = {"is there a cat?": ("yes", 0.9), "what colour?": ("blue", 0.25), "is there a dog?": ("no", 0.5)}
    return [found[q][0] for q in questions], [found[q][1] for q in questions]


def test_known_answers_have_known_scores():
    prompts = [Prompt("0", "a red cat", []), Prompt("1", "a dog", [])]
    rows = Tifa(known, Nearest(), QUESTIONS, prompts)(["one", "other"], prompts)
    assert [row["tifa"] for row in rows] == [0.5, 0.0]
    assert [row["soft_tifa"] for row in rows] == [pytest.approx(0.575), 0.5]
    assert rows[0]["types"] == {"animal": [1, 1], "color": [0, 1]} and rows[1]["types"] == {"animal": [0, 1]}
    assert rows[0]["answers"] == ["yes", "blue"]


def test_questions_for_other_prompts_are_refused():
    with pytest.raises(ValueError, match="for other prompts: 1 of 2 have none, the first of them 'a bird'"):
        Tifa(known, Nearest(), QUESTIONS, [Prompt("0", "a dog", []), Prompt("1", "a bird", [])])


def test_an_answer_means_the_choice_whose_sentence_is_nearest():
    class Sentences(torch.nn.Module):
        device = torch.device("cpu")

        def forward(self, input_ids, attention_mask):  # "automobile" lies beside "car"; padding lies far away
            return (torch.tensor([[9.0, 9.0], [1, 0], [0, 1], [0.9, 0.1]])[input_ids],)

    def tokenizer(texts, **_):
        from transformers import BatchEncoding

        ids = torch.tensor([[{"car": 1, "cat": 2, "automobile": 3}[text], 0] for text in texts])
        return BatchEncoding({"input_ids": ids, "attention_mask": (ids > 0).long()})

    nearest = Nearest(Sentences(), tokenizer)
    assert nearest("automobile", ["cat", "car"]) == "car" and nearest("cat", ["cat", "car"]) == "cat"


def test_models_are_loaded_from_folders_and_resume(run, clip, tmp_path, capsys):
    folder = copied(run, tmp_path)
    for part in clip:
        part.save_pretrained(tmp_path / "clip")
    for part in blip(BlipForQuestionAnswering, tmp_path):
        part.save_pretrained(tmp_path / "vqa")
    texts = [prompt.text for prompt in Run(folder).prompts]
    (tmp_path / "questions.json").write_text(
        json.dumps([question(text, "is it red?", "yes", "color") for text in texts])
    )
    command = ["score", folder, "--metrics", "clip,tifa", "--clip", tmp_path / "clip", "--vqa", tmp_path / "vqa"]
    command = [*map(str, command), "--questions", str(tmp_path / "questions.json"), "--sentences", "none"]
    main([*command, "--score-batch", "5"])
    lines = (folder / "score-clip-0.jsonl").read_text()
    assert lines.count("\n") == 12
    (folder / "score-clip-0.jsonl").write_text(lines[:-30])
    main(command)
    again = Run(folder).table("score-clip", "clip_full")["clip_full"]
    assert np.isfinite(again).all()
    values = [json.loads(line)["clip_full"] for line in lines.splitlines()]
    np.testing.assert_allclose(np.sort(again.ravel()), np.sort(values), atol=1e-5)
    main(["report", str(folder)])
    text = (folder / "report.md").read_text()
    assert "CLIP-I, minimum object" in text and "soft TIFA" in text and "| color |" in text


def test_the_judges_scores_count_solids():
    wanted = ("blue", "star"), ("red", "cube")
    shown = wanted, (wanted[0], *wanted), wanted[:1], (("red", "star"), ("blue", "cube"))
    drawn = [scenes.draw_scene(np.random.default_rng(0), solids)[0] for solids in shown]
    prompts = [Prompt("0", scenes.caption_of(wanted), [])] * len(drawn)
    rows = Shapes(prompts)([Image.fromarray(picture) for picture in drawn], prompts)
    true = [{key for key in Shapes.keys if row[key]} for row in rows]
    assert true == [{"counted", "right"}, {"right", "double"}, {"missing"}, {"swap"}]
    assert [(row["count"], row["fragments"]) for row in rows] == [(2, 0), (3, 0), (1, 0), (2, 0)]


def test_the_judge_reads_coloured_solids_only():
    with pytest.raises(ValueError, match="no pictures of 'a dog runs'"):
        Shapes([Prompt("0", "a dog runs", [])])


# ----------------------------------------------------------------------------------------------------------------------
# Reports


@pytest.fixture
def scored(tmp_path):
    """A run of known scores: two methods, three prompts, two seeds, one picture of which is not scored."""
    values = {"stock": [[0.1, 0.3], [0.5, 0.7], [0.2, 0.2]], "tsam": [[0.2, 0.2], [0.9, None], [0.4, 0.6]]}
    settings = {"methods": {"stock": {"tsam_steps": 0}, "tsam": {}}, "seeds": 2, "format": "png", "model": "m"}
    settings |= {"revision": "r", "scheduler": "s", "dtype": "d", "prompt_set": "p", "versions": {}}
    prompts = [Prompt(str(k), text, []) for k, text in enumerate(("a", "b", "<c>"))]
    run = Run.create(tmp_path / "run", settings | {"arguments": {"num_inference_steps": 1}}, prompts)
    rows = [
        {"method": m, "prompt": p, "seed": s, "clip_full": value, "clip_min": None}
        for m, name in enumerate(values)
        for p, seeds in enumerate(values[name])
        for s, value in enumerate(seeds)
        if value is not None
    ]
    with run.writer("score-clip", 0) as append:
        append(rows[:4])
    with run.writer("score-clip", 1) as append:
        append(rows[4:])
    return run


def test_a_reports_numbers_are_those_of_the_lines(scored):
    scores = reports.Scores(scored)
    assert list(scores.values) == ["clip_full"]
    means = [0.2, 0.9, 0.5]
    gains = [0.0, 0.4, 0.3]  # of the second prompt, the seed that both have
    for found, each in ((scores.of(1, "clip_full"), means), (scores.gain(1, "clip_full"), gains)):
        assert found == pytest.approx((np.mean(each), 1.96 * np.std(each, ddof=1) / 3**0.5), abs=1e-6)
    head, rows = reports.table_of(scores)
    assert head == ["method (pictures)", "CLIP-I, full prompt", "over stock"]
    assert rows[1] == ["tsam (5)", "0.533 ± 0.397", "+0.233 ± 0.236"]
    text = reports.report(scored.folder)
    assert "+0.233 ± 0.236" in text and "<c>" not in (scored.folder / "report.html").read_text()


def test_a_ratios_interval_is_that_of_a_mean_where_all_clusters_are_alike():
    parts, wholes = np.array([1.0, 3, 2, 0]), np.array([4.0, 4, 4, 4])
    expected = reports.interval(parts / wholes)
    assert reports.ratio_interval(parts, wholes) == pytest.approx(expected)


def test_sweeps_are_grids_of_alpha_and_gamma(scored):
    settings = scored.settings
    names = [f"tsam:objective={o}:alpha={a}:gamma={g}" for o in ("l1", "cosine") for a in (1, 2) for g in (1, 3)]
    settings["methods"] |= {name: parse_method(name)[0] for name in names}
    run = Run.create(scored.folder, settings, scored.prompts)
    assert reports.grids(run) == {
        "objective l1": {(1.0, 1.0): 2, (1.0, 3.0): 3, (2.0, 1.0): 4, (2.0, 3.0): 5},
        "objective cosine": {(1.0, 1.0): 6, (1.0, 3.0): 7, (2.0, 1.0): 8, (2.0, 3.0): 9},
    }


def test_a_sweep_reports_its_best_on_other_prompts(tmp_path, capsys):
    command = f"sweep --model sd --prompts shapes:3:tune:2 --output {tmp_path} --steps 2 --metrics judge".split()
    command += "--alphas 0.5,2 --gammas 2,4 --presets light --objectives attainable --report-prompts".split()
    assert "prompts are in both sets" in refused(capsys, *command, "shapes:3:tune:1")
    main([*command, "shapes:3:test:1"])
    said = capsys.readouterr().out
    tuned, tested = Run(tmp_path / "tune"), Run(tmp_path / "test")
    scores = reports.Scores(tuned)
    gains = {name: scores.gain(k, "counted")[0] for k, name in enumerate(tuned.methods) if k}
    assert len(gains) == 4 and tested.methods == ["stock", max(gains, key=gains.get)]
    assert f"by right, %: {tested.methods[1]}" in said and (tmp_path / "tune" / "sweep.png").exists()


def test_the_core_and_the_baselines_need_no_extra():
    code = "import sys, diffusers_tsam.cli, diffusers_tsam.pipeline_tsam_sd, diffusers_tsam.pipeline_tsam_pixart\n"
    code += "assert 'diffusers_tsam.evaluation' not in sys.modules\nimport diffusers_tsam.evaluation.baselines\n"
    code += "assert not {'diffusers_tsam.evaluation.runs', 'spacy'} & set(sys.modules)"
    paths = os.pathsep.join(path for path in sys.path if path)
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ | {"PYTHONPATH": paths})
