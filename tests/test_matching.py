"""Pictures and texts to be matched, each set in its authors' files; scores against CLIP_benchmark and loops by hand."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import jaccard_score

from ssmclip.__main__ import main
from ssmclip.data.testsets.card import Question
from ssmclip.data.testsets.open import open_dataset
from ssmclip.data.testsets.testset import PictureSet
from ssmclip.evaluate import Settings, Task, evaluate
from ssmclip.evaluate.captions import spelled_out
from ssmclip.evaluate.distorted import choose
from ssmclip.evaluate.matching import SCORES, Answers
from ssmclip.evaluate.statistics.paired import unmarked
from ssmclip.evaluate.tasks import DistortedTask
from ssmclip.rows.condition import CATEGORY


def parts(clip):
    return clip.model, clip.preprocess, clip.tokenizer


def noise(path, seed: int, size=(40, 40)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)).save(path)
    return path


def write(path, content) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")


def similarities(clip, pictures, texts):
    with torch.no_grad():
        images = torch.stack([clip.preprocess(picture.convert("RGB")) for picture in pictures])
        return (
            clip.model.encode_image(images, normalize=True)
            @ clip.model.encode_text(clip.tokenizer(list(texts)), normalize=True).T
        )


def winoground(root, n: int = 12):
    records = [
        {
            "id": i,
            "image_0": f"ex_{i}_img_0",
            "image_1": f"ex_{i}_img_1",
            "caption_0": f"the dog {i} chases the cat",
            "caption_1": f"the cat {i} chases the dog",
            "collapsed_tag": ("Object", "Relation", "Both")[i % 3],
        }
        for i in range(n)
    ]
    write(root / "data/examples.jsonl", "".join(json.dumps(record) + "\n" for record in records))
    for i in range(2 * n):
        noise(root / f"images/ex_{i // 2}_img_{i % 2}.png", i)
    return records


def test_winogrounds_scores_are_clip_benchmarks(vit, tmp_path):
    benchmark = pytest.importorskip("clip_benchmark.metrics.image_caption_selection")
    records = winoground(tmp_path / "winoground")
    dataset = open_dataset("winoground", tmp_path)
    rows = evaluate(*parts(vit), ["winoground"], tmp_path, model_name="m")
    pairs = [
        torch.stack([vit.preprocess(Image.open(tmp_path / f"winoground/images/{r[f'image_{k}']}.png")) for k in (0, 1)])
        for r in records
    ]
    batches = [(torch.stack(pairs), [[r["caption_0"], r["caption_1"]] for r in records])]
    theirs = benchmark.evaluate(vit.model, batches, vit.tokenizer, "cpu", amp=False)
    ours = {row.metric: row for row in rows if not row.where}
    assert [row.metric for row in rows][:2] == ["group_score", "group_score"]
    for metric, name in (("text_score", "text_acc"), ("image_score", "image_acc"), ("group_score", "acc")):
        assert ours[metric].value == pytest.approx(theirs[name], abs=1e-6)
    assert (ours["text_score"].extra["chance"], ours["image_score"].extra["chance"]) == (0.25, 0.25)
    assert ours["group_score"].extra["chance"] == pytest.approx(1 / 6)
    assert (ours["group_score"].extra["title"], ours["group_score"].n) == ("Winoground", 12)
    assert ours["group_score"].extra["partial"] == {"used": 12, "of": 400}
    assert {row.where[CATEGORY] for row in rows if row.where} == {"Object", "Relation", "Both"}
    right = unmarked(ours["text_score"])
    by_tag = [right[i::3].double().mean().item() for i in range(3)]
    texts = [row for row in evaluate(*parts(vit), [Task(dataset, metrics=("text_score",))], "", model_name="m")]
    assert texts[0].value == pytest.approx(np.mean(by_tag))


def test_guesses_have_the_chance_that_is_stated():
    """Ten thousand guesses at questions of several forms."""
    torch.manual_seed(0)
    forms = {
        "text_score": [((0, 0),), 1, 2],
        "group_score": [((0, 0), (1, 1)), 2, 2],
        "image_score": [((0, 0), (1, 1)), 2, 2],
        "jaccard": [((0, 0), (3, 0), (4, 0)), 10, 1],
    }
    both = {"text_score": [((0, 0), (0, 1)), 1, 3]}  # SugarCrepe++
    for metric, (right, n, m) in [*forms.items(), *both.items()]:
        on = torch.zeros(n, m, dtype=torch.bool)
        for i, j in right:
            on[i, j] = True
        scores = torch.rand(10_000, n, m)
        answers = Answers([], scores, scores[:, :1], on.expand(10_000, n, m))
        values = SCORES[metric].of(answers).double()
        chance = SCORES[metric].guessed(tuple(map(tuple, on.tolist())))
        assert values.mean().item() == pytest.approx(chance, abs=4 * values.std().item() / 100)
        same = Answers([], torch.zeros(1, n, m), torch.zeros(1, 1, m), on[None])
        if metric != "jaccard":
            assert SCORES[metric].of(same).item() == 0  # a model that tells nothing apart


def test_jaccard_equals_scikit_learns_as_datacomp_counts_it(vit, tmp_path):
    words = [f"word {i}" for i in range(12)]
    for i, word in enumerate(words):
        noise(tmp_path / f"winogavil/winogavil_images/{word}.jpg", i)
    asked = [("eagle", words[:10], words[2:5]), ("Bald", words[:5], words[:2]), ("west", words, words[4:6])]
    escaped = [[json.dumps(part).replace('"', '""') for part in question[1:]] for question in asked]
    lines = [f'{i},"{c}",{q[0]},"{a}",{i}' for i, (q, (c, a)) in enumerate(zip(asked, escaped, strict=True))]
    write(tmp_path / "winogavil/winogavil_dataset.csv", "\n".join([",candidates,cue,associations,ID", *lines]) + "\n")
    rows = evaluate(*parts(vit), ["winogavil"], tmp_path, model_name="m")
    expected = {}
    for cue, candidates, right in asked:
        pictures = [Image.open(tmp_path / f"winogavil/winogavil_images/{name}.jpg") for name in candidates]
        prompt = f"An {cue.lower()}" if cue[0].lower() in "aeiou" else f"A {cue.lower()}"
        logits = similarities(vit, pictures, [prompt])[:, 0].numpy()
        truth = np.isin(candidates, right)
        guess = np.isin(np.arange(len(candidates)), np.argsort(logits)[-truth.sum() :])
        expected[cue] = jaccard_score(truth, guess)
    found = {(row.metric, row.where.get(CATEGORY)): row.value for row in rows}
    assert found["jaccard", None] == pytest.approx(np.mean(list(expected.values())))
    assert found["jaccard", "10-12 candidates"] == pytest.approx((expected["eagle"] + expected["west"]) / 2)
    assert found["jaccard", "5-6 candidates"] == pytest.approx(expected["Bald"])
    assert rows[0].metric == "jaccard"
    chance = {row.where.get(CATEGORY): row.extra["chance"] for row in rows if row.metric == "jaccard"}
    of_five = sum(p * j / (4 - j) for j, p in ((0, 3 / 10), (1, 6 / 10), (2, 1 / 10)))  # two of five, drawn twice
    assert chance["5-6 candidates"] == pytest.approx(of_five)
    assert chance["10-12 candidates"] < chance[None] < of_five
    write(tmp_path / "winogavil/winogavil_dataset.csv", ',candidates,cue,associations\n0,"[""a""]",x,"[""b""]"\n')
    with pytest.raises(ValueError, match="row 0: 'b' is associated, and is no candidate"):
        open_dataset("winogavil", tmp_path)


def sugar_crepe(root, both: bool = False):
    """Two categories, in the form of SugarCrepe (an object) or SugarCrepe++ (a list)."""
    asked = []
    for category, n in (("replace_att", 9), ("swap_obj", 5)):
        entries = []
        for i in range(n):
            name = f"{i % 4:012d}.jpg"  # several questions about one picture
            noise(root / "val2017" / name, i % 4)
            entry = {"filename": name, "caption": f"a {i} dog\n", "negative_caption": f"a cat {category} {i}"}
            entry |= {"caption2": f"there is a dog, the {i}th"} if both else {}
            entries.append(entry)
            asked.append((category, entry))
        write(root / f"data/{category}.json", entries if both else {str(3 * i): e for i, e in enumerate(entries)})
    return asked


@pytest.mark.parametrize("both", [False, True])
def test_sugar_crepe_is_a_loop_over_captions(vit, tmp_path, both):
    name = "sugar_crepe_pp" if both else "sugar_crepe"
    asked = sugar_crepe(tmp_path / name, both)
    rows = evaluate(*parts(vit), [name], tmp_path, model_name="m")
    right, blind = {}, []
    pictures = [Image.open(tmp_path / name / f"val2017/{i:012d}.jpg") for i in range(4)]
    with torch.no_grad():
        features = vit.model.encode_image(torch.stack([vit.preprocess(p) for p in pictures]), normalize=True)
    for category, entry in asked:
        texts = [entry["caption"], *([entry["caption2"]] if both else []), entry["negative_caption"]]
        scores = similarities(vit, [pictures[int(entry["filename"][:12])]], texts)[0].tolist()
        right.setdefault(category, []).append(all(score > scores[-1] for score in scores[:-1]))
        with torch.no_grad():
            mean = (features.mean(0) @ vit.model.encode_text(vit.tokenizer(texts), normalize=True).T).tolist()
        blind.append(all(score > mean[-1] for score in mean[:-1]))
    found = {(row.metric, row.where.get(CATEGORY)): row for row in rows}
    for category, hits in right.items():
        assert found["text_score", category].value == pytest.approx(np.mean(hits))
        assert found["text_score", category].n == len(hits)
    everything = [hit for hits in right.values() for hit in hits]
    assert found["text_score", None].value == pytest.approx(np.mean(everything))
    assert found["mean_per_category", None].value == pytest.approx(np.mean([np.mean(h) for h in right.values()]))
    assert found["text_only", None].value == pytest.approx(np.mean(blind))
    assert found["text_score", None].extra["chance"] == pytest.approx(1 / 3 if both else 1 / 2)
    assert rows[0].extra["pictures"] == 4
    assert ("image_score", None) not in found
    other = "sugar_crepe" if both else "sugar_crepe_pp"
    (tmp_path / name).rename(tmp_path / other)
    with pytest.raises(FileNotFoundError, match="caption2"):  # the other set's files
        open_dataset(other, tmp_path)


def test_intervals_take_a_pictures_questions_together(vit, tmp_path):
    """Nine copies of one question count as one: the interval of copies is that of the originals."""
    for i in range(30):
        noise(tmp_path / f"a/images/{i}.png", i)
    lines = [{"image": f"{i}.png", "texts": [f"the {i}", f"number {i}"]} for i in range(30)]
    write(tmp_path / "a/questions.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    card = tmp_path / "one.toml"
    write(card, 'kind = "matching"\nlayouts = ["questions_jsonl"]\nsource = "a"\n')
    (one, *_) = evaluate(*parts(vit), [f"card:{card}"], "", model_name="m")
    write(tmp_path / "a/questions.jsonl", "".join(json.dumps(line) + "\n" for line in lines * 9))
    (nine, *_) = evaluate(*parts(vit), [f"card:{card}"], "", model_name="m")
    assert (one.n, nine.n) == (30, 270)
    assert (one.value, one.ci_low, one.ci_high) == pytest.approx((nine.value, nine.ci_low, nine.ci_high))


def test_aro_cuts_the_pictures_and_counts_each_relation(tmp_path):
    entries = [
        {
            "image_path": f"{i}.jpg",
            **{f"bbox_{side}": v for side, v in zip("xywh", (4, 6, 20, 10), strict=True)},
            "true_caption": "the dog is on the bed",
            "false_caption": "the bed is on the dog",
            "relation_name": ("on", "under")[i % 2],
            "attributes": ["red", "small"],
        }
        for i in range(3)
    ]
    for i in range(3):
        noise(tmp_path / f"aro/images/{i}.jpg", i)
    write(tmp_path / "aro/visual_genome_relation.json", entries)
    dataset = open_dataset("aro_relation", tmp_path)
    whole = Image.open(tmp_path / "aro/images/1.jpg")
    assert np.array_equal(dataset[1], whole.crop((4, 6, 24, 16)))
    assert [q.category for q in dataset.questions] == ["on", "under", "on"]
    assert dataset.keys[0] == "images/0.jpg 4,6,24,16"
    for entry in entries:
        entry.pop("relation_name")
    write(tmp_path / "aro/visual_genome_attribution.json", entries)
    assert {q.category for q in open_dataset("aro_attribution", tmp_path).questions} == {""}  # fewer than 25
    write(tmp_path / "aro/visual_genome_attribution.json", entries * 9)
    assert {q.category for q in open_dataset("aro_attribution", tmp_path).questions} == {"red_small"}
    entries[1]["false_caption"] = " "
    write(tmp_path / "aro/visual_genome_relation.json", entries)
    with pytest.raises(ValueError, match=r"relation\.json: question 1 lacks half of a pair: its text 2 of 2 is ' '"):
        open_dataset("aro_relation", tmp_path)


def test_vl_checklist_is_read_with_its_three_aspects(tmp_path):
    files = {
        "Attribute/vaw/color.json": "vg/VG_100K/1.jpg",
        "Object/Location/hake_location/hake_obj_mid.json": "hake/vcoco/2.jpg",
        "Relation/swig_action.json": "swig/3.jpg",
    }
    for number, (file, picture) in enumerate(files.items()):
        noise(tmp_path / "vl_checklist" / picture, number)
        entry = [picture.partition("/")[2], {"POS": ["a red car", "x"], "NEG": ["a blue car"]}]
        write(tmp_path / "vl_checklist/data" / file, [entry])
    dataset = open_dataset("vl_checklist", tmp_path)
    assert [q.category for q in dataset.questions] == ["Attribute/color", "Object/Location", "Relation/action"]
    assert dataset.questions[0].texts == ("a red car", "a blue car")
    write(tmp_path / "vl_checklist/data/Relation/swig_action.json", [["3.jpg", {"POS": ["a"], "NEG": []}]])
    with pytest.raises(ValueError, match=r"swig_action\.json, entry 0 must be"):
        open_dataset("vl_checklist", tmp_path)


def test_half_a_pair_is_left_out_or_named(vit, tmp_path):
    records = winoground(tmp_path / "winoground", 4)
    (tmp_path / "winoground/images/ex_2_img_1.png").unlink()
    (tmp_path / "winoground/images/ex_1_img_0.png").write_bytes(b"")
    dataset = open_dataset("winoground", tmp_path)
    assert dataset.said == "1 of 4 questions are left out: their pictures are not there"
    assert [q.key for q in dataset.questions] == ["0", "1", "3"]
    rows = evaluate(*parts(vit), ["winoground"], tmp_path, model_name="m")
    assert (rows[0].n, rows[0].extra["unreadable"]) == (2, 1)
    del records[3]["caption_1"]
    write(tmp_path / "winoground/data/examples.jsonl", "".join(json.dumps(record) + "\n" for record in records))
    with pytest.raises(ValueError, match=r"examples\.jsonl: question 3 lacks half of a pair: its text 2 of 2 is None"):
        open_dataset("winoground", tmp_path)
    del records[3]["image_1"]
    write(tmp_path / "winoground/data/examples.jsonl", "".join(json.dumps(record) + "\n" for record in records))
    with pytest.raises(ValueError, match="question 3 has no image_1"):
        open_dataset("winoground", tmp_path)


def test_questions_are_counted_where_data_sets_are_listed(tmp_path, capsys):
    winoground(tmp_path / "winoground", 400)
    write(tmp_path / "questions.jsonl", '{"image": "ex_0_img_0.png", "texts": ["a", "b"]}\n')  # of no set's name
    assert main(["datasets", "--data", str(tmp_path), "winoground", "sugar_crepe"]) == 0
    listed = capsys.readouterr().out
    assert "            400       400" in listed
    assert "another split" not in listed
    assert "get it: https://github.com/RAIVNLab/sugar-crepe" in listed


class Greys(PictureSet):
    """Questions of one's own, without files."""

    def __init__(self, questions, metric="text_score"):
        self.card = SimpleNamespace(name="greys", title="Greys", kind="matching", metric=metric, test_size=0)
        self.keys, self.questions = [str(i) for i in range(6)], questions

    def picture(self, index):
        return Image.new("RGB", (40, 40), (40 * index,) * 3)


def test_questions_of_ones_own_and_what_does_not_fit(vit):
    pairs = [Question(str(i), (i,), ("dark", "light"), ((0, 0),)) for i in range(4)]
    greys = Greys(pairs)
    rows = evaluate(*parts(vit), [Task(greys)], "", model_name="m", max_images=2)
    assert (rows[0].n, rows[0].extra["pictures"], rows[0].extra["partial"]) == (2, 2, {"used": 2, "of": 4})
    for metric in ("jaccard", "group_score", "top1"):
        with pytest.raises(
            ValueError, match=f"greys: the metric {metric} does not fit its questions: choose of text_score"
        ):
            evaluate(*parts(vit), [Task(Greys(pairs, metric))], "", model_name="m")
    with pytest.raises(ValueError, match="the metric mean_per_category does not fit its questions"):
        evaluate(*parts(vit), [Task(greys, metrics=("mean_per_category",))], "", model_name="m")
    with pytest.raises(ValueError, match="leave distorted: out"):
        evaluate(*parts(vit), [DistortedTask(Task(greys), choose(["contrast"]))], "", model_name="m", examples=0)


def test_texts_the_tokenizer_can_only_spell_out_are_counted(vit):
    texts = ["a dog", "ein Mädchen läuft über die Straße", "собака бежит по траве", "一只狗在草地上奔跑", "un café"]
    assert spelled_out(vit.tokenizer, texts) == 2
    foreign = [
        Question("0", (0,), ("一只狗在跑", "一只猫在跑"), ((0, 0),)),
        Question("1", (1,), ("a dog", "a cat"), ((0, 0),)),
    ]
    rows = evaluate(*parts(vit), [Task(Greys(foreign))], "", model_name="m")
    assert rows[0].extra["spelled_out"] == 2


def test_the_longer_text_as_a_shortcut(vit):
    texts = (("a very big dog", "a dog"), ("a dog", "a dog runs"), ("a dog", "a cat"))
    greys = Greys([Question(str(i), (i,), pair, ((0, 0),)) for i, pair in enumerate(texts)])
    rows = evaluate(*parts(vit), [Task(greys)], "", model_name="m", **vars(Settings(examples=0)))
    assert rows[0].extra["longer_text"] == pytest.approx((1 + 0 + 0.5) / 3)
