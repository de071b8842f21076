"""The evaluation as a whole: cache, processes, protocols, groups, pairs, geometry, captions; and CLIP_benchmark."""

import json
import logging
import os
import subprocess
import sys
import time
from typing import ClassVar

import numpy as np
import open_clip
import pytest
import tokenizers
import torch
from PIL import Image
from scipy.spatial.distance import cdist, pdist
from scipy.stats import binomtest, skew
from sklearn.metrics import accuracy_score, balanced_accuracy_score, roc_auc_score, top_k_accuracy_score
from torch.nn.functional import normalize
from torch.utils.data import DataLoader

from ssmclip.data.testsets import prompts as prompts_module
from ssmclip.data.testsets.open import open_dataset
from ssmclip.evaluate import METRICS, Model, Settings, embed_images, embed_texts, evaluate
from ssmclip.evaluate.captions import caption_rows, cut_at, longer_than, token_counts, words_seen
from ssmclip.evaluate.embeddings import cache, fingerprint
from ssmclip.evaluate.protocols import PROTOCOLS
from ssmclip.evaluate.retrieval import recall_rows
from ssmclip.evaluate.statistics.geometry import alignment, hubness, k_occurrence, modality_gap, uniformity
from ssmclip.evaluate.statistics.metrics import first_relevant_ranks, recall_at_k
from ssmclip.evaluate.statistics.paired import marked, mcnemar, paired_rows, unmarked
from ssmclip.evaluate.tasks import open_tasks, task_names
from ssmclip.rows import Result, read_rows
from ssmclip.rows.paper_tables import TABLE1

SENTENCE = "a small brown dog runs over the wet grass while two children watch "


@pytest.fixture
def data(tmp_path):
    """A data set of the two classes of SST2, 24 pictures of noise, and four captioned ones as Urban1k lies."""
    draws = np.random.default_rng(0)
    for i in range(24):
        folder = tmp_path / "rendered-sst2/test" / ("negative", "positive")[i % 3 == 0]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(draws.integers(0, 256, (40, 40 + i, 3), dtype=np.uint8)).save(folder / f"{i:02d}.png")
    for i in range(4):
        for kind in ("image", "caption"):
            (tmp_path / "urban1k" / kind).mkdir(parents=True, exist_ok=True)
        Image.fromarray(draws.integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(tmp_path / f"urban1k/image/{i}.jpg")
        (tmp_path / f"urban1k/caption/{i}.txt").write_text(f"{i} " + SENTENCE * (i + 1) * 3)
    return tmp_path


def parts(clip: Model):
    return clip.network, clip.preprocess, clip.tokenizer


# ---- against other people's code -------------------------------------------------------------------------------------


def test_clip_benchmark_gets_the_same_zero_shot_numbers(vit, data):
    benchmark = pytest.importorskip("clip_benchmark.metrics.zeroshot_classification")
    dataset = open_dataset("sst2", data)
    pictures = [(vit.preprocess(image), label) for image, label in (dataset[i] for i in range(len(dataset)))]
    loader = DataLoader(pictures, batch_size=7)
    templates = [template.replace("{}", "{c}") for template in dataset.templates]
    classifier = benchmark.zero_shot_classifier(
        vit.model, vit.tokenizer, dataset.classnames, templates, "cpu", amp=False
    )
    logits, target = benchmark.run_classification(vit.model, classifier, loader, "cpu", amp=False)
    rows = {row.metric: row.value for row in evaluate(*parts(vit), ["sst2"], data, model_name="vit")}
    assert rows["top1"] == pytest.approx(accuracy_score(target, logits.argmax(1)), abs=1e-12)
    assert rows["mean_per_class"] == pytest.approx(balanced_accuracy_score(target, logits.argmax(1)), abs=1e-12)


def test_clip_benchmark_gets_the_same_recalls(vit, data):
    benchmark = pytest.importorskip("clip_benchmark.metrics.zeroshot_retrieval")
    torch.manual_seed(1)
    images = [torch.randn(3, 32, 32) for _ in range(20)]
    texts = [[f"{SENTENCE[: 3 + i]} {n}" for n in range(1 + i % 3)] for i in range(20)]
    batches = [(torch.stack(images[i : i + 6]), texts[i : i + 6]) for i in range(0, 20, 6)]
    theirs = benchmark.evaluate(vit.model, batches, vit.tokenizer, "cpu", amp=False, recall_k_list=[1, 5, 10])
    flat = [text for of_image in texts for text in of_image]
    owner = torch.tensor([i for i, of_image in enumerate(texts) for _ in of_image])
    with torch.no_grad():
        points = normalize(vit.model.encode_image(torch.stack(images)), dim=-1)
    rows = recall_rows(points, embed_texts(vit, flat, Settings()), owner, [str(i) for i in range(20)], 0)
    ours = {row.metric: row.value for row in rows}
    for k in (1, 5, 10):
        assert ours[f"image_to_text_recall@{k}"] == pytest.approx(theirs[f"text_retrieval_recall@{k}"], abs=1e-6)
        assert ours[f"text_to_image_recall@{k}"] == pytest.approx(theirs[f"image_retrieval_recall@{k}"], abs=1e-6)


def test_the_papers_own_metric_code_gives_the_same(shared):
    truth = torch.load(shared / "parity/train_eval_misc.pt", weights_only=False)["metrics"]
    logits, target = truth["logits"].float(), truth["targets"]
    for metric in ("top1", "top5", "mean_per_class"):
        assert 100 * METRICS[metric].function(logits, target).item() == pytest.approx(truth[metric], abs=1e-4)
    both = 100 * METRICS["mean_top1_top5"].function(logits, target).item()
    assert both == pytest.approx((truth["top1"] + truth["top5"]) / 2, abs=1e-4)
    roc = METRICS["roc_auc"].function(truth["bin_logits"].float(), truth["bin_targets"]).item()
    assert 100 * roc == pytest.approx(truth["roc_auc"], abs=1e-4)
    scores = truth["retrieval_scores"]  # 20 images, 100 texts: a matrix without vectors, so its own factors serve
    images, texts = scores.float(), torch.eye(100)
    owner = torch.arange(100) // truth["captions_per_image"]
    to_text = first_relevant_ranks(images, texts, torch.arange(20), owner)
    to_image = first_relevant_ranks(texts, images, owner, torch.arange(20))
    for k in (1, 5, 10):
        assert 100 * recall_at_k(to_text, k).item() == pytest.approx(truth["retrieval"][f"image2text-R@{k}"])
        assert 100 * recall_at_k(to_image, k).item() == pytest.approx(truth["retrieval"][f"text2image-R@{k}"])


def test_metrics_equal_scikit_learns():
    torch.manual_seed(0)
    scores, target = torch.randn(300, 9), torch.randint(0, 9, (300,))
    top = [top_k_accuracy_score(target, scores, k=k, labels=range(9)) for k in (1, 5)]
    assert METRICS["mean_top1_top5"].function(scores, target).item() == pytest.approx(sum(top) / 2)
    two, labels = torch.randn(200, 2), torch.randint(0, 2, (200,))
    expected = roc_auc_score(labels, two[:, 1] - two[:, 0])
    assert METRICS["roc_auc"].function(two, labels).item() == pytest.approx(expected)


# ---- geometry --------------------------------------------------------------------------------------------------------


def test_geometry_equals_scipy():
    torch.manual_seed(0)
    images, texts = (normalize(torch.randn(n, 5), dim=-1) for n in (40, 1500))  # more texts than one block
    owner = torch.arange(1500) % 40
    distances = cdist(images.double(), texts.double(), "sqeuclidean")
    assert alignment(images[owner], texts) == pytest.approx(distances[owner, np.arange(1500)].mean(), rel=1e-5)
    pairs = pdist(texts.double(), "sqeuclidean")
    assert uniformity(texts) == pytest.approx(np.log(np.exp(-2 * pairs).mean()), rel=1e-5)
    centres = np.asarray(images.double()).mean(0) - np.asarray(texts.double()).mean(0)
    assert modality_gap(images, texts) == pytest.approx(np.linalg.norm(centres), rel=1e-6)
    nearest = np.argsort(distances.T, axis=1)[:, :10]
    counts = np.bincount(nearest.ravel(), minlength=40)
    assert k_occurrence(texts, images).tolist() == counts.tolist()
    assert hubness(texts, images) == pytest.approx(skew(counts), rel=1e-9)


def test_a_hub_is_seen():
    """Items around a circle with the queries: none is a hub. One item in the middle of all queries: it is."""
    angle = torch.arange(60) / 60 * 2 * torch.pi
    circle = torch.stack([angle.cos(), angle.sin()], dim=1)
    assert hubness(circle, circle) == 0.0
    queries = normalize(torch.randn(500, 6, generator=torch.Generator().manual_seed(0)) * 0.3 + torch.ones(6), dim=-1)
    items = normalize(torch.randn(60, 6, generator=torch.Generator().manual_seed(1)), dim=-1)
    assert hubness(queries, items) > 1


def test_a_large_score_matrix_is_never_whole_in_memory():
    """5,000 images and 25,000 captions: the matrix alone is 500 MB; the peak stays below 1 GB above the start."""
    code = r"""
import re, torch
from ssmclip.evaluate.statistics.metrics import first_relevant_ranks
from ssmclip.evaluate.statistics.geometry import k_occurrence
# Not resource.getrusage: what that tells begins with the peak of the process that started this one.
peak = lambda: int(re.search(r"VmHWM:\s+(\d+)", open("/proc/self/status").read())[1]) / 1e6
torch.manual_seed(0)
images = torch.nn.functional.normalize(torch.randn(5000, 16), dim=1)
owner = torch.arange(25000) // 5
texts = torch.nn.functional.normalize(images[owner] + 0.4 * torch.randn(25000, 16), dim=1)
start = peak()
first_relevant_ranks(images, texts, torch.arange(5000), owner)
first_relevant_ranks(texts, images, owner, torch.arange(5000))
k_occurrence(texts, images)
print(peak() - start)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 0 < float(done.stdout) < 1.0


# ---- captions --------------------------------------------------------------------------------------------------------


def visible(tokenizer, text: str, limit: int) -> int:
    """The most words whose tokens fit, one word after another."""
    words = text.split()
    return max(w for w in range(len(words) + 1) if token_counts(tokenizer, [" ".join(words[:w])])[0] <= limit)


def test_words_seen_equals_counting_word_by_word():
    tokenizer = open_clip.SimpleTokenizer()
    texts = ["A dog.", "", SENTENCE * 12, "Counterintuitively, e.g. the co-operatives' 1,234 décor-ations!! " * 20]
    assert words_seen(tokenizer, texts, 77) == [visible(tokenizer, text, 77) for text in texts]
    assert words_seen(tokenizer, texts, 77)[0] == 2
    assert words_seen(tokenizer, texts, None) == [len(text.split()) for text in texts]
    # What open_clip itself cuts: the text of the words seen, and no more, gives the tokens of the whole.
    words = texts[2].split()
    kept = words_seen(tokenizer, texts, 77)[2]
    assert tokenizer([" ".join(words[: kept + 1])]).equal(tokenizer([texts[2]])) or kept == len(words)


def test_what_text_towers_see_of_long_descriptions(shared, tmp_path, capsys):
    from ssmclip.cli.captions import read_texts, task_of
    from ssmclip.models.tokenizer import LanguageModelTokenizer

    path = shared / "data/longcaps/IIW-400/data.jsonl"
    texts = read_texts(path, "IIW")
    clip_rows = {
        row.metric: row.value for row in caption_rows("clip", task_of(path), open_clip.SimpleTokenizer(), texts)
    }
    assert 150 < clip_rows["words"] < 300
    assert 50 < clip_rows["words_seen"] < 75
    neox = LanguageModelTokenizer(shared / "data/tokenizers/20B_tokenizer.json", 77)
    few = texts[:3]
    assert words_seen(neox, few, 77) == [visible(neox, text, 77) for text in few]
    unlimited = LanguageModelTokenizer(shared / "data/tokenizers/20B_tokenizer.json")
    rows = {row.metric: row.value for row in caption_rows("mamba", "t", unlimited, few)}
    assert rows["words_seen"] == rows["words"]
    assert rows["whole_captions"] == 1
    with pytest.raises(ValueError, match="a record has none of title"):
        read_texts(path, "title")


def test_tokenizers_are_had_without_the_weights(shared, tmp_path):
    """CLIMP's own language model has 1.4 thousand million parameters; its tokenizer is that of every Mamba."""
    from ssmclip.models import names as clips

    path = shared / "data/tokenizers/20B_tokenizer.json"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(clips, "create_clip", lambda *args, **kwargs: pytest.fail("a model was made"))
        mamba, pairs = (clips.load_tokenizer(name, path) for name in ("CLIMP-Mamba1", "CLIP-VMamba-S"))
        theirs = clips.load_tokenizer("open_clip:ViT-B-32/openai")
    text = SENTENCE * 9
    expected = tokenizers.Tokenizer.from_file(str(path)).encode(text).ids
    assert mamba([text]).tolist() == [expected]
    assert pairs([text]).equal(open_clip.SimpleTokenizer()([text]))
    assert theirs([text]).equal(open_clip.SimpleTokenizer()([text]))
    with pytest.raises(FileNotFoundError, match="no such file or folder: runs/none"):
        clips.load_tokenizer("runs/none")


def test_long_captions_are_evaluated_cut_and_whole(data):
    """A tower of 300 tokens: both; one of 77: once."""
    torch.manual_seed(0)
    vision = {"image_size": 32, "patch_size": 16, "width": 32, "layers": 1, "head_width": 16}
    text = {"context_length": 300, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}
    model = open_clip.CLIP(embed_dim=16, vision_cfg=vision, text_cfg=text, output_dict=True).eval()
    tokenizer = open_clip.SimpleTokenizer(context_length=300)
    preprocess = open_clip.image_transform(32, is_train=False)
    assert longer_than(tokenizer, [SENTENCE * 10], 77)
    assert not longer_than(tokenizer, [SENTENCE], 77)
    assert not longer_than(open_clip.SimpleTokenizer(), [SENTENCE * 10], 77)
    rows = evaluate(model, preprocess, tokenizer, ["urban1k"], data, model_name="long")
    assert {row.condition for row in rows} == {"", "77 tokens"}
    # What the tower gets of a caption cut there is what it gets of the words that fit.
    dataset = open_dataset("urban1k", data)
    captions = [of_image[0] for of_image in dataset.captions]
    cut = cut_at(tokenizer, 77)(captions)
    assert cut.shape == (4, 300)
    assert cut[:, :77].equal(open_clip.SimpleTokenizer()(captions))
    assert not cut[:, 77:].any()
    gaps = {row.condition: row.value for row in rows if row.metric == "modality_gap"}
    with torch.no_grad():
        texts = normalize(model.encode_text(cut), dim=-1)
        images = normalize(model.encode_image(torch.stack([preprocess(dataset[i]) for i in range(4)])), dim=-1)
    assert gaps["77 tokens"] == pytest.approx((images.mean(0) - texts.mean(0)).norm().item(), rel=1e-4)
    assert gaps[""] != pytest.approx(gaps["77 tokens"], rel=1e-4)


# ---- cache and processes ---------------------------------------------------------------------------------------------


class Counting(torch.nn.Module):
    """A model that notes how many pictures or texts it is asked at a time."""

    asked: ClassVar[list[int]] = []  # the class's: what a model holds decides what it makes

    def __init__(self, model):
        super().__init__()
        self.model = model

    def encode_image(self, images, normalize=False):
        self.asked.append(len(images))
        return self.model.encode_image(images)

    def encode_text(self, tokens, normalize=False):
        self.asked.append(len(tokens))
        return self.model.encode_text(tokens)


def test_a_second_run_embeds_nothing(vit, data, tmp_path):
    kept = tmp_path / "kept"
    counting, asked, results = Counting(vit.model), [], []
    for _ in range(2):
        rows = evaluate(counting, vit.preprocess, vit.tokenizer, ["sst2", "urban1k"], data, model_name="m", cache=kept)
        asked.append(sum(Counting.asked))
        Counting.asked.clear()
        results.append(rows)
    recognised = 4 * (fingerprint.SHOWN + len(fingerprint.TEXTS))  # twice, of a Model for each kind of task
    assert 0 < asked[1] <= recognised < asked[0]
    assert results[0] == results[1]
    plain = evaluate(counting, vit.preprocess, vit.tokenizer, ["sst2", "urban1k"], data, model_name="m")
    assert results[0] == plain


@pytest.mark.parametrize("change", ["weights", "picture", "preprocess", "tokenizer", "subset"])
def test_whatever_changes_is_embedded_anew(vit, data, tmp_path, change):
    dataset = open_dataset("sst2", data)
    settings = Settings(cache=tmp_path / "kept")
    before = embed_images(vit, dataset, settings), embed_texts(vit, ["a dog"], settings)
    model, clip = vit.model, vit
    if change == "weights":
        model = open_clip.CLIP(**tiny_arguments(), output_dict=True).eval()
        model.load_state_dict(vit.model.state_dict())
        with torch.no_grad():
            model.visual.conv1.weight[0, 0, 0, 0] += 1e-3
            model.token_embedding.weight += 1e-3
        clip = Model(model, vit.preprocess, vit.tokenizer, "vit")
    if change == "picture":
        path = dataset.files[3]
        time.sleep(0.02)
        Image.new("RGB", (40, 40), "green").save(path)
    if change == "preprocess":
        clip = Model(model, open_clip.image_transform(32, is_train=False, interpolation="bilinear"), vit.tokenizer, "v")
    if change == "tokenizer":
        clip = Model(model, vit.preprocess, open_clip.SimpleTokenizer(context_length=77, clean="canonicalize"), "v")
    if change == "subset":
        settings = Settings(cache=settings.cache, max_images=5)
    fresh = Settings(max_images=settings.max_images)
    images = embed_images(clip, dataset, settings)
    assert images.features.equal(embed_images(clip, dataset, fresh).features)
    assert embed_texts(clip, ["a dog"], settings).equal(embed_texts(clip, ["a dog"], fresh))
    same = len(images.features) == len(before[0].features) and images.features.equal(before[0].features)
    assert same == (change == "tokenizer")


def tiny_arguments() -> dict:
    vision = {"image_size": 32, "patch_size": 8, "width": 32, "layers": 2, "head_width": 16}
    text = {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}
    return {"embed_dim": 16, "vision_cfg": vision, "text_cfg": text}


def test_a_file_of_another_model_is_not_believed(vit, data, tmp_path, caplog):
    dataset, settings = open_dataset("sst2", data), Settings(cache=tmp_path / "kept")
    right = embed_images(vit, dataset, settings).features
    (path,) = (tmp_path / "kept/images").iterdir()
    made_of = json.loads(cache.safetensors.safe_open(path, "pt").metadata()["about"])["made_of"]
    cache.write(path, made_of | {"model": "another"}, {"features": right * 0, "index": torch.arange(24)}, {})
    with caplog.at_level(logging.WARNING):
        assert embed_images(vit, dataset, settings).features.equal(right)
    assert "embeddings of another model" in caplog.text
    path.write_bytes(path.read_bytes()[:200])
    with caplog.at_level(logging.WARNING):
        assert embed_images(vit, dataset, settings).features.equal(right)
    assert "is damaged and will be recomputed" in caplog.text


def test_without_room_for_the_cache_the_numbers_come_all_the_same(vit, data, tmp_path, monkeypatch, caplog):
    def full(self, content):
        self.touch()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cache.Path, "write_bytes", full)
    settings = Settings(cache=tmp_path / "kept")
    with caplog.at_level(logging.WARNING):
        images = embed_images(vit, open_dataset("sst2", data), settings)
    assert len(images.features) == 24
    assert "embeddings are not cached" in caplog.text
    assert "No space left on device" in caplog.text
    assert list((tmp_path / "kept/images").iterdir()) == []


def test_unreadable_pictures_are_named_also_from_the_cache(vit, data, tmp_path):
    (data / "rendered-sst2/test/negative/01.png").write_bytes(b"no picture")
    for _ in range(2):
        rows = evaluate(*parts(vit), ["sst2"], data, model_name="m", cache=tmp_path / "kept", examples=2)
        assert rows[0].extra["unreadable"] == 1
        assert "negative/01.png: " in rows[0].extra["unreadable_first"][0]
        assert rows[0].n == 23


RUN = """
import sys, torch, open_clip
from ssmclip.evaluate.embeddings.ranks import launched
from ssmclip.evaluate import evaluate
from ssmclip.rows import write_rows
torch.set_num_threads(1)
rank, device = launched("cpu")
torch.manual_seed(0)
vision = {"image_size": 32, "patch_size": 8, "width": 32, "layers": 2, "head_width": 16}
text = {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}
model = open_clip.CLIP(embed_dim=16, vision_cfg=vision, text_cfg=text, output_dict=True).eval()
tools = open_clip.image_transform(32, is_train=False), open_clip.SimpleTokenizer()
rows = evaluate(model, *tools, ["sst2", "urban1k"], sys.argv[1], model_name="m", batch_size=5, examples=2)
write_rows(f"{sys.argv[2]}{rank}.jsonl", rows)
"""


def test_two_processes_give_the_numbers_of_one(data, tmp_path):
    """As a launcher starts them: 24 images in batches of 5 and one unreadable, dealt out to two."""
    (data / "rendered-sst2/test/negative/01.png").write_bytes(b"no picture")
    (tmp_path / "run.py").write_text(RUN)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]  # accelerate's needs MPI on a CPU
    for words, name in (([], "one"), (launch, "two")):
        command = [sys.executable, *words, str(tmp_path / "run.py"), str(data), str(tmp_path / name)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    one, two, other = (read_rows(tmp_path / f"{name}.jsonl")[1] for name in ("one0", "two0", "two1"))
    assert one == two == other
    assert one[0].extra["unreadable"] == 1


# ---- groups, pairs, protocols ----------------------------------------------------------------------------------------


def test_the_worst_group_counts(vit, data):
    """Against a loop over the groups."""
    folder = data / "rendered-sst2/test"
    files = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.png"))
    group = {file: "odd" if int(file[-6:-4]) % 2 else "even" for file in files}
    (folder / "groups.csv").write_text("file,group\n" + "".join(f"{file},{group[file]}\n" for file in files))
    task = f"folder:{data / 'rendered-sst2'}"
    rows = evaluate(*parts(vit), [task], "", model_name="m")
    found = {row.metric: row for row in rows}
    right = dict(zip(files, unmarked(found["top1"]).tolist(), strict=True))
    of_group = {name: [right[file] for file in files if group[file] == name] for name in ("even", "odd")}
    accuracies = {name: sum(hits) / len(hits) for name, hits in of_group.items()}
    assert found["worst_group"].value == pytest.approx(min(accuracies.values()))
    assert found["average_group"].value == pytest.approx(sum(accuracies.values()) / 2)
    assert found["worst_group"].ci_low <= found["worst_group"].value <= found["worst_group"].ci_high
    listed = {entry["name"]: (entry["accuracy"], entry["n"]) for entry in found["worst_group"].extra["groups"]}
    assert listed == {name: (pytest.approx(accuracies[name]), len(of_group[name])) for name in of_group}


def test_paired_tests_equal_scipy_and_the_rows_they_come_from():
    draws = np.random.default_rng(0)
    a, b = (torch.from_numpy(draws.random(200) < p) for p in (0.7, 0.55))
    keys = [str(i) for i in range(200)]

    def row(model, right, keys=keys, task="t"):
        return Result(model, task, "top1", right.double().mean().item(), n=len(right), extra=marked(right, keys))

    assert unmarked(row("A", a)).equal(a)
    only = int((a & ~b).sum()), int((b & ~a).sum())
    assert mcnemar(a, b) == pytest.approx(binomtest(only[0], sum(only), 0.5).pvalue, rel=1e-12)
    assert mcnemar(a, a) == 1.0
    (made,) = paired_rows([row("A", a), row("B", b), row("A", a, task="other"), row("B", b, keys[::-1], "other")])
    assert (made.model, made.against, made.metric) == ("A", "B", "top1_difference")
    assert made.value == pytest.approx((a.double().mean() - b.double().mean()).item())
    spread = (a.double() - b.double()).std(correction=0).item() / 200**0.5
    assert made.ci_low == pytest.approx(made.value - 1.96 * spread, abs=0.02)
    assert made.ci_high == pytest.approx(made.value + 1.96 * spread, abs=0.02)
    assert (made.extra["only_first"], made.extra["only_second"]) == only


def test_the_papers_protocol(vit, data, tmp_path):
    """Its size, interpolation and statistics; its prompts, which a person brings."""
    with pytest.raises(ValueError, match=r"--prompts FOLDER with labels\.json and templates\.json"):
        PROTOCOLS["clip-mamba"].prompts(None)
    (tmp_path / "labels.json").write_text(json.dumps({"rendered_sst2": ["negative", "positive"]}))
    (tmp_path / "templates.json").write_text(json.dumps({"rendered_sst2": ["a {} review of a movie."]}))
    given = prompts_module.read_prompts(f"{tmp_path / 'labels.json'},{tmp_path / 'templates.json'}")
    rows = evaluate(*parts(vit), ["sst2"], data, model_name="m", protocol="clip-mamba", prompts=given)
    assert rows[0].extra["protocol"] == "clip-mamba"
    assert rows[0].extra["prompts"] == "labels.json, templates.json"
    preprocess = PROTOCOLS["clip-mamba"].preprocess(vit.model, vit.preprocess, "classification", None)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 64, 3), dtype=np.uint8))
    from torchvision import transforms

    expected = transforms.Compose(
        [
            transforms.Resize(32, transforms.InterpolationMode.BILINEAR),
            transforms.CenterCrop(32),
            transforms.ToTensor(),
            transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ]
    )
    torch.testing.assert_close(preprocess(image), expected(image))
    theirs = evaluate(*parts(vit), ["sst2"], data, model_name="m", protocol="clip-benchmark")
    assert theirs[0].extra["prompts"] == "CLIP_benchmark"


def test_names_that_stand_for_many_data_sets(data):
    assert task_names(["table1"], data) == list(TABLE1.columns)
    assert task_names(["found", "sst2", "cub"], data) == ["digits", "scenes", "sst2", "urban1k", "cub"]
    assert [task.name for task in open_tasks(["sst2"], data)] == ["sst2"]
    with pytest.raises(FileNotFoundError, match=r"data folder not found: .*dta; give another --data"):
        task_names(["found", "sst2"], data.with_name("dta"))
    assert task_names(["found"], "hub:nobody") == []  # nothing downloaded


def test_datasets_are_listed(data, capsys):
    from ssmclip.__main__ import main

    (data / "cifar-10-batches-py").mkdir()
    (data / "cifar-10-batches-py/test_batch").write_bytes(b"<html>")
    assert main(["datasets", "--data", str(data)]) == 0
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines() if line}
    assert "24     1,821" in lines["sst2"]
    assert lines["sst2"].endswith("rendered-sst2/test, partial")
    assert "get it: https://www.vision.caltech.edu" in lines["cub"]
    assert "unreadable" in lines["cifar10"]
    assert "640       640" in lines["scenes"]
