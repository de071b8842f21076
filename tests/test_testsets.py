"""Test sets as they lie on people's disks: each found in the same pictures and names by torchvision, or written down
beside the files when these are made. The right value of every case is independent of the reader."""

import csv
import hashlib
import io
import json
import multiprocessing
import os
import random
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from torchvision.datasets import ImageFolder

from ssmclip.config.lists import split_list
from ssmclip.data.images import files_below, folders_in, pictures_below
from ssmclip.data.testsets.card import LAYOUTS, Found, Pictures
from ssmclip.data.testsets.open import list_cards, load_card, open_dataset
from ssmclip.data.testsets.prompts import Prompts, names_on
from ssmclip.data.testsets.testset import Classification, PictureSet, Retrieval
from ssmclip.evaluate.embeddings.embed import Settings, embed_images
from ssmclip.evaluate.retrieval import recall_rows
from ssmclip.evaluate.tasks import Task, open_tasks
from ssmclip.humans.trials import read_trials
from ssmclip.registry import UnknownName
from test_data_originals import WRITERS, coco, encoded, picture, save, text, write_captioned, write_waterbirds


def shade(image: Image.Image) -> int:
    return image.getpixel((0, 0))[0]


def own(folder: Path):
    return open_dataset(f"folder:{folder}", "unused")


# ---- labels and names by one order -----------------------------------------------------------------------------------

ORDERS = {
    "numbers": [str(i) for i in range(12)],
    "padded": [f"{i:02d}" for i in range(12)],
    "mixed": ["1", "2", "10", "a", "B", "_c", "11"],
    "signs": ["C", "C++", "C#", "1.0", "10", "-1", "1"],
    "numbered": ["1.cat", "2.cat", "10.dog"],
    "large": ["9" * 30, "10", "9"],
}


@pytest.mark.parametrize("names", ORDERS.values(), ids=ORDERS)
def test_a_label_has_the_name_of_its_folder(tmp_path, names):
    for number, name in enumerate(names):
        save(tmp_path / name / "sub" / f"{name}.png", number)
    dataset = own(tmp_path)
    assert len(dataset.classnames) == len(names) == len(set(dataset.classnames))
    label_of = {}
    for i, key in enumerate(dataset.keys):
        image, label = dataset[i]
        folder = names[shade(image)]
        assert key.split("/")[0] == folder
        label_of[folder] = label
        said = dataset.classnames[label]
        assert said == folder or said == folder.replace("_", " ").strip() or folder.endswith(f".{said}")
    assert sorted(label_of.values()) == list(range(len(names)))


def test_the_order_of_numbers_is_kept_where_the_card_names_them(tmp_path):
    """ImageNet-V2's folders are numbers, the names the card's: label 2 is folder 2, though 10 comes first by letter."""
    for number in range(1000):
        (tmp_path / f"imagenet_v2/{number}").mkdir(parents=True)
        (tmp_path / f"imagenet_v2/{number}/x.png").write_bytes(b"")
    dataset = open_dataset("imagenet_v2", tmp_path)
    assert {int(key.split("/")[0]): label for key, label in zip(dataset.keys, dataset.labels, strict=True)} == {
        i: i for i in range(1000)
    }


def test_a_part_of_the_folders_of_a_published_set_keeps_its_labels(tmp_path):
    """ImageFolder would number what is there: 0, 1. Where the order alone says which is which, that is refused."""
    card = load_card("eurosat")
    for name in ("River", "Forest"):
        save(tmp_path / f"eurosat/2750/{name}/1.png", 1)
    dataset = open_dataset("eurosat", tmp_path)
    assert [card.folders[label] for label in dataset.labels] == ["Forest", "River"]
    for name in ("AD", "ZW"):
        save(tmp_path / f"country211/test/{name}/1.png", 1)
    with pytest.raises(ValueError, match="2 class folders and country211 has 211"):
        open_dataset("country211", tmp_path)


def test_cub_counts_its_classes_by_number(tmp_path):
    WRITERS["cub"](tmp_path)
    file = tmp_path / "CUB_200_2011/classes.txt"
    lines = file.read_text().splitlines()
    file.write_text("\n".join(random.Random(0).sample(lines, len(lines))) + "\n")
    dataset = open_dataset("cub", tmp_path)
    for key, label in zip(dataset.keys, dataset.labels, strict=True):
        assert dataset.classnames[label] == key.split("/")[1].partition(".")[2].replace("_", " ")


def test_own_names_are_said_as_they_are_written(tmp_path):
    for number, name in enumerate(["iPhone", "McDonald", "hot_dog", "LaTeX", "007.Yellow_Bird"]):
        save(tmp_path / name / "1.png", number)
    assert own(tmp_path).classnames == ("Yellow Bird", "LaTeX", "McDonald", "hot dog", "iPhone")


def test_prompts_for_own_numbers_must_be_told_apart(tmp_path):
    for number in range(11):
        save(tmp_path / "set" / str(number) / "1.png", number)
    words = tuple(f"word{i}" for i in range(11))
    prompts = Prompts({"set": words}, {"set": ("a {}",)}, "file")
    dataset = open_dataset(f"folder:{tmp_path / 'set'}", "x", prompts=prompts)
    assert all(dataset.classnames[dataset[i][1]] == words[shade(dataset[i][0])] for i in range(11))


# ---- folders ---------------------------------------------------------------------------------------------------------

LITTER = [
    ".ipynb_checkpoints/a-checkpoint.png", "cat/.ipynb_checkpoints/a-checkpoint.png", "__MACOSX/cat/._a.png",
    "dog/._a.png", ".hidden/x.png", "cat/.x.png", "@eaDir/cat/a.png", "cat/Thumbs.db", ".DS_Store",
]  # fmt: skip


def litter(root: Path) -> None:
    for name in LITTER:
        if name.endswith(".png"):
            save(root / name, 99)
        else:
            text(root / name, "x")


def test_what_systems_leave_behind_is_no_class_and_no_picture(tmp_path):
    for number, name in enumerate(("cat/a.png", "cat/deep/er/b.JPG", "dog/a.png")):
        save(tmp_path / "clean" / name, number)
        save(tmp_path / "used" / name, number)
    litter(tmp_path / "used")
    clean = ImageFolder(tmp_path / "clean")
    dataset = own(tmp_path / "used")
    assert list(dataset.classnames) == clean.classes
    assert dataset.keys == [str(Path(path).relative_to(tmp_path / "clean")) for path, _ in clean.samples]
    assert dataset.labels == clean.targets


@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("name", ["eurosat", "country211", "sst2", "caltech101", "kitti", "clevr", "sun397"])
def test_published_folders_are_read_without_them(tmp_path, name):
    WRITERS[name](tmp_path)
    before = open_dataset(name, tmp_path)
    folders = {(before.files[i]).parent for i in range(len(before))}
    for folder in folders:
        (folder / ".ipynb_checkpoints").mkdir()
        for file in list(folder.glob("*.*g")):
            (folder / f"._{file.name}").write_bytes(b"\0\5\x16\7")
            save(folder / ".ipynb_checkpoints" / file.name, 1)
        save(folder.parent / ".ipynb_checkpoints" / "x.png", 1)
        save(folder.parent / "__MACOSX" / folder.name / "x.png", 1)
        (folder / ".DS_Store").write_bytes(b"")
    after = open_dataset(name, tmp_path)
    assert (after.keys, after.labels) == (before.keys, before.labels)


def test_links_are_followed_and_end(tmp_path):
    outside = tmp_path / "outside"
    save(outside / "deep" / "1.png", 1)
    root = tmp_path / "root"
    save(root / "cat" / "2.png", 2)
    (root / "dog").symlink_to(outside, target_is_directory=True)
    (root / "cat" / "3.png").symlink_to(outside / "deep" / "1.png")
    (root / "cat" / "again").symlink_to(root, target_is_directory=True)
    (root / "cat" / "self").symlink_to("self")
    (root / "cat" / "lost.png").symlink_to("nowhere.png")
    os.mkfifo(root / "cat" / "pipe.png")
    (root / "cat" / "folder.png").mkdir()
    found = [path.relative_to(root).as_posix() for path in pictures_below(root)]
    assert found == ["cat/2.png", "cat/3.png", "cat/lost.png", "dog/deep/1.png"]
    assert [path.name for path in folders_in(root)] == ["cat", "dog"]
    assert own(root).classnames == ("cat", "dog")


def test_every_walk_is_the_same(tmp_path):
    """Whatever order the disk gives: that of Python's own sort of the parts."""
    names = [f"{a}/{b}.png" for a in ("b", "a b", "a", "B", "10", "9", "a-") for b in ("2", "10", "x")]
    for name in random.Random(0).sample(names, len(names)):
        save(tmp_path / name, 1)
    expected = sorted(names, key=lambda name: name.split("/"))
    assert [path.relative_to(tmp_path).as_posix() for path in pictures_below(tmp_path)] == expected
    assert files_below(tmp_path, ("csv",)) == []


def test_trials_are_read_without_them(tmp_path):
    table = "subj,session,trial,rt,object_response,category,condition,imagename\n"
    row = "subject-01,1,1,0.5,dog,dog,0,0001_edg_dnn_0_dog_00_n02085620_1.png\n"
    text(tmp_path / "edge" / "edge_subject-01_session_1.csv", table + row)
    before = read_trials(tmp_path)
    text(tmp_path / "edge" / "._edge_subject-01_session_1.csv", "\0\5")
    text(tmp_path / "edge" / ".ipynb_checkpoints" / "edge_subject-01_session_1.csv", table + row)
    after = read_trials(tmp_path)
    assert len(after.subject) == len(before.subject) == 1


# ---- pictures by name ------------------------------------------------------------------------------------------------


def write_described(root: Path, names: list[str], kind: str) -> str:
    """The names with captions "of NAME", in a set of that kind; returns its card."""
    said = {name: f"of {name}" for name in names}
    if kind == "coco":
        content = coco(names)
        content["annotations"] = [a | {"caption": said[names[a["image_id"] // 10]]} for a in content["annotations"][: len(names)]]  # fmt: skip  # noqa: E501
        text(root / "coco/annotations/captions_val2017.json", json.dumps(content))
        return "coco_val2017"
    if kind == "karpathy":
        images = [
            {
                "filepath": str(Path(n).parent),
                "filename": Path(n).name,
                "split": "test",
                "sentences": [{"raw": said[n]}],
            }
            for n in names
        ]
        text(root / "flickr8k/dataset_flickr8k.json", json.dumps({"images": images}))
        return "flickr8k"
    if kind == "jsonl":
        rows = [{"split": "test", "image_file": name, "description": said[name]} for name in names]
        text(root / "docci/docci_descriptions.jsonlines", "".join(json.dumps(row) + "\n" for row in rows))
        return "docci"
    if kind == "csv":
        text(root / "flickr8k/captions.txt", "image,caption\n" + "".join(f"{n},{said[n]}\n" for n in names))
        return "flickr8k"
    for i, name in enumerate(names):
        content = {"image": name, "short_caption": "", "extra_caption": said[name]}
        text(root / f"dci/annotations/{i:05d}_1.json", json.dumps(content))
    return "dci"


FOLDERS = {"coco_val2017": "coco", "flickr8k": "flickr8k", "docci": "docci", "dci": "dci"}
DESCRIBED = ["coco", "karpathy", "jsonl", "csv", "dci"]


@pytest.mark.parametrize("kind", DESCRIBED)
@pytest.mark.parametrize("below", ["", "images", "photos/full"])
def test_equal_names_in_different_folders_are_different_pictures(tmp_path, kind, below):
    names = ["a/1.png", "b/1.png", "c/d/1.png", "d/1.png"]
    card = write_described(tmp_path, names, kind)
    for number, name in enumerate(names):
        save(tmp_path / FOLDERS[card] / below / name, number)
    dataset = open_dataset(card, tmp_path)
    assert [captions for (captions,) in dataset.captions] == [f"of {name}" for name in names]
    assert [shade(dataset[i]) for i in range(4)] == [0, 1, 2, 3]


@pytest.mark.parametrize("kind", DESCRIBED)
def test_a_picture_that_is_missing_is_not_replaced_by_its_namesake(tmp_path, kind):
    card = write_described(tmp_path, ["a/1.png", "b/1.png"], kind)
    save(tmp_path / FOLDERS[card] / "images/b/1.png", 7)
    dataset = open_dataset(card, tmp_path)
    assert dataset.captions == [["of b/1.png"]]
    assert dataset.said == "1 of 2 described pictures are not there"


@pytest.mark.parametrize("kind", DESCRIBED)
def test_one_picture_is_not_taken_for_two_of_its_name(tmp_path, kind):
    card = write_described(tmp_path, ["a/1.png", "b/1.png", "a/2.png"], kind)
    save(tmp_path / FOLDERS[card] / "1.png", 7)  # whose?
    save(tmp_path / FOLDERS[card] / "2.png", 8)
    dataset = open_dataset(card, tmp_path)
    assert (dataset.captions, dataset.keys) == ([["of a/2.png"]], ["2.png"])


@pytest.mark.parametrize("kind", DESCRIBED)
def test_a_name_that_several_pictures_have_is_refused(tmp_path, kind):
    card = write_described(tmp_path, ["0.jpg"], kind)
    root = tmp_path / FOLDERS[card]
    save(root / "Images/0.jpg", 1)
    save(root / "thumbs/0.jpg", 2)
    with pytest.raises(ValueError, match=r"0\.jpg may be .*Images/0\.jpg and .*thumbs/0\.jpg"):
        open_dataset(card, tmp_path)
    save(root / "thumbs/0.jpg", 1)  # a copy of the same
    assert open_dataset(card, tmp_path).keys == ["Images/0.jpg"]


def test_the_records_of_one_picture_are_its_captions(tmp_path):
    rows = [{"file_name": name, "text": said} for name, said in (("1.png", "a"), ("2.png", "b"), ("1.png", "c"))]
    text(tmp_path / "docci/metadata.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    for name in ("1.png", "2.png"):
        save(tmp_path / "docci" / name, 1)
    dataset = open_dataset("docci", tmp_path)
    assert (dataset.keys, dataset.captions) == (["1.png", "2.png"], [["a", "c"], ["b"]])


def test_two_pictures_of_one_caption_are_refused(tmp_path):
    text(tmp_path / "urban1k/caption/1.txt", "one")
    for suffix in ("jpg", "png"):
        save(tmp_path / f"urban1k/image/1.{suffix}", 1)
    with pytest.raises(ValueError, match=r"1\.jpg and .*1\.png share the caption .*caption/1"):
        open_dataset("urban1k", tmp_path)


# ---- splits and labels -----------------------------------------------------------------------------------------------


def write_parquet(path: Path, columns: dict, features: dict | None = None) -> None:
    table = pa.table(columns)
    if features:
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, row_group_size=2)


def images(*shades: int) -> list[dict]:
    return [{"bytes": encoded(number), "path": None} for number in shades]


NAMES = {  # how people name the files of a split
    "hugging face": "data/{}-00000-of-00001.parquet",
    "bare": "{}.parquet",
    "converted": "default/{}/0000.parquet",
    "folder": "{}/part-0.parquet",
    "before": "imagenet-{}-00000.parquet",
    "capitals": "{}_0000.parquet",
}


@pytest.mark.parametrize("name", NAMES.values(), ids=NAMES)
@pytest.mark.parametrize("split", ["validation", "val"])
def test_of_several_splits_the_cards_is_read(tmp_path, name, split):
    for number, part in enumerate(("train", "test", split)):
        part = part.upper() if "_0000" in name else part
        label = -1 if number == 1 else 7
        write_parquet(tmp_path / "imagenet" / name.format(part), {"image": images(number), "label": [label]})
        columns = {"image": images(number), "caption": [f"of {number}"]}
        write_parquet(tmp_path / "coco_val2017" / name.format(part), columns)
    dataset = open_dataset("imagenet", tmp_path)
    assert (dataset.labels, shade(dataset[0][0]), dataset.said) == ([7], 2, "")
    assert open_dataset("coco_val2017", tmp_path).captions == [["of 2"]]


def test_a_test_split_alone_is_no_validation_set(tmp_path):
    write_parquet(tmp_path / "imagenet/data/test-00000-of-00001.parquet", {"image": images(1), "label": [3]})
    with pytest.raises(FileNotFoundError, match=r"val-\*\.parquet"):
        open_dataset("imagenet", tmp_path)
    write_parquet(tmp_path / "sst2/data/validation-0.parquet", {"image": images(1), "label": [1]})
    dataset = open_dataset("sst2", tmp_path)
    assert (dataset.labels, dataset.said) == ([1], "the split validation, there is no test")


def test_a_column_of_splits_is_heeded(tmp_path):
    """As Flickr30k's one file has it, which is called TEST and holds all three."""
    columns = {"image": images(0, 1, 2, 3), "caption": [["a"], ["b"], ["c"], ["d"]], "split": ["train", "test", "val", "test"]}  # fmt: skip  # noqa: E501
    write_parquet(tmp_path / "flickr30k/data/TEST-00000-of-00001.parquet", columns)
    dataset = open_dataset("flickr30k", tmp_path)
    assert dataset.captions == [["b"], ["d"]]
    assert [shade(dataset[i]) for i in (0, 1)] == [1, 3]


@pytest.mark.parametrize("place", ["test", "val", "validation"])
def test_class_folders_of_another_split_are_not_taken(tmp_path, place):
    synset = load_card("imagenet")
    save(tmp_path / "imagenet" / place / "n01440764" / "1.png", 1)
    if place == "test":
        with pytest.raises(FileNotFoundError):
            open_dataset(synset, tmp_path)
    else:
        assert open_dataset(synset, tmp_path).labels == [0]


def test_a_folder_of_training_data_alone_is_no_test_set(tmp_path):
    save(tmp_path / "train/cat/1.png", 1)
    save(tmp_path / "train/dog/1.png", 1)
    with pytest.raises(FileNotFoundError):
        own(tmp_path)
    save(tmp_path / "car/1.png", 1)
    assert own(tmp_path).classnames == ("car", "train")  # it has wheels, too


BAD = {"minus one": -1, "beyond": 10, "null": None, "nan": float("nan"), "minus a hundred": -100, "half": 1.5}


@pytest.mark.parametrize("label", BAD.values(), ids=BAD)
@pytest.mark.parametrize("named", [False, True])
def test_labels_without_a_class_are_refused_in_parquet(tmp_path, label, named):
    kind = pa.float64() if isinstance(label, float) else pa.int64()
    features = {"label": {"names": list(names_on(load_card("stl10")))[::-1], "_type": "ClassLabel"}} if named else None
    columns = {"image": images(1, 2, 3), "label": pa.array([3, label, 4], kind)}
    write_parquet(tmp_path / "stl10/test.parquet", columns, features)
    with pytest.raises(ValueError, match="row 1"):
        open_dataset("stl10", tmp_path)


def test_whole_labels_that_were_stored_as_fractions_are_read(tmp_path):
    write_parquet(tmp_path / "stl10/test.parquet", {"image": images(1, 2), "label": [3.0, 9.0]})
    assert open_dataset("stl10", tmp_path).labels == [3, 9]


@pytest.mark.parametrize("label", [-1, 7])
def test_labels_without_a_class_are_refused_in_tables(tmp_path, label):
    WRITERS["fer2013"](tmp_path)
    file = tmp_path / "fer2013/fer2013.csv"
    rows = list(csv.reader(file.read_text().splitlines()))
    rows[2][0] = str(label)
    with file.open("w", newline="") as out:
        csv.writer(out).writerows(rows)
    with pytest.raises(ValueError, match=f"1 labels are none of the 7 classes; the first: '{label}'"):
        open_dataset("fer2013", tmp_path)
    WRITERS["gtsrb"](tmp_path)
    table = tmp_path / "gtsrb/GT-final_test.csv"
    table.write_text(table.read_text().replace(";42\n", f";{label if label < 0 else 43}\n"))
    with pytest.raises(ValueError, match="1 labels are outside the 43 classes"):
        open_dataset("gtsrb", tmp_path)
    WRITERS["hateful_memes"](tmp_path)
    rows = tmp_path / "hateful_memes/dev.jsonl"
    rows.write_text(rows.read_text().replace('"label": 1', '"label": null' if label < 0 else '"label": 2'))
    with pytest.raises(ValueError, match=r"1 of 3 pictures have no label|1 labels are outside the 2 classes"):
        open_dataset("hateful_memes", tmp_path)


@pytest.mark.parametrize("value", ["-1", "", "nan", "2"])
def test_labels_without_a_class_are_refused_in_metadata(tmp_path, value):
    write_waterbirds(tmp_path / "waterbirds")
    file = tmp_path / "waterbirds/metadata.csv"
    file.write_text(file.read_text().replace("3,003.Bird/3.jpg,1,", f"3,003.Bird/3.jpg,{value},"))
    with pytest.raises(ValueError, match=r"003\.Bird/3\.jpg"):
        open_dataset("waterbirds", tmp_path)


@pytest.mark.parametrize("labels", [[0, None], [0, -1], [0, 2], [0, 1.5], [0]])
def test_no_layout_hands_on_labels_without_a_class(labels):
    found = Found("here", Pictures(2, picture), ["a", "b"], labels=[], classnames=("landbird", "waterbird"))
    object.__setattr__(found, "labels", labels)  # of a layout that nobody checked
    with pytest.raises(ValueError, match=r"here: (1 labels are outside|2 pictures with 1 labels)"):
        Classification(load_card("waterbirds"), found)


# ---- one row a caption -----------------------------------------------------------------------------------------------


def perfect_recalls(dataset) -> dict[str, float]:
    """Of a model that knows every picture by its shade, and every caption by the number it ends with."""
    seen = torch.eye(300)[[shade(dataset[i]) for i in range(len(dataset))]]
    said = [(n, int(caption.rsplit(" ", 1)[1])) for n, captions in enumerate(dataset.captions) for caption in captions]
    texts = torch.eye(300)[[number for _, number in said]]
    rows = recall_rows(seen, texts, torch.tensor([n for n, _ in said]), dataset.keys, 0)
    return {row.metric: row.value for row in rows}


ROWS = [(i, k) for k in range(5) for i in (3, 1, 2)]  # pictures in turn, not one after another


@pytest.mark.parametrize(
    "more",
    [
        {"cocoid": [i for i, _ in ROWS]},
        {"image_id": [str(i) for i, _ in ROWS]},
        {"filename": [f"{i}.png" for i, _ in ROWS]},
        {"filename": ["image.png" for _ in ROWS]},  # says nothing
        {},
        {"image_id": [None for _ in ROWS]},
    ],
)
@pytest.mark.parametrize("form", ["dict", "text", "list"])
def test_rows_of_one_picture_are_one_picture(tmp_path, more, form):
    wrap = {"dict": lambda c, i: {"raw": c, "imgid": i}, "text": lambda c, i: c, "list": lambda c, i: [c]}[form]
    captions = [wrap(f"caption {k} of {i}", i) for i, k in ROWS]
    columns = {"image": images(*(i for i, _ in ROWS)), "sentences": captions, **more}
    write_parquet(tmp_path / "coco_karpathy/data/test-00000-of-00001.parquet", columns)
    dataset = open_dataset("coco_karpathy", tmp_path)
    assert [shade(dataset[i]) for i in range(len(dataset))] == [3, 1, 2]
    assert dataset.captions == [[f"caption {k} of {i}" for k in range(5)] for i in (3, 1, 2)]
    assert perfect_recalls(dataset)["text_to_image_recall@1"] == perfect_recalls(dataset)["image_to_text_recall@1"] == 1


def test_pictures_that_share_a_name_or_their_pixels_stay_apart(tmp_path):
    names = ["a.png", "a.png", "b.png"]
    columns = {"image": images(1, 2, 3), "caption": ["x 1", "x 2", "x 3"], "filename": names}
    write_parquet(tmp_path / "one/coco_karpathy/test.parquet", columns)
    assert len(open_dataset("coco_karpathy", tmp_path / "one")) == 3
    columns = {"image": images(1, 1), "caption": ["x 1", "x 1"], "image_id": [1, 2]}  # as published, twice
    write_parquet(tmp_path / "two/coco_karpathy/test.parquet", columns)
    assert len(open_dataset("coco_karpathy", tmp_path / "two")) == 2


def test_rows_that_each_have_all_captions_give_them_once(tmp_path):
    columns = {"image": images(1, 1), "captions": [["x 1", "y 1"], ["x 1", "y 1"]], "cocoid": [1, 1]}
    write_parquet(tmp_path / "coco_karpathy/test.parquet", columns)
    assert open_dataset("coco_karpathy", tmp_path).captions == [["x 1", "y 1"]]


# ---- metadata.csv ----------------------------------------------------------------------------------------------------


def imagefolder(root: Path, table: str, name: str = "metadata.csv") -> None:
    for number, file in enumerate(("cat/a.png", "dog/a.png")):
        save(root / file, number)
    text(root / name, table)


TABLES = {
    "names": ("file_name,label\ncat/a.png,cat\ndog/a.png,dog\n", ("cat", "dog"), {0: "cat", 1: "dog"}),
    "other names": ("file_name,label\ncat/a.png,zebra\ndog/a.png,ape\n", ("ape", "zebra"), {0: "zebra", 1: "ape"}),
    "numbers": ("file_name,label\ncat/a.png,0\ndog/a.png,1\n", ("cat", "dog"), {0: "cat", 1: "dog"}),
    "other numbers": ("file_name,label\ncat/a.png,1\ndog/a.png,0\n", ("dog", "cat"), {0: "cat", 1: "dog"}),
    "something else": ("id,photographer\n1,me\n", ("cat", "dog"), {0: "cat", 1: "dog"}),
    "captions": ("file_name,text\ncat/a.png,a cat\n", ("cat", "dog"), {0: "cat", 1: "dog"}),
    "no rows": ("file_name,label\n", ("cat", "dog"), {0: "cat", 1: "dog"}),
    "nothing": ("", ("cat", "dog"), {0: "cat", 1: "dog"}),
}


@pytest.mark.parametrize("below", ["", "test"])
@pytest.mark.parametrize("case", TABLES)
def test_a_table_beside_class_folders(tmp_path, case, below):
    table, names, said = TABLES[case]
    imagefolder(tmp_path / below, table)
    dataset = own(tmp_path)
    assert dataset.classnames == names
    assert {shade(dataset[i][0]): dataset.classnames[dataset[i][1]] for i in range(2)} == said


def test_a_table_in_another_encoding_about_something_else_is_passed_over(tmp_path):
    imagefolder(tmp_path, "")
    (tmp_path / "metadata.csv").write_bytes("id,Fotograf\n1,Jürgen\n".encode("latin-1"))
    assert own(tmp_path).classnames == ("cat", "dog")


def test_metadata_as_json_lines(tmp_path):
    rows = [{"file_name": "cat/a.png", "label": "tabby"}, {"file_name": "dog/a.png", "label": "pug"}]
    imagefolder(tmp_path, "".join(json.dumps(row) + "\n" for row in rows), "metadata.jsonl")
    assert own(tmp_path).classnames == ("pug", "tabby")


def test_numbers_in_one_folder_keep_their_numbers(tmp_path):
    for number in (0, 1, 2):
        save(tmp_path / f"pictures/{number}.png", number)
    text(tmp_path / "metadata.csv", "file_name,label\npictures/0.png,10\npictures/1.png,9\npictures/2.png,10\n")
    dataset = own(tmp_path)
    assert (dataset.classnames, dataset.labels) == (("9", "10"), [1, 0, 1])


# ---- spawned workers -------------------------------------------------------------------------------------------------


def first_pixels(datasets: list) -> list[str]:
    """What a process that was spawned makes of them."""
    return [hashlib.sha256(_first(dataset).tobytes()).hexdigest() for dataset in datasets]


def _first(dataset) -> Image.Image:
    return dataset.picture(0)


def write_every_layout(root: Path) -> list:
    """A data set of every layout there is."""
    made = []
    for name, write in WRITERS.items():
        write(root / name)
        made.append(open_dataset(name, root / name))
    captioned = write_captioned(root / "captioned")
    made += [open_dataset(name, root / "captioned") for name in captioned]
    imagefolder(root / "own", "")
    imagefolder(root / "table", TABLES["names"][0])
    made += [own(root / "own"), own(root / "table"), open_dataset("digits", "x"), open_dataset("scenes", "x")]
    write_parquet(root / "parquet/sst2/test.parquet", {"image": images(1, 2), "label": [0, 1]})
    made.append(open_dataset("sst2", root / "parquet"))
    _ = made[-1].picture(1)  # a row group is held
    (root / "tars/wds_sst2/test").mkdir(parents=True)
    with tarfile.open(root / "tars/wds_sst2/test/0.tar", "w") as tar:
        for name, data in (("a.png", encoded(1)), ("a.cls", b"1")):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    made.append(open_dataset("sst2", root / "tars"))
    return made


@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_every_layout_can_be_handed_to_a_spawned_process(tmp_path):
    pytest.importorskip("h5py", reason="PatchCamelyon's own files need h5py")
    datasets = write_every_layout(tmp_path)
    functions = {dataset._pictures.get.func for dataset in datasets}
    assert len(functions) >= 7  # readers of arrays, files, tars, parquet, h5, drawings, files without a border
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(first_pixels, (datasets,)) == first_pixels(datasets)


# ---- a data set's type, and layouts from outside ---------------------------------------------------------------------


@pytest.mark.parametrize("name", list(LAYOUTS))
def test_every_layout_says_what_is_not_there(tmp_path, name):
    """A layout answers of any card and of an empty folder, or of none, without failing."""
    if name.startswith("embedded_"):
        return
    for card in map(load_card, list_cards()):
        if name in card.layouts:
            assert isinstance(LAYOUTS[name](tmp_path, card), str)
            assert isinstance(LAYOUTS[name](tmp_path / "nowhere", card), str)


def test_every_test_set_has_every_attribute(tmp_path):
    for kind, dataset in (("classification", own_pair(tmp_path / "a")), ("retrieval", captioned_pair(tmp_path / "b"))):
        assert isinstance(dataset, PictureSet)
        assert dataset.kind == kind == dataset.card.kind
        assert (len(dataset.keys), len(dataset.files), dataset.groups, dataset.said) == (2, 2, None, "")
        assert (dataset.captions is None) == (kind == "classification") == (dataset.labels is not None)
        assert dataset.picture(1).size == (24, 20)


def own_pair(root: Path) -> Classification:
    imagefolder(root, "")
    return own(root)


def captioned_pair(root: Path) -> Retrieval:
    card = write_described(root, ["1.png", "2.png"], "csv")
    for number in (1, 2):
        save(root / f"flickr8k/{number}.png", number)
    return open_dataset(card, root)


def test_a_test_set_of_ones_own(vit):
    """In a few lines, with the defaults of PictureSet for all that it does not have."""

    class Greys(PictureSet):
        def __init__(self):
            self.card, self.keys = load_card("sst2"), [str(i) for i in range(6)]
            self.labels, self.classnames, self.templates = [0, 1] * 3, ("dark", "light"), ("{}",)

        def picture(self, index: int) -> Image.Image:
            return picture(40 * index)

    rows = Task(Greys()).rows(vit, Settings(examples=0))
    assert (rows[0].metric, rows[0].n, rows[0].extra["partial"]) == ("top1", 6, {"used": 6, "of": 1821})
    assert (Greys().name, Greys().kind, Greys().expected, Greys().partial) == ("sst2", "classification", 1821, True)


def test_a_card_of_ones_own(tmp_path, vit):
    """A card anywhere, with a layout that another package brings, is opened and evaluated like any other."""

    @LAYOUTS.register("stripes")
    def stripes(folder: Path, card) -> Found | str:
        """NAME.stripes: a label and a shade a line."""
        file = folder / "set.stripes"
        if not file.is_file():
            return "set.stripes"
        rows = [list(map(int, line.split())) for line in file.read_text().splitlines()]
        pictures = Pictures(len(rows), lambda i: picture(rows[i][1]))
        return Found(str(file), pictures, [str(i) for i in range(len(rows))], labels=[label for label, _ in rows])

    try:
        text(tmp_path / "data/set.stripes", "1 200\n0 20\n")
        card = tmp_path / "cards/my, own=set.toml"
        text(card, 'kind = "classification"\nlayouts = ["stripes"]\nsource = "../data"\nclassnames = ["eBay", "C++"]\n')
        dataset = open_dataset(f"card:{card}", "unused")
        assert (dataset.labels, dataset.classnames, dataset.name) == ([1, 0], ("eBay", "C++"), "my, own=set")
        assert dataset.templates == ("a photo of a {}.",)
        (task,) = open_tasks([f"card:{card}"], "unused")
        rows = task.rows(vit, Settings(examples=0))
        assert [row.metric for row in rows[:2]] == ["top1", "mean_per_class"]
        assert rows[0].n == 2
    finally:
        del LAYOUTS._items["stripes"]


def test_a_card_of_ones_own_says_what_is_wrong(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there is no card .*none\.toml"):
        load_card(f"card:{tmp_path / 'none.toml'}")
    card = tmp_path / "my.toml"
    text(card, 'kind = "retrieval"\nlayouts = ["records_jsonl"]\nsource = "nowhere"\n')
    with pytest.raises(FileNotFoundError, match="source 'nowhere': there is no folder"):
        load_card(f"card:{card}")
    text(card, 'kind = "retrieval"\nlayouts = "records_jsonl"\n')
    with pytest.raises(ValueError, match=r"card .*my\.toml, line 2: layouts must be a list"):
        load_card(f"card:{card}")
    wrong = {
        "kind = 'retrieval'\n": ".*my\\.toml: layouts must be given",
        "kind = 'pictures'\nlayouts = []\n": "line 1: kind 'pictures', there are classification",
        "kind = 'retrieval'\n\nmetrics = 'recall'\n": "line 3: unknown keys metrics; known: aliases",
        "kind = 'retrieval'\nlayouts = ['record_jsonl']\n": "line 2: .*did you mean 'records_jsonl'",
        "kind = 'retrieval'\nlayouts = []\ntest_size = '5'\n": "line 3: test_size must be a number of at least 0",
        "kind = 'classification'\nlayouts = []\ntemplates = ['a dog']\n": "line 3: templates without {}",
        "kind = 'classification'\nlayouts = []\ngrouped_by = 'region'\n": "line 3: grouped_by must be one of metadata",
    }
    for content, said in wrong.items():
        text(card, content)
        with pytest.raises((ValueError, UnknownName), match=rf"card .*{said}"):
            load_card(f"card:{card}")
    text(card, "kind = \n")
    with pytest.raises(ValueError, match=r"my\.toml is no TOML file: .*line 1"):
        load_card(f"card:{card}")
    text(card, 'kind = "retrieval"\nlayouts = ["records_jsonl"]\n')
    text(tmp_path / "root/my/metadata.jsonl", json.dumps({"file_name": "1.png", "text": "one"}) + "\n")
    save(tmp_path / "root/my/1.png", 1)
    dataset = open_dataset(f"card:{card}", tmp_path / "root")
    assert (dataset.captions, dataset.card.metric) == ([["one"]], "recall")


def test_lists_with_commas_in_their_items():
    assert split_list("a,b,,c") == ["a", "b", "c"]
    assert split_list(r"a\,b,c") == ["a,b", "c"]
    assert split_list("x,a,b,c", {"a,b", "a,b,c"}.__contains__) == ["x", "a,b,c"]


def test_own_pictures_in_half_are_embedded_as_ever(tmp_path, vit):
    """Unreadable ones are counted; the rest is in the order of the keys."""
    dataset = own_pair(tmp_path)
    (tmp_path / "cat/a.png").write_bytes(b"")
    seen = embed_images(vit, dataset, Settings())
    assert (seen.index.tolist(), list(seen.unreadable)) == ([1], [0])
