"""Scores a run's pictures: a line per picture and metric, resumable.

    python -m diffusers_tsam.evaluation score runs/sd15 --metrics clip,caption,tifa --questions tifa_questions.json

clip: CLIP-I, the picture against the full prompt and against its parts; the lowest part is the minimum object.
caption: CLIP-T, its BLIP caption against the prompt. Both as in Attend-and-Excite (Chefer et al. 2023, and its
metrics/ folder). tifa: TIFA (Hu et al., ICCV 2023, arXiv:2303.11897) and soft TIFA (GenEval 2, arXiv:2512.16853).
judge: the shapes world's.
"""

import json
import re
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from ..shapes.judge import Judge, count, verdict
from ..shapes.scenes import solids_of
from ..tsam_arguments import check_integer
from .prompts import json_of, phrases
from .runs import Run, digest, opened, processes, write


# The 80 prompts of CLIP's zero-shot classification (Radford et al. 2021); Attend-and-Excite averages over them
_OF_BOTH_ARTICLES = {
    "a {} photo of {} {{}}.": "bad, low resolution, cropped, bright, dark, close-up, black and white, pixelated,"
    " blurry, jpeg corrupted, good",
    "{} of {} {{}}.": "a sculpture, a rendering, graffiti, a tattoo, a drawing, a painting, a doodle, a sketch, art,"
    " itap, a rendition, a photo",
    "a photo of {1} {0} {{}}.": "hard to see, clean, dirty, cool, large, nice, weird, small",
    "{1} {0} {{}}.": "embroidered, plastic, origami, toy, cartoon, plushie",
    "{1} {{}} {0}.": "in a video game",
}
TEMPLATES = [
    pattern.format(word, article)
    for pattern, words in _OF_BOTH_ARTICLES.items()
    for word, article in product(words.split(", "), ("a", "the"))
]
TEMPLATES += ["a photo of many {}.", "a photo of one {}.", "a photo of my {}.", "itap of my {}."]
CAPTION = {"num_beams": 3, "min_length": 10, "max_length": 30}  # LAVIS's, as in Attend-and-Excite
MAX_ANSWER = 50  # tokens; TIFA's
READERS = 8  # threads that open pictures


def in_template(template, prompt):
    """Put the prompt in place of a template's noun; "a photo of the a red car" loses the first article."""
    own = r"(?:(?:an?|the) )?\{\}" if re.match(r"(an?|the) ", prompt) else r"\{\}"
    return re.sub(own, lambda _: prompt, template)


class Clip:
    """CLIP-I: cosine similarity of the picture and the prompt's mean feature over TEMPLATES."""

    keys = ("clip_full", "clip_min")

    def __init__(self, model, processor, templates=TEMPLATES):
        self.model, self.processor, self.templates, self.known = model.eval(), processor, templates, {}

    def of_texts(self, texts):
        """(texts, D), of length 1."""
        tokens = self.processor.tokenizer(texts, padding=True, truncation=True, return_tensors="pt")
        return F.normalize(self.model.get_text_features(**tokens.to(self.model.device)).pooler_output.float(), dim=-1)

    def of_images(self, images):
        pixels = self.processor.image_processor(images=images, return_tensors="pt").pixel_values
        found = self.model.get_image_features(pixels.to(self.model.device, self.model.dtype)).pooler_output
        return F.normalize(found.float(), dim=-1)

    def of_prompt(self, text):
        """(D,): the mean over templates of features of length 1, again of length 1."""
        if text not in self.known:
            mean = self.of_texts([in_template(template, text) for template in self.templates]).mean(0)
            self.known[text] = F.normalize(mean, dim=-1)
        return self.known[text]

    def __call__(self, images, prompts):
        rows = []
        for image, prompt in zip(self.of_images(images), prompts):
            parts = [float(image @ self.of_prompt(part)) for part in phrases(prompt.text)]
            full = float(image @ self.of_prompt(prompt.text))
            rows.append({"clip_full": full, "clip_min": min(parts) if len(parts) > 1 else None})
        return rows


class Caption:
    """CLIP-T: cosine similarity of the picture's caption and the prompt, both read by CLIP."""

    keys = ("clip_text",)

    def __init__(self, clip, model, processor):
        self.clip, self.model, self.processor = clip, model.eval(), processor

    def __call__(self, images, prompts):
        pixels = self.processor(images=images, return_tensors="pt").to(self.model.device, self.model.dtype)
        ids = self.model.generate(**pixels, **CAPTION)
        captions = [caption.strip() for caption in self.processor.batch_decode(ids, skip_special_tokens=True)]
        prompts = torch.stack([self.clip.of_prompt(prompt.text) for prompt in prompts])
        similarities = (self.clip.of_texts(captions) * prompts).sum(-1).tolist()
        return [{"clip_text": value, "caption": caption} for value, caption in zip(similarities, captions)]


class BlipAnswers:
    """A `BlipForQuestionAnswering`'s free answers, and its probabilities of given ones.

    Batches have questions of one length, because transformers lets BLIP's answers attend to padding.
    """

    def __init__(self, model, processor):
        self.model, self.processor = model.eval(), processor

    def __call__(self, images, questions, answers):
        """n free answers and n probabilities of the expected ones, for n images, questions and expected answers."""
        distinct = {id(image): image for image in images}
        number = {name: k for k, name in enumerate(distinct)}
        pixels = self.processor.image_processor(images=list(distinct.values()), return_tensors="pt").pixel_values
        seen = self.model.vision_model(pixel_values=pixels.to(self.model.device, self.model.dtype))[0]
        seen = seen[[number[id(image)] for image in images]]
        ids, lengths = [self.processor.tokenizer(question).input_ids for question in questions], defaultdict(list)
        for k, tokens in enumerate(ids):
            lengths[len(tokens)].append(k)
        free, likely = [""] * len(images), [0.0] * len(images)
        for own in lengths.values():
            asked = torch.tensor([ids[k] for k in own], device=self.model.device)
            found = self.answered(seen[own], asked, [answers[k] for k in own])
            for k, *result in zip(own, *found):
                free[k], likely[k] = result
        return free, likely

    def answered(self, seen, asked, answers):
        """Free answers and probabilities of the expected ones, from images' features and questions' tokens."""
        config, decoder = self.model.config.text_config, self.model.text_decoder
        state = self.model.text_encoder(input_ids=asked, encoder_hidden_states=seen)[0]
        ids = decoder.generate(
            input_ids=torch.full((len(state), 1), config.bos_token_id, device=state.device),
            eos_token_id=config.sep_token_id,
            pad_token_id=config.pad_token_id,
            max_length=MAX_ANSWER,
            do_sample=False,
            encoder_hidden_states=state,
        )
        free = [answer.strip() for answer in self.processor.tokenizer.batch_decode(ids, skip_special_tokens=True)]
        expected = self.processor.tokenizer(answers, padding=True, return_tensors="pt").to(state.device)
        ids, mask = expected.input_ids, expected.attention_mask
        inputs = ids.clone()
        inputs[:, 0] = config.bos_token_id
        logits = decoder(input_ids=inputs, attention_mask=mask, encoder_hidden_states=state).logits[:, :-1].float()
        likely = logits.log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1)
        return free, (likely * mask[:, 1:]).sum(-1).exp().tolist()


class Nearest:
    """The choice that a free answer means: the same one, or a sentence encoder's nearest, as in TIFA."""

    def __init__(self, model=None, tokenizer=None):
        self.model, self.tokenizer = model and model.eval(), tokenizer

    def embed(self, texts):
        """(texts, D): the mean over a text's own tokens."""
        tokens = self.tokenizer(texts, padding=True, truncation=True, return_tensors="pt").to(self.model.device)
        mask = tokens.attention_mask[..., None]
        mean = (self.model(**tokens)[0].float() * mask).sum(1) / mask.sum(1)
        return F.normalize(mean, dim=-1)

    def __call__(self, answer, choices):
        if answer in choices or self.model is None:
            return answer
        embedded = self.embed([answer, *choices])
        return choices[int((embedded[1:] @ embedded[0]).argmax())]


class Tifa:
    """Share of a prompt's questions answered as expected, and the mean probability of the expected answers.

    questions: entries of TIFA's question file, dicts with the keys `has`.
    """

    keys = ("tifa", "soft_tifa")
    has = ("caption", "question", "choices", "answer", "element_type")

    def __init__(self, answers, nearest, questions, prompts):
        self.answers, self.nearest, self.asked = answers, nearest, defaultdict(list)
        for number, entry in enumerate(questions):
            lacking = [key for key in self.has if not isinstance(entry, dict) or key not in entry]
            if lacking:
                raise ValueError(f"Question {number} has no {', '.join(lacking)}. Pass a list of questions as TIFA's.")
            self.asked[entry["caption"]].append(entry)
        without = [prompt.text for prompt in prompts if prompt.text not in self.asked]
        if without:
            raise ValueError(
                f"The questions are for other prompts: {len(without)} of {len(prompts)} have none, the first of them"
                f" {without[0]!r}. Pass the question file of this run's prompts."
            )

    def __call__(self, images, prompts):
        asked = [(image, entry) for image, prompt in zip(images, prompts) for entry in self.asked[prompt.text]]
        entries = [entry for _, entry in asked]
        free, likely = self.answers(
            [image for image, _ in asked], [e["question"] for e in entries], [e["answer"] for e in entries]
        )
        rows, first = [], 0
        for prompt in prompts:
            own = range(first, first := first + len(self.asked[prompt.text]))
            right = [self.nearest(free[k], entries[k]["choices"]) == entries[k]["answer"] for k in own]
            types = defaultdict(lambda: [0, 0])
            for k, correct in zip(own, right):
                types[entries[k]["element_type"]][0] += correct
                types[entries[k]["element_type"]][1] += 1
            rows.append({"tifa": np.mean(right), "soft_tifa": np.mean([likely[k] for k in own])})
            rows[-1] |= {"types": types, "answers": [free[k] for k in own]}
        return rows


class Shapes:
    """The shapes world's judge: `verdict`, where "right" means that every solid is there in its colour."""

    keys = ("counted", "right", "double", "touching", "missing", "swap")

    def __init__(self, prompts):
        self.judge, other = Judge.from_pretrained(), [p.text for p in prompts if not solids_of(p.text)]
        if other:
            raise ValueError(f"The judge reads coloured solids only, and no pictures of {other[0]!r}.")

    def __call__(self, images, prompts):
        rows = []
        for image, prompt, seen in zip(images, prompts, self.judge.locate(images)):
            solids, fragments = count(image)
            found = verdict(solids_of(prompt.text), seen, solids)
            row = {key: int(found["present" if key == "right" else key]) for key in self.keys}
            rows.append(row | {"seen": sorted(map(list, seen)), "count": solids, "fragments": fragments})
            if prompt.regions:
                rows[-1] |= self.placed(prompt.regions, seen)
        return rows

    @staticmethod
    def placed(regions, places):
        """The share of solids seen inside their boxes, and whether all are; a phrase ends with a solid."""
        found = []
        for phrase, (x0, y0, x1, y1) in regions.items():
            x, y = places.get(tuple(phrase.split()[-2:]), (-1, -1))
            found.append(x0 <= x < x1 and y0 <= y < y1)
        return {"placed": np.mean(found), "all_placed": int(all(found))}


def pretrained(auto, name, device):
    """A model on its device, in half precision on a GPU, and its processor."""
    import transformers

    dtype = torch.float32 if device.type == "cpu" else torch.float16
    processor = transformers.AutoProcessor if auto != "AutoModel" else transformers.AutoTokenizer
    return getattr(transformers, auto).from_pretrained(name, dtype=dtype).to(device), processor.from_pretrained(name)


METRICS = {"clip": Clip.keys, "caption": Caption.keys, "tifa": Tifa.keys, "judge": Shapes.keys}


def check(metrics, questions, batch):
    """Refuse now what would fail later."""
    for metric in metrics:
        if metric not in METRICS:
            raise ValueError(f"A metric is {metric!r}, but has to be one of {', '.join(METRICS)}.")
    if "tifa" in metrics and questions is None:
        raise ValueError(
            "The metric is 'tifa', but there are no questions. Pass --questions with TIFA's question file."
        )
    check_integer("score_batch", batch, 1, "Pass how many pictures are scored at once.")


def scorer(metric, run, device, clip, blip, vqa, sentences, questions):
    """A metric's function of (images, prompts), and its numbers' settings."""
    if metric == "clip":
        return Clip(*pretrained("CLIPModel", clip, device)), {"clip": clip}
    if metric == "caption":
        reader = Clip(*pretrained("CLIPModel", clip, device))
        return Caption(reader, *pretrained("BlipForConditionalGeneration", blip, device)), {"clip": clip, "blip": blip}
    if metric == "judge":
        return Shapes(run.prompts), {"counted": True}
    entries = json_of(questions)
    if not isinstance(entries, list):
        raise ValueError(f"{str(questions)!r} is no list. Pass a list of questions as TIFA's.")
    answers = BlipAnswers(*pretrained("BlipForQuestionAnswering", vqa, device))
    nearest = Nearest() if sentences is None else Nearest(*pretrained("AutoModel", sentences, device))
    used = {"vqa": vqa, "sentences": sentences, "questions": digest(Path(questions).read_bytes())}
    return Tifa(answers, nearest, entries, run.prompts), used


@torch.no_grad()
def score(
    folder,
    metrics,
    clip="openai/clip-vit-base-patch16",
    blip="Salesforce/blip-image-captioning-base",
    vqa="Salesforce/blip-vqa-base",
    sentences="sentence-transformers/all-mpnet-base-v2",
    questions=None,
    score_batch=32,
):
    """Score a run's drawn but unscored pictures; returns the `Run`."""
    check(metrics, questions, score_batch)
    state, run = processes(), Run(folder)
    drawn, present = run.done("drawn"), run.present()
    if not drawn.any():
        raise ValueError(f"{str(folder)!r} has no pictures yet. Run `generate` into it first.")
    lost = np.argwhere(drawn & ~present).tolist()
    if lost:
        raise ValueError(
            f"{len(lost)} pictures are missing or cut off, the first of them {run.picture(*lost[0])}. Run `generate`"
            " with the same arguments, which draws them again."
        )
    for metric in metrics:
        with state.main_process_first():
            function, used = scorer(metric, run, state.device, clip, blip, vqa, sentences, questions)
        record = run.folder / f"score-{metric}.json"
        if record.exists() and json_of(record) != used:
            raise ValueError(
                f"{metric!r} was scored with {record.read_text().strip()}, not {json.dumps(used)}. Choose those, or"
                f" remove score-{metric}*."
            )
        if state.is_main_process:
            write(record, json.dumps(used) + "\n")
        todo = np.argwhere(drawn & ~run.done(f"score-{metric}")).tolist()
        state.wait_for_everyone()
        with (
            state.split_between_processes(todo) as own,
            run.writer(f"score-{metric}", state.process_index) as append,
            ThreadPoolExecutor(READERS) as readers,
            tqdm(total=len(own), desc=metric, unit="picture", disable=not state.is_main_process) as progress,
        ):
            for k in range(0, len(own), score_batch):
                jobs = own[k : k + score_batch]
                images = list(readers.map(opened, [run.picture(*job) for job in jobs]))
                rows = function(images, [run.prompts[prompt] for _, prompt, _ in jobs])
                append([dict(zip(("method", "prompt", "seed"), job)) | row for job, row in zip(jobs, rows)])
                progress.update(len(jobs))
        state.wait_for_everyone()
    return run
