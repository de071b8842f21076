"""DataComp's 38 data sets in tiny copies as it lays them out, its metrics, several classes on a picture, and suites."""

import io
import json
import tarfile
from math import sqrt
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import average_precision_score, f1_score

from ssmclip.data.testsets.open import load_card, open_dataset
from ssmclip.data.testsets.prompts import names_on
from ssmclip.evaluate import Settings, Study, Task, evaluate
from ssmclip.evaluate.embeddings.embed import embed_images
from ssmclip.evaluate.suites import MEAN, SUITES, suite_rows
from ssmclip.evaluate.tasks import open_tasks, task_names
from ssmclip.rows import Result, read_rows
from ssmclip.rows.condition import CATEGORY

FEW = Settings(batch_size=32, examples=0)


def parts(clip):
    return clip.model, clip.preprocess, clip.tokenizer


def noise(seed: int) -> bytes:
    out = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(out, "PNG")
    return out.getvalue()


def npy(values) -> bytes:
    out = io.BytesIO()
    np.save(out, np.asarray(values))
    return out.getvalue()


def shards(folder, samples, names=(), kind="classification") -> None:
    """A wds_NAME_test folder as DataComp downloads it. samples: suffix -> content, of each."""
    (folder / "test").mkdir(parents=True)
    (folder / "classnames.txt").write_text("\n".join(names) + "\n")
    (folder / "zeroshot_classification_templates.txt").write_text("a drawing of {c}\n")
    (folder / "dataset_type.txt").write_text(f"{kind}\n")
    (folder / "test/nshards.txt").write_text("1\n")
    with tarfile.open(folder / "test/0.tar", "w") as tar:
        for number, files in enumerate(samples):
            for suffix, content in files.items():
                info = tarfile.TarInfo(f"s{number:07d}.{suffix}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))


def labelled(name: str, root, n: int = 2) -> None:
    """A tiny copy of a data set: labels 0 and the last in turn, metadata in other orders."""
    card = load_card(name)
    names = names_on(card) or [f"thing {i}" for i in range(card.classes)]
    samples = [
        {
            "png": noise(number),
            "cls": str((0, len(names) - 1)[number % 2]).encode(),
            "npy": npy([number // 2 % 3] * len(card.metadata)),
        }
        for number in range(n)
    ]
    shards(root / f"wds_{(card.aliases or (name,))[-1].replace('/', '-')}_test", samples, names)


def captioned(name: str, root) -> None:
    samples = [{"png": noise(number), "txt": f"number {number}\nthe {number}th".encode()} for number in range(12)]
    shards(root / name, samples, kind="retrieval")


def winogavil(root) -> None:
    (root / "winogavil").mkdir()
    words = [f"word{i}" for i in range(12)]
    for number, word in enumerate(words):
        (root / f"winogavil/{word}.jpg").write_bytes(noise(number))
    lines = [",candidates,cue,associations,ID"]
    for number, (many, right) in enumerate([(12, 3), (5, 2), (10, 4)]):
        lists = (json.dumps(words[:many]).replace('"', '""'), json.dumps(words[:right]).replace('"', '""'))
        lines.append(f'{number},"{lists[0]}",cue{number},"{lists[1]}",{number}')
    (root / "winogavil/winogavil_dataset.csv").write_text("\n".join(lines) + "\n")


def test_datacomp_is_evaluated_on_tiny_copies_in_its_layout(vit, tmp_path):
    """All 38 from one call; the mean is that of the metrics that DataComp's task list names."""
    data = tmp_path / "data"
    data.mkdir()
    for name in SUITES["datacomp"].metrics:
        if name in ("flickr30k", "coco_karpathy"):
            captioned(name, data)
        elif name == "winogavil":
            winogavil(data)
        else:
            labelled(name, data, 6)
    names = task_names(["datacomp"], data)
    assert len(names) == len(set(names)) == 38
    study = Study({"m": parts(vit)}, open_tasks(["datacomp"], data), FEW, out=tmp_path / "r.jsonl", suites=["datacomp"])
    rows = study.rows()
    (mean,) = [row for row in rows if row.metric == MEAN]
    found = {(row.task, row.metric, row.where.get(CATEGORY)): row.value for row in rows}
    main = dict.fromkeys(names, "top1") | {"iwildcam": "macro_f1", "dollar_street": "worst_group_top5"}
    main |= dict.fromkeys(("fmow", "geode"), "worst_group")
    main |= dict.fromkeys(("caltech101", "aircraft", "flowers", "pets"), "mean_per_class")
    values = {name: found[name, metric, None] for name, metric in main.items() if (name, metric, None) in found}
    for name in ("flickr30k", "coco_karpathy"):
        values[name] = (found[name, "image_to_text_recall@1", None] + found[name, "text_to_image_recall@1", None]) / 2
    values["winogavil"] = found["winogavil", "jaccard", "10-12 candidates"]
    assert mean.extra["values"] == pytest.approx(values)
    assert (mean.task, mean.n, mean.value) == ("datacomp", 38, pytest.approx(np.mean(list(values.values()))))
    assert mean.ci_low < mean.value < mean.ci_high
    assert "said" not in mean.extra
    assert read_rows(tmp_path / "r.jsonl")[1] == rows
    heads = {name: next(row.metric for row in rows if row.task == name) for name in main}
    assert {heads[name] for name in ("fmow", "geode", "dollar_street", "iwildcam")} <= set(main.values())


def test_a_suites_mean_says_what_is_missing_and_how_sure_it_is():
    rows = [
        Result("A", "mnist", "top1", 0.5, 0.4, 0.7, 100),
        Result("A", "geode", "worst_group", 0.3, 0.2, 0.35, 100),
        Result("A", "geode", "top1", 0.9, 0.8, 0.95, 100),
        Result("A", "flickr30k", "image_to_text_recall@1", 0.9, 0.8, 0.95, 100),  # one of two recalls
        Result("B", "cub", "top1", 0.9, 0.8, 0.95, 100),
        Result("A", "mnist", "top1", 0.1, 0.0, 0.3, 100, against="B"),
    ]
    (mean,) = suite_rows(rows, ["datacomp"], ["A", "B"])
    assert (mean.model, mean.value, mean.n) == ("A", pytest.approx(0.4), 2)
    assert mean.ci_low == pytest.approx(0.4 - sqrt(0.1**2 + 0.1**2) / 2)
    assert mean.ci_high == pytest.approx(0.4 + sqrt(0.2**2 + 0.05**2) / 2)
    assert mean.extra["said"].startswith("2 of 38 data sets; missing: caltech101, cifar10")
    assert suite_rows(rows, [], ["A"]) == []


def test_suites_are_clip_benchmarks_collections():
    package = pytest.importorskip("clip_benchmark").__path__[0]
    text = Path(package, "datasets/builder.py").read_text(encoding="utf-8")
    namespace: dict = {}
    exec(text[text.index("dataset_collection = {") :].split("\n}\n")[0] + "\n}", namespace)
    for name in ("vtab", "vtab+", "imagenet_robustness"):
        theirs = set(namespace["dataset_collection"][name])
        ours = [{task, *load_card(task).aliases} for task in SUITES[name].metrics]
        assert len(ours) == len(theirs)
        spelled = (
            theirs | {item.removeprefix("vtab/") for item in theirs} | {"imagenet" if "imagenet1k" in theirs else ""}
        )
        assert [names for names in ours if not names & spelled] == []


# ---- groups ----------------------------------------------------------------------------------------------------------


def test_the_worst_region_and_the_worst_income_group_count(vit, tmp_path):
    """Against a loop over the groups, which are numbers beside the pictures."""
    for name, metric, k in (("geode", "worst_group", 1), ("dollar_street", "worst_group_top5", 5)):
        labelled(name, tmp_path, 60)
        dataset = open_dataset(name, tmp_path)
        rows = evaluate(*parts(vit), [name], tmp_path, model_name="m", examples=0)
        seen = embed_images(vit, dataset, FEW)
        with torch.no_grad():
            texts = vit.model.encode_text(
                vit.tokenizer([f"a drawing of {n}" for n in dataset.classnames]), normalize=True
            )
        best = (seen.features @ texts.T).topk(k).indices
        hits = (best == torch.tensor(dataset.labels)[:, None]).any(1)
        of_group = [hits[[i for i in range(60) if i // 2 % 3 == group]].double().mean().item() for group in range(3)]
        assert (rows[0].metric, rows[0].value) == (metric, pytest.approx(min(of_group)))
        assert rows[0].extra["title"] == load_card(name).title
        listed = {group["name"]: group["accuracy"] for group in rows[0].extra["groups"]}
        assert listed == {f"{dataset.card.grouped_by} {i}": pytest.approx(value) for i, value in enumerate(of_group)}
        assert "right" in next(row.extra for row in rows if row.metric == "top1")


def test_faces_are_grouped_and_the_gap_is_between_the_best_and_the_worst_group(vit, tmp_path):
    lines, truth = ["file,age,gender,race,service_test"], {}
    for i in range(24):
        race, gender = ("White", "Black", "East Asian")[i % 3], ("Male", "Female")[i // 3 % 2]
        path = tmp_path / f"fairface/val/{i}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(noise(i))
        lines.append(f"val/{i}.jpg,20-29,{gender},{race},True")
        truth[f"val/{i}.jpg"] = (race, i // 3 % 2)
        utk = tmp_path / f"UTKFace/{20 + i}_{i // 3 % 2}_{i % 5}_2017011623{i:02d}.jpg.chip.jpg"
        utk.parent.mkdir(exist_ok=True)
        utk.write_bytes(noise(i))
    (tmp_path / "fairface/fairface_label_val.csv").write_text("\n".join(lines) + "\n")
    dataset = open_dataset("fairface", tmp_path)
    assert dict(zip(dataset.keys, zip(dataset.groups, dataset.labels, strict=True), strict=True)) == truth
    rows = {row.metric: row for row in evaluate(*parts(vit), ["fairface"], tmp_path, model_name="m", examples=0)}
    each = [group["accuracy"] for group in rows["worst_group"].extra["groups"]]
    assert rows["group_gap"].value == pytest.approx(max(each) - min(each))
    assert next(iter(rows)) == "worst_group"
    (tmp_path / "UTKFace/39_1_20170116174525125.jpg.chip.jpg").write_bytes(noise(1))  # the authors' own slip
    faces = open_dataset("utkface", tmp_path)
    assert (len(faces), faces.said[:11], set(faces.groups)) == (
        24,
        "1 pictures ",
        {*"White Black Asian Indian Others".split()},
    )
    assert [faces.labels[i] for i in range(3)] == [int(faces.keys[i].split("_")[1]) for i in range(3)]
    (tmp_path / "fairface/fairface_label_val.csv").write_text("file,age,gender,race\nval/0.jpg,3,x,White\n")
    with pytest.raises(ValueError, match=r"the gender of val/0\.jpg must be Male or Female \(got 'x'\)"):
        open_dataset("fairface", tmp_path)


def test_groups_that_are_missing_or_others_are_named(vit, tmp_path):
    shards(tmp_path / "a/geode", [{"png": noise(1), "cls": b"0"}], [f"thing {i}" for i in range(40)])
    with pytest.raises(ValueError, match="geode: the metric worst_group needs a group for each picture"):
        evaluate(*parts(vit), ["geode"], tmp_path / "a", model_name="m")
    two = [{"png": noise(1), "cls": b"0", "npy": npy([1, 2])}, {"png": noise(2), "cls": b"1"}]
    shards(tmp_path / "b/geode", two, [f"thing {i}" for i in range(40)])
    with pytest.raises(ValueError, match=r"s0000001 in .*0\.tar has no \.npy"):
        open_dataset("geode", tmp_path / "b")
    shards(tmp_path / "c/geode", [{"png": noise(1), "cls": b"0", "npy": npy([1])}], [f"thing {i}" for i in range(40)])
    with pytest.raises(ValueError, match=r"must have 2 numbers, region, country \(got 1\)"):
        open_dataset("geode", tmp_path / "c")
    shards(tmp_path / "d/geode", [{"png": noise(1), "cls": b"0", "npy": b"\x93NUM"}], ["x"])
    with pytest.raises(ValueError, match=r"the numbers of s0000000 in .* are damaged"):
        open_dataset("geode", tmp_path / "d")


@pytest.mark.parametrize(
    ("metric", "classes", "said"),
    [
        ("top5", 4, r"set: the metric top5 needs at least 5 classes \(got 4\)"),
        ("roc_auc", 4, r"set: the metric roc_auc needs exactly 2 classes \(got 4\)"),
        ("accuracy", 4, "unknown metric 'accuracy'"),
        ("worst_group", 4, "set: the metric worst_group needs a group"),
    ],
)
def test_a_metric_that_does_not_fit_is_refused_before_anything_is_embedded(vit, metric, classes, said):
    card = SimpleNamespace(name="set", title="Set", kind="classification", metric=metric, test_size=2)
    names = tuple(f"thing {i}" for i in range(classes))
    given = SimpleNamespace(card=card, classnames=names, templates=("a {}.",), labels=[0, 1], keys=["0", "1"], files=())
    with pytest.raises((ValueError, KeyError), match=said):  # the test set has no pictures: embedding fails otherwise
        evaluate(*parts(vit), [Task(given)], "", model_name="m")


# ---- several classes on a picture ------------------------------------------------------------------------------------


def test_several_classes_on_a_picture(vit, tmp_path):
    """As CLIP_benchmark writes such sets; the mean average precision is scikit-learn's."""
    names = names_on(load_card("voc2007_multilabel"))
    on = np.random.default_rng(3).random((40, 20)) < 0.15
    on[:, 4] = False
    shards(
        tmp_path / "wds_voc2007_multilabel",
        [{"png": noise(i), "npy": npy(row.astype(np.float32))} for i, row in enumerate(on)],
        names,
        "multilabel",
    )
    dataset = open_dataset("voc2007_multilabel", tmp_path)
    rows = evaluate(*parts(vit), ["voc2007_multilabel"], tmp_path, model_name="m")
    with torch.no_grad():
        texts = vit.model.encode_text(vit.tokenizer([f"a drawing of {name}" for name in names]), normalize=True)
    scores = embed_images(vit, dataset, FEW).features @ texts.T
    each = {name: average_precision_score(on[:, c], scores[:, c]) for c, name in enumerate(names) if on[:, c].any()}
    assert [row.metric for row in rows] == ["mean_average_precision", "top1"]
    assert rows[0].value == pytest.approx(np.mean(list(each.values())), abs=1e-6)
    assert rows[0].extra["average_precision"] == pytest.approx(each, abs=1e-6)
    assert rows[0].ci_low < rows[0].value < rows[0].ci_high
    assert rows[0].extra["chance"] == pytest.approx(on.mean())
    assert rows[1].value == pytest.approx(on[range(40), scores.argmax(1)].mean())
    with pytest.raises(ValueError, match="the metric top5 does not fit pictures with several classes"):
        evaluate(*parts(vit), [Task(dataset, metrics=("top5",))], "", model_name="m")


def test_macro_f1_counts_classes_that_occur(vit, tmp_path):
    labelled("iwildcam", tmp_path, 40)
    dataset = open_dataset("iwildcam", tmp_path)
    rows = evaluate(*parts(vit), ["iwildcam"], tmp_path, model_name="m", examples=0)
    with torch.no_grad():
        texts = vit.model.encode_text(vit.tokenizer([f"a drawing of {n}" for n in dataset.classnames]), normalize=True)
    guess = (embed_images(vit, dataset, FEW).features @ texts.T).argmax(1)
    expected = f1_score(dataset.labels, guess, average="macro", labels=np.unique(dataset.labels))
    assert (rows[0].metric, rows[0].value) == ("macro_f1", pytest.approx(expected))
