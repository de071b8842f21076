"""Every data set in the files it is published as, a handful of pictures each, read through the whole loader.

torchvision's own classes read the same files, and what they find is the truth.
"""

import csv
import io
import json
import tarfile
from pathlib import Path

import huggingface_hub
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from scipy.io import savemat
from torchvision import datasets

from ssmclip.__main__ import main
from ssmclip.data.testsets.card import SORTED
from ssmclip.data.testsets.layouts import originals
from ssmclip.data.testsets.open import list_cards, load_card, open_dataset
from ssmclip.data.testsets.prompts import (
    chosen,
    clip_benchmark_prompts,
    folders_on,
    names_on,
    read_prompts,
    templates_on,
)
from ssmclip.evaluate.tasks import task_names


def picture(shade: int, size=(24, 20)) -> Image.Image:
    return Image.new("RGB", size, (shade % 256, 90, 30))


def save(path: Path, shade: int, **kwargs) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    picture(shade, **kwargs).save(path)
    return path


def text(path: Path, content: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content, encoding="utf-8")
    return path


def encoded(shade: int) -> bytes:
    out = io.BytesIO()
    picture(shade).save(out, "PNG")
    return out.getvalue()


def unchecked(name: str):
    """torchvision's class without its checksums, which are those of whole copies."""
    return type(name, (getattr(datasets, name),), {"_check_integrity": lambda self: True})


# ---- what each data set's authors published: (write a tiny copy, what torchvision finds in it) -----------------------

WRITERS = {}


def published(name: str):
    def add(function):
        WRITERS[name] = function
        return function

    return add


@published("food101")
def food101(root: Path):
    names = [f"dish_{i:03d}" for i in range(101)]
    images = {name: [f"{name}/{10 * i + j}" for j in range(2)] for i, name in enumerate(names)}
    text(root / "food-101/meta/test.json", json.dumps(images))
    for number, name in enumerate(names):
        for image in images[name]:
            save(root / f"food-101/images/{image}.jpg", number)
    return unchecked("Food101")(root, split="test"), [name.replace("_", " ") for name in names]


@published("sun397")
def sun397(root: Path):
    names = [f"place_{i:03d}/inside" if i % 2 else f"place_{i:03d}" for i in range(397)]
    text(root / "SUN397/ClassName.txt", "".join(f"/p/{name}\n" for name in names))
    for number in (0, 5, 396):
        save(root / f"SUN397/p/{names[number]}/sun_{number}.jpg", number)
    return unchecked("SUN397")(root), [name.replace("/", " ").replace("_", " ") for name in names]


@published("cars")
def cars(root: Path):
    names = [f"Make Model {i} 2012" for i in range(196)]
    base = root / "stanford_cars"
    (base / "devkit").mkdir(parents=True)
    savemat(base / "devkit/cars_meta.mat", {"class_names": np.array(names, dtype=object)})
    dtype = [("fname", object), ("class", object)]
    rows = np.array([("00001.jpg", 196), ("00002.jpg", 3)], dtype=dtype)
    savemat(base / "cars_test_annos_withlabels.mat", {"annotations": rows})
    for number in (1, 2):
        save(base / f"cars_test/{number:05d}.jpg", number)
    return unchecked("StanfordCars")(root, split="test"), names


@published("aircraft")
def aircraft(root: Path):
    names = [f"A{300 + i}" for i in range(100)]
    data = root / "fgvc-aircraft-2013b/data"
    text(data / "variants.txt", "\n".join(names) + "\n")
    text(data / "images_variant_test.txt", "0000001 A399\n0000002 A300\n0000003 A301\n")
    for number in (1, 2, 3):
        save(data / f"images/{number:07d}.jpg", number)
    return unchecked("FGVCAircraft")(root, split="test"), names


@published("dtd")
def dtd(root: Path):
    names = [f"texture{i:02d}" for i in range(47)]
    files = [f"{name}/{name}_0001.jpg" for name in names]
    text(root / "dtd/dtd/labels/test1.txt", "\n".join(files) + "\n")
    for number, file in enumerate(files):
        save(root / f"dtd/dtd/images/{file}", number)
    return unchecked("DTD")(root, split="test"), names


@published("pets")
def pets(root: Path):
    names = ["Abyssinian", "american_bulldog"] + [f"pet_{i:02d}" for i in range(35)]
    lines = [f"{name}_1 {i + 1} 1 1" for i, name in enumerate(names)]
    text(root / "oxford-iiit-pet/annotations/test.txt", "\n".join(lines) + "\n")
    for number, name in enumerate(names):
        save(root / f"oxford-iiit-pet/images/{name}_1.jpg", number)
    (root / "oxford-iiit-pet/annotations/trimaps").mkdir()
    dataset = unchecked("OxfordIIITPet")(root, split="test")
    return dataset, [" ".join(part.title() for part in name.split("_")) for name in names]


@published("caltech101")
def caltech101(root: Path):
    for number, name in enumerate(load_card("caltech101").folders):
        save(root / f"caltech101/101_ObjectCategories/{name}/image_0001.jpg", number)
    dataset = unchecked("Caltech101")(root)
    background = Image.open(root / "caltech101/101_ObjectCategories/BACKGROUND_Google/image_0001.jpg").convert("RGB")
    # torchvision leaves the background out; CLIP counts it, as the first class.
    return [(background, 0), *((image, label + 1) for image, label in dataset)], names_on(load_card("caltech101"))


@published("flowers")
def flowers(root: Path):
    base = root / "flowers-102"
    base.mkdir(parents=True)
    savemat(base / "imagelabels.mat", {"labels": np.array([[7, 102, 1, 50]])})
    savemat(base / "setid.mat", {"trnid": [[1]], "valid": [[2]], "tstid": [[2, 3, 4]]})
    for number in (1, 2, 3, 4):
        save(base / f"jpg/image_{number:05d}.jpg", number)
    return unchecked("Flowers102")(root, split="test"), names_on(load_card("flowers"))


@published("stl10")
def stl10(root: Path):
    base = root / "stl10_binary"
    base.mkdir(parents=True)
    draws = np.random.default_rng(0)
    draws.integers(0, 256, (5, 3, 96, 96), dtype=np.uint8).tofile(base / "test_X.bin")
    np.array([1, 10, 4, 4, 2], np.uint8).tofile(base / "test_y.bin")
    text(base / "class_names.txt", "\n".join(names_on(load_card("stl10"))))
    return unchecked("STL10")(root, split="test"), names_on(load_card("stl10"))


@published("eurosat")
def eurosat(root: Path):
    for number, name in enumerate(load_card("eurosat").folders):
        save(root / f"eurosat/2750/{name}/{name}_1.jpg", number)
    return unchecked("EuroSAT")(root), names_on(load_card("eurosat"))


@published("gtsrb")
def gtsrb(root: Path):
    base = root / "gtsrb"
    rows = [("00000.ppm", 16), ("00001.ppm", 1), ("00002.ppm", 42)]
    header = "Filename;Width;Height;Roi.X1;Roi.Y1;Roi.X2;Roi.Y2;ClassId"
    lines = [header, *(f"{name};24;20;1;1;20;19;{label}" for name, label in rows)]
    text(base / "GT-final_test.csv", "\n".join(lines) + "\n")
    for number, (name, _) in enumerate(rows):
        save(base / "GTSRB/Final_Test/Images" / name, number)
    return unchecked("GTSRB")(root, split="test"), names_on(load_card("gtsrb"))


@published("country211")
def country211(root: Path):
    for number in range(211):
        save(root / f"country211/test/{chr(65 + number // 26)}{chr(65 + number % 26)}/1.jpg", number)
    return unchecked("Country211")(root, split="test"), names_on(load_card("country211"))


@published("clevr")
def clevr(root: Path):
    base = root / "clevr/CLEVR_v1.0"
    counts = {"CLEVR_val_000000.png": 10, "CLEVR_val_000001.png": 3, "CLEVR_val_000002.png": 7}
    scenes = [{"image_filename": name, "objects": [{}] * count} for name, count in counts.items()]
    text(base / "scenes/CLEVR_val_scenes.json", json.dumps({"scenes": scenes}))
    for number, name in enumerate(counts):
        save(base / "images/val" / name, number)
    dataset = unchecked("CLEVRClassification")(root, split="val")
    names = names_on(load_card("clevr"))
    return [(image, names.index(str(count))) for image, count in dataset], names


@published("clevr_distance")
def clevr_distance(root: Path):
    """VTAB's labels are worked out by its own formula."""
    base = root / "clevr/CLEVR_v1.0"
    distances = [[7.0, 12.0], [9.2, 8.6], [8.01, 9.0], [11.0, 10.0], [99.0, 10.1], [9.6, 9.7], [9.3]]
    scenes, expected = [], []
    for number, of_objects in enumerate(distances):
        name = f"CLEVR_val_{number:06d}.png"
        scenes.append({"image_filename": name, "objects": [{"pixel_coords": [3, 4, far]} for far in of_objects]})
        save(base / "images/val" / name, number)
        thresholds = np.array([0.0, 8.0, 8.5, 9.0, 9.5, 10.0, 100.0])
        expected.append((picture(number), np.where(thresholds - min(of_objects) < 0)[0].max()))
    text(base / "scenes/CLEVR_val_scenes.json", json.dumps({"scenes": scenes}))
    assert {label for _, label in expected} == set(range(6))
    return expected, ("very nearby", "nearby", "near", "", "distant", "very distant")


@published("svhn")
def svhn(root: Path):
    pixels = np.stack([np.asarray(picture(shade, (32, 32))) for shade in (1, 2, 3)], axis=3)
    root.mkdir(parents=True, exist_ok=True)
    savemat(root / "test_32x32.mat", {"X": pixels, "y": np.array([[10], [1], [9]])})
    return unchecked("SVHN")(root, split="test"), names_on(load_card("svhn"))


def voc(root: Path) -> None:
    base = root / "VOCdevkit/VOC2007"
    objects = {
        "000001": [("dog", (2, 3, 20, 15)), ("person", (1, 1, 10, 18)), ("dog", (0, 0, 5, 5))],
        "000002": [("tvmonitor", (4, 4, 8, 9))],
    }
    text(base / "ImageSets/Main/aeroplane_test.txt", "".join(f"{name} -1\n" for name in objects))
    for shade, (name, things) in enumerate(objects.items()):
        Image.effect_noise((24, 20), 60 + shade).convert("RGB").save(save(base / f"JPEGImages/{name}.jpg", shade))
        listed = "".join(
            f"<object><name>{thing}</name><pose>Left</pose><truncated>1</truncated><difficult>1</difficult><bndbox>"
            f"<xmin>{left}</xmin><ymin>{upper}</ymin><xmax>{right}</xmax><ymax>{lower}</ymax></bndbox></object>"
            for thing, (left, upper, right, lower) in things
        )
        text(base / f"Annotations/{name}.xml", f"<annotation><folder>VOC2007</folder>{listed}</annotation>")


@published("voc2007")
def voc2007(root: Path):
    """CLIP_benchmark's own class reads the same files."""
    theirs = pytest.importorskip("clip_benchmark.datasets.voc2007")
    voc(root)
    dataset = theirs.PASCALVoc2007Cropped(str(root), "test")
    return [dataset[i] for i in range(len(dataset))], dataset.classes


def test_pictures_of_voc_have_all_their_classes_as_in_clip_benchmark(tmp_path):
    theirs = pytest.importorskip("clip_benchmark.datasets.voc2007")
    voc(tmp_path)
    (ours, dataset) = open_dataset("voc2007_multilabel", tmp_path), theirs.PASCALVoc2007(str(tmp_path), "test")
    expected = [
        (np.asarray(image).tobytes(), tuple(np.flatnonzero(on))) for image, on in map(dataset.__getitem__, (0, 1))
    ]
    assert [(np.asarray(ours[i]).tobytes(), ours.answers[i]) for i in range(len(ours))] == expected
    assert (ours.labels, ours.classnames, ours.partial) == (None, tuple(dataset.classes), True)
    text(tmp_path / "VOCdevkit/VOC2007/Annotations/000002.xml", "<annotation><object><name>unicorn")
    with pytest.raises(ValueError, match=r"000002\.xml is no list of objects of the 20 classes"):
        open_dataset("voc2007_multilabel", tmp_path)


def test_house_numbers_that_are_damaged(tmp_path):
    (tmp_path / "test_32x32.mat").write_bytes(b"<html>")
    with pytest.raises(ValueError, match=r"test_32x32\.mat is no file of SVHN's digits"):
        open_dataset("svhn", tmp_path)


@published("sst2")
def sst2(root: Path):
    for number, name in enumerate(("negative", "positive", "positive")):
        save(root / f"rendered-sst2/test/{name}/{number}.png", number)
    return unchecked("RenderedSST2")(root, split="test"), ["negative", "positive"]


@published("kitti")
def kitti(root: Path):
    """No vehicle; a car at 7.5 m behind a nearer tram; a van at 19 m; a truck at 50 m."""
    base = root / "Kitti/raw/training"
    scenes = [["Pedestrian 5"], ["Tram 2", "Car 7.5", "Car 30"], ["Van 19"], ["Truck 50", "DontCare -1000"]]
    for number, scene in enumerate(scenes):
        objects = [o.split() for o in scene]
        lines = [f"{kind} 0.0 0 0.0 1 2 3 4 1.5 1.6 3.9 1.0 1.7 {metres} 0.1" for kind, metres in objects]
        text(base / f"label_2/{number:06d}.txt", "\n".join(lines) + "\n")
        save(base / f"image_2/{number:06d}.png", number)
    return list(zip(map(picture, range(4)), (3, 0, 1, 2), strict=True)), names_on(load_card("kitti"))


@published("pcam")
def pcam(root: Path):
    h5py = pytest.importorskip("h5py", reason="PatchCamelyon's own files need h5py")
    base = root / "pcam"
    base.mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(0, 256, (3, 96, 96, 3), dtype=np.uint8)
    for name, values in (("x", pixels), ("y", np.array([1, 0, 1], np.uint8).reshape(3, 1, 1, 1))):
        with h5py.File(base / f"camelyonpatch_level_2_split_test_{name}.h5", "w") as file:
            file[name] = values
    return unchecked("PCAM")(root, split="test"), names_on(load_card("pcam"))


@published("fer2013")
def fer2013(root: Path):
    """The file counts angry, disgust, fear, happy, sad, surprise, neutral; folders come as angry ... neutral, sad."""
    rows = [(3, "Training"), (6, "PrivateTest"), (4, "PrivateTest"), (0, "PublicTest"), (1, "PrivateTest")]
    path = root / "fer2013/fer2013.csv"
    path.parent.mkdir(parents=True)
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["emotion", "pixels", "Usage"])
        writer.writerows([emotion, " ".join([str(20 * emotion)] * 48 * 48), usage] for emotion, usage in rows)
    greys = [(Image.new("L", (48, 48), 20 * emotion), label) for emotion, label in ((6, 4), (4, 5), (1, 1))]
    return greys, ["angry", "disgusted", "fearful", "happy", "neutral", "sad", "surprised"]


@published("cub")
def cub(root: Path):
    base = root / "CUB_200_2011"
    names = [f"{i + 1:03d}.Black_footed_Bird{i}" for i in range(200)]
    images = [(1, names[3], 0), (2, names[3], 1), (3, names[199], 0)]
    text(base / "classes.txt", "".join(f"{i + 1} {name}\n" for i, name in enumerate(names)))
    text(base / "images.txt", "".join(f"{i} {name}/{i}.jpg\n" for i, name, _ in images))
    text(base / "image_class_labels.txt", "".join(f"{i} {names.index(name) + 1}\n" for i, name, _ in images))
    text(base / "train_test_split.txt", "".join(f"{i} {train}\n" for i, _, train in images))
    shown = [
        (Image.open(save(base / f"images/{name}/{i}.jpg", i)).convert("RGB"), names.index(name))
        for i, name, _ in images
    ]
    return [shown[0], shown[2]], [name[4:].replace("_", " ") for name in names]


@published("hateful_memes")
def hateful_memes(root: Path):
    rows = [{"id": i, "img": f"img/{i}.png", "label": i % 2, "text": "so"} for i in range(3)]
    text(root / "hateful_memes/dev.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    return [
        (Image.open(save(root / f"hateful_memes/{row['img']}", row["id"])).convert("RGB"), row["label"]) for row in rows
    ], [
        "meme",
        "hatespeech meme",
    ]


@published("objectnet")
def objectnet(root: Path):
    base = root / "objectnet-1.0"
    labels = {f"folder_{i:03d}": f"Thing {i}" for i in range(120)}
    shared = {f"Thing {i}": "something" for i in range(7, 120)}
    text(base / "mappings/folder_to_objectnet_label.json", json.dumps(labels))
    text(base / "mappings/objectnet_to_imagenet_1k.json", json.dumps(shared))
    shown = []
    for i in (3, 7, 119):
        framed = Image.new("RGB", (24, 20), "red")
        inner = Image.effect_noise((20, 16), 60).convert("RGB")
        framed.paste(inner, (2, 2))
        path = base / f"images/folder_{i:03d}/1.png"
        path.parent.mkdir(parents=True)
        framed.save(path)
        shown.append((inner, i - 7))
    return shown[1:], [f"thing {i}" for i in range(7, 120)]


@pytest.mark.parametrize("name", WRITERS)
def test_the_published_files_are_read_as_torchvision_reads_them(tmp_path, name):
    expected, names = WRITERS[name](tmp_path)
    dataset = open_dataset(name, tmp_path)
    ours = sorted((label, np.asarray(image).tobytes()) for image, label in (dataset[i] for i in range(len(dataset))))
    theirs = sorted((int(label), np.asarray(image.convert("RGB")).tobytes()) for image, label in expected)
    assert ours == theirs
    assert list(dataset.classnames) == list(names)
    assert dataset.labels == [dataset[i][1] for i in range(len(dataset))]
    assert dataset.files
    assert dataset.partial
    assert dataset.templates == templates_on(load_card(name))


UNPACKED = {  # torchvision's place -> where the archive's contents are left by who unpacks it below the set's name
    "dtd": ("dtd/dtd", "dtd"),
    "food101": ("food-101", "food101"),
    "flowers": ("flowers-102", "flowers"),
    "kitti": ("Kitti/raw", "kitti"),
    "gtsrb": ("gtsrb", "."),
}


@pytest.mark.parametrize("name", UNPACKED)
def test_archives_are_found_where_they_were_unpacked(tmp_path, name):
    expected, names = WRITERS[name](tmp_path / "a")
    inner, place = UNPACKED[name]
    expected = [(np.asarray(image.convert("RGB")).tobytes(), int(label)) for image, label in expected]
    (tmp_path / "b").mkdir()
    (tmp_path / "a" / inner).rename(tmp_path / "b" / place if place != "." else tmp_path / "c")
    root = tmp_path / ("b" if place != "." else "c")
    if name == "gtsrb":  # the labels unpacked among the pictures
        (root / "GT-final_test.csv").rename(root / "GTSRB/Final_Test/Images/GT-final_test.csv")
    dataset = open_dataset(name, root)
    ours = [(np.asarray(image).tobytes(), label) for image, label in (dataset[i] for i in range(len(dataset)))]
    assert sorted(ours) == sorted(expected)
    assert list(dataset.classnames) == list(names)
    assert all(path.is_relative_to(root) and path.is_file() for path in dataset.files)


def test_imagenets_folders_are_taken_for_imagenet_only(tmp_path):
    """Below --data itself, where a name doesn't tell: ImageNet-Sketch has the same folders, ImageNet-R 200 of them."""
    for folder in folders_on(load_card("imagenet")):
        save(tmp_path / "val" / folder / "a.png", 1)
    assert len(open_dataset("imagenet", tmp_path)) == 1000
    for name in ("imagenet_sketch", "imagenet_r", "imagenet_a"):
        with pytest.raises(FileNotFoundError, match="may be another set's"):
            open_dataset(name, tmp_path)
    (tmp_path / "val").rename(tmp_path / "sketch")
    assert len(open_dataset("imagenet_sketch", tmp_path)) == 1000


def test_patchcamelyon_says_what_it_needs(tmp_path, monkeypatch):
    text(tmp_path / "pcam/camelyonpatch_level_2_split_test_x.h5", "")
    monkeypatch.setattr(originals.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"is read with h5py: pip install ssmclip\[evaluate\]"):
        open_dataset("pcam", tmp_path)


def test_a_list_of_test_images_narrows_sun397(tmp_path):
    sun397(tmp_path)
    (kept,) = (tmp_path / "SUN397").rglob("sun_5.jpg")
    text(tmp_path / "SUN397/Testing_01.txt", f"/{kept.relative_to(tmp_path / 'SUN397')}\n")
    assert open_dataset("sun397", tmp_path).labels == [5]


def test_pictures_a_list_names_and_that_are_missing_are_left_out(tmp_path):
    dtd(tmp_path)
    (tmp_path / "dtd/dtd/images/texture03/texture03_0001.jpg").unlink()
    dataset = open_dataset("dtd", tmp_path)
    assert (len(dataset), dataset.labels[3], dataset.partial) == (46, 4, True)


# ---- the same pictures as class folders, CLIP_benchmark's shards and parquet -----------------------------------------


CLASSIFICATION = [name for name in list_cards() if load_card(name).kind == "classification"]
AS_SHARDS = [name for name in CLASSIFICATION if "clip_benchmark_tars" in load_card(name).layouts]
AS_FOLDERS = [name for name in CLASSIFICATION if "class_folders" in load_card(name).layouts]


def class_folder_names(name: str) -> list[str]:
    card = load_card(name)
    listed = folders_on(card) or (() if card.folders == SORTED else names_on(card))
    count = len(names_on(card)) or card.classes
    if name == "country211":
        return [chr(65 + i // 26) + chr(65 + i % 26) for i in range(count)]
    return [folder.replace("/", "_") for folder in listed] or [f"{i}" for i in range(count)]


@pytest.mark.parametrize("name", AS_FOLDERS)
def test_class_folders_of_every_data_set(tmp_path, name):
    """Below a folder of the data set's name or one of its others, in the split's folder; labels in the card's order."""
    card = load_card(name)
    folders = class_folder_names(name)
    used = range(len(folders)) if card.folders == SORTED or card.classes else {0, 1, len(folders) - 1}
    for i in used:
        save(tmp_path / (card.aliases or (card.name,))[-1] / card.split / folders[i] / "a.png", i)
    dataset = open_dataset(name, tmp_path)
    shades = [np.asarray(dataset[i][0])[0, 0, 0] for i in range(len(dataset))]
    assert len(dataset) == len(used)
    assert [
        i % 256 for i in dataset.labels
    ] == shades or card.classes  # a card without names takes folders as they sort
    assert len(dataset.classnames) == (len(names_on(card)) or card.classes)


def test_imagenet_subsets_ask_for_their_own_classes():
    from open_clip import IMAGENET_CLASSNAMES

    wnids = folders_on(load_card("imagenet"))
    assert len(wnids) == 1000
    for name in ("imagenet_r", "imagenet_a", "imagenet_o"):
        card = load_card(name)
        assert len(folders_on(card)) == len(names_on(card)) == 200
        assert list(names_on(card)) == [IMAGENET_CLASSNAMES[wnids.index(wnid)] for wnid in folders_on(card)]


@pytest.mark.parametrize("name", AS_SHARDS)
def test_every_classification_set_as_clip_benchmark_shards(tmp_path, name):
    card = load_card(name)
    names = names_on(card) or [f"class {i}" for i in range(card.classes)]
    folder = tmp_path / f"wds_{(card.aliases or (card.name,))[0].replace('/', '-')}"
    (folder / "test").mkdir(parents=True)
    text(folder / "classnames.txt", "\n".join(names) + "\n")
    text(folder / "zeroshot_classification_templates.txt", "a drawing of {c}\n")
    with tarfile.open(folder / "test/0.tar", "w") as tar:
        for i in (0, len(names) - 1):
            for suffix, data in (("png", encoded(i)), ("cls", str(i).encode())):
                info = tarfile.TarInfo(f"s{i:04d}.{suffix}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    dataset = open_dataset(name, tmp_path)
    assert dataset.labels == [0, len(names) - 1]
    assert (list(dataset.classnames), dataset.templates) == (list(names), ("a drawing of {}",))
    assert np.asarray(dataset[1][0])[0, 0, 0] == (len(names) - 1) % 256


def write_parquet(folder: Path, columns: dict, features: dict | None = None, split="test") -> None:
    """As `datasets` writes it: pictures as {bytes, path}, features in the schema; two files, small row groups."""
    table = pa.table(columns)
    if features:
        about = {"huggingface": json.dumps({"info": {"features": features}})}
        table = table.replace_schema_metadata(about)
    folder.mkdir(parents=True, exist_ok=True)
    half = len(table) // 2
    for number, part in enumerate((table.slice(0, half), table.slice(half))):
        pq.write_table(part, folder / f"{split}-{number:05d}-of-00002.parquet", row_group_size=2)


def rows_of_pictures(shades) -> list[dict]:
    return [{"bytes": encoded(shade), "path": f"{shade}.png"} for shade in shades]


def test_parquet_with_the_names_in_its_schema(tmp_path):
    shades, names = [3, 1, 4, 1, 5, 9, 2], [f"dish_{i:03d}" for i in range(101)]
    features = {"label": {"names": names, "_type": "ClassLabel"}, "image": {"_type": "Image"}}
    write_parquet(tmp_path / "food101/data", {"image": rows_of_pictures(shades), "label": shades}, features)
    dataset = open_dataset("food101", tmp_path)
    assert dataset.labels == shades
    assert [np.asarray(dataset[i][0])[0, 0, 0] for i in (6, 0, 3, 2)] == [2, 3, 1, 4]
    assert dataset.classnames[3] == "dish 003"


def test_parquet_whose_names_are_the_cards_goes_by_name(tmp_path):
    names = list(names_on(load_card("stl10")))[::-1]
    features = {"label": {"names": names, "_type": "ClassLabel"}}
    write_parquet(tmp_path / "stl10", {"image": rows_of_pictures([0, 9]), "label": [0, 9]}, features)
    dataset = open_dataset("stl10", tmp_path)
    assert [dataset.classnames[label] for label in dataset.labels] == [names[0], names[9]]


def test_parquet_labels_by_word_and_what_can_not_be_read(tmp_path):
    write_parquet(tmp_path / "a/sst2", {"image": rows_of_pictures([1, 2]), "label": ["positive", "negative"]})
    assert open_dataset("sst2", tmp_path / "a").labels == [1, 0]
    write_parquet(tmp_path / "b/sst2", {"image": rows_of_pictures([1, 2]), "label": ["positive", "fine"]})
    with pytest.raises(ValueError, match="row 1: the label 'fine' is no class of sst2"):
        open_dataset("sst2", tmp_path / "b")
    write_parquet(tmp_path / "c/sst2", {"image": rows_of_pictures([1, 2]), "answer": [1, 0]})
    with pytest.raises(ValueError, match=r"none of the columns label.* it has image, answer"):
        open_dataset("sst2", tmp_path / "c")
    (tmp_path / "c/sst2/test-00000-of-00002.parquet").write_bytes(b"PAR1 no more")
    with pytest.raises(ValueError, match="damaged parquet file"):
        open_dataset("sst2", tmp_path / "c")


def test_parquet_of_captions(tmp_path):
    said = [["one", "two"], ["three"], ["four", "five", "six"], ["seven"]]
    columns = {"image": rows_of_pictures([1, 2, 3, 4]), "annotations_captions": said}
    write_parquet(tmp_path / "nocaps/data", columns, split="validation")
    dataset = open_dataset("nocaps", tmp_path)
    assert dataset.captions == said
    assert np.asarray(dataset[2])[0, 0, 0] == 3


# ---- captions as published -------------------------------------------------------------------------------------------


def coco(file_names: list[str]) -> dict:
    images = [{"id": 10 * i, "file_name": name} for i, name in enumerate(file_names)]
    annotations = [
        {"id": len(images) * n + i, "image_id": image["id"], "caption": f"caption {n} of {image['file_name']}\n"}
        for n in (0, 1)
        for i, image in enumerate(images)
    ]
    return {"images": images, "annotations": annotations}


def captions_of(name: str) -> list[str]:
    return [f"caption 0 of {name}", f"caption 1 of {name}"]


def karpathy(name: str, below: str = "") -> dict:
    images = [
        {
            "filename": f"{split}.jpg",
            "filepath": below,
            "split": split,
            "sentences": [{"raw": said} for said in captions_of("it")],
        }
        for split in ("train", "test", "restval")
    ]
    return {"images": images}


def write_captioned(root: Path) -> dict[str, list[list[str]]]:
    """A tiny copy of every captioned set; card -> its captions."""
    text(root / "coco/annotations/captions_val2017.json", json.dumps(coco(["1.jpg", "2.jpg"])))
    text(root / "mscoco_captions/coco_test_karpathy.json", json.dumps(coco(["COCO_3.jpg"])))
    text(root / "nocaps/nocaps_val_4500_captions.json", json.dumps(coco(["4.jpg"])))
    text(root / "flickr30k/dataset_flickr30k.json", json.dumps(karpathy("flickr30k")))
    listed = 'image,caption\n7.jpg,"A dog, a cat ."\n7.jpg,Two\n8.jpg,Three\n'
    text(root / "flickr8k/flickr8k_test_karpathy.txt", listed)
    docci = [{"example_id": f"test_{i}", "split": s, "image_file": f"test_{i}.jpg", "description": f"long {i}"}
             for i, s in enumerate(["test", "train", "test"])]  # fmt: skip
    text(root / "docci/docci_descriptions.jsonlines", "".join(json.dumps(row) + "\n" for row in docci))
    text(root / "iiw/data.jsonl", json.dumps({"image/key": "aar_1", "IIW": "words", "IIW-P5B": "machine"}) + "\n")
    text(root / "dci/annotations/00001_1.json", json.dumps({"image": "sa_1.jpg", "short_caption": "S.", "extra_caption": "X."}))  # fmt: skip  # noqa: E501
    for i in (1, 2, 10):
        text(root / f"urban1k/Urban1k/caption/{i}.txt", f"text {i}\n")
        save(root / f"urban1k/Urban1k/image/{i}.jpg", i)
    pictures = ["coco/val2017/1.jpg", "coco/val2017/2.jpg", "mscoco_captions/val2014/COCO_3.jpg", "nocaps/images/4.jpg",
                "flickr30k/flickr30k-images/test.jpg", "flickr8k/Images/7.jpg", "flickr8k/Images/8.jpg",
                "docci/images/test_0.jpg", "docci/images/test_1.jpg", "docci/images/test_2.jpg", "iiw/images/aar_1.jpg",
                "dci/photos/sa_1.jpg"]  # fmt: skip
    for i, name in enumerate(pictures):
        save(root / name, i)
    return {
        "coco_val2017": [captions_of("1.jpg"), captions_of("2.jpg")],
        "coco_karpathy": [captions_of("COCO_3.jpg")],
        "nocaps": [captions_of("4.jpg")],
        "flickr30k": [captions_of("it")],
        "flickr8k": [["A dog, a cat .", "Two"], ["Three"]],
        "docci": [["long 0"], ["long 2"]],
        "iiw": [["words"]],
        "dci": [["S. X."]],
        "urban1k": [["text 1"], ["text 2"], ["text 10"]],
    }


def test_every_captioned_set_as_published(tmp_path):
    expected = write_captioned(tmp_path)
    assert set(expected) == {name for name in list_cards() if load_card(name).kind == "retrieval"}
    for name, captions in expected.items():
        dataset = open_dataset(name, tmp_path)
        assert dataset.captions == captions, name
        assert all(dataset[i].size == (24, 20) for i in range(len(dataset)))
    reference = datasets.CocoCaptions(
        tmp_path / "coco/val2017", tmp_path / "coco/annotations/captions_val2017.json", transform=None
    )
    assert [[c.strip() for c in captions] for _, captions in reference] == expected["coco_val2017"]


def test_captions_whose_pictures_are_not_there(tmp_path):
    text(tmp_path / "coco/annotations/captions_val2017.json", json.dumps(coco(["1.jpg", "2.jpg"])))
    with pytest.raises(FileNotFoundError, match=r"the pictures of .*captions_val2017\.json, which is there"):
        open_dataset("coco_val2017", tmp_path)
    save(tmp_path / "coco/val2017/2.jpg", 0)
    dataset = open_dataset("coco_val2017", tmp_path)
    assert (dataset.captions, dataset.said) == ([captions_of("2.jpg")], "1 of 2 described pictures are not there")


# ---- groups, a person's own folders, the hub -------------------------------------------------------------------------


def write_waterbirds(root: Path) -> None:
    rows = ["img_id,img_filename,y,split,place,place_filename"]
    for i, (y, split, place) in enumerate([(0, 2, 0), (1, 2, 0), (1, 0, 1), (1, 2, 1), (0, 2, 1)]):
        name = f"{i:03d}.Bird/{i}.jpg"
        rows.append(f'{i},{name},{y},{split},{place},"/o/ocean/{i}.jpg"')
        save(root / name, i)
    text(root / "metadata.csv", "\n".join(rows) + "\n")


def test_waterbirds_have_groups(tmp_path):
    write_waterbirds(tmp_path / "waterbird_complete95_forest2water2")
    dataset = open_dataset("waterbirds", tmp_path)
    assert dataset.labels == [0, 1, 1, 0]
    assert dataset.groups == ["0, 0", "1, 0", "1, 1", "0, 1"]


def test_own_folders_with_a_column_of_groups(tmp_path):
    mine = tmp_path / "mine"
    for name in ("cat", "dog_house"):
        save(mine / "test" / name / "a.png", 1)
        save(mine / "test" / name / "b.png", 2)
    dataset = open_dataset(f"folder:{mine}", "anywhere")
    assert (dataset.classnames, dataset.labels, dataset.groups) == (("cat", "dog house"), [0, 0, 1, 1], None)
    text(mine / "groups.csv", "file,group\ncat/a.png,indoors\ncat/b.png,outdoors\ndog_house/a.png,outdoors\n")
    with pytest.raises(ValueError, match=r"no group for 1 pictures; the first: dog_house/b\.png"):
        open_dataset(f"folder:{mine}", "anywhere")
    with (mine / "groups.csv").open("a") as file:
        file.write("dog_house/b.png,indoors\n")
    assert open_dataset(f"folder:{mine}", "x").groups == ["indoors", "outdoors", "outdoors", "indoors"]
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        open_dataset("folder:/nowhere/at/all", tmp_path)


def test_the_hub_is_asked_for_clip_benchmarks_repositories(tmp_path, monkeypatch, capsys):
    asked = []

    def snapshot_download(repo, repo_type, allow_patterns, local_files_only):
        asked.append((repo, repo_type))
        if local_files_only:
            raise huggingface_hub.errors.LocalEntryNotFoundError("not in the cache")
        if repo != "clip-benchmark/wds_fgvc_aircraft":
            raise OSError("404: no such repository")
        (tmp_path / "test").mkdir()
        text(tmp_path / "classnames.txt", "\n".join(f"A{i}" for i in range(100)))
        with tarfile.open(tmp_path / "test/0.tar", "w") as tar:
            for suffix, data in (("png", encoded(7)), ("cls", b"7")):
                info = tarfile.TarInfo(f"x.{suffix}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert open_dataset("aircraft", "hub:clip-benchmark").labels == [7]
    assert asked == [("clip-benchmark/wds_aircraft", "dataset"), ("clip-benchmark/wds_fgvc_aircraft", "dataset")]
    with pytest.raises(FileNotFoundError, match="wds_cub200: 404: no such repository"):
        open_dataset("cub", "hub:clip-benchmark")
    # What only looks, downloads nothing.
    assert main(["datasets", "--data", "hub:clip-benchmark", "aircraft", "mnist"]) == 0
    assert capsys.readouterr().out.count("not downloaded yet; evaluate does it if clip-benchmark has it") == 2
    assert task_names(["found", "aircraft"], "hub:clip-benchmark") == ["aircraft"]


def test_what_the_hub_left_in_its_cache_is_found(tmp_path):
    folder = tmp_path / "datasets--someone--stl10/snapshots/0123/data"
    write_parquet(folder, {"image": rows_of_pictures([1, 2]), "label": [3, 4]})
    assert open_dataset("stl10", tmp_path).labels == [3, 4]


# ---- prompts ---------------------------------------------------------------------------------------------------------


def test_slips_files_are_put_in_the_data_sets_order(tmp_path):
    """CLEVR's labels stand there by the order of their folders (count_10 first); FER-2013's have synonyms."""
    labels = {"clevr_counts": ["10", "3", "4", "5", "6", "7", "8", "9"],
              "fer2013": [["angry"], ["disgusted"], ["fearful"], ["happy", "smiling"], ["neutral", "bored"],
                          ["sad", "depressed"], ["surprised", "shocked"]]}  # fmt: skip
    templates = {"clevr_counts": ["a photo of {} objects."], "fer2013": ["{} face", "they look {c}"]}
    text(tmp_path / "labels.json", json.dumps(labels))
    text(tmp_path / "templates.json", json.dumps(templates))
    prompts = read_prompts(str(tmp_path))
    clevr_card, fer_card = load_card("clevr"), load_card("fer2013")
    assert chosen(prompts, clevr_card, names_on(clevr_card))[0] == tuple(map(str, range(3, 11)))
    words = ("three", "four", "five", "six", "seven", "eight", "nine", "ten")  # what CLIP_benchmark's copy says
    assert chosen(prompts, clevr_card, words)[0] == tuple(map(str, range(3, 11)))
    assert chosen(prompts, fer_card, names_on(fer_card)) == (
        tuple(tuple(names) for names in labels["fer2013"]),
        ("{} face", "they look {}"),
    )
    fer2013(tmp_path)
    assert open_dataset("fer2013", tmp_path, prompts=prompts).classnames[3] == ("happy", "smiling")


def test_prompts_that_do_not_fit_are_named(tmp_path):
    card = load_card("stl10")
    text(tmp_path / "l.json", json.dumps({"stl10": ["cat", "dog"]}))
    text(tmp_path / "t.json", json.dumps({"stl10": ["a {}", "no place for it"]}))
    with pytest.raises(ValueError, match=r"t\.json mixes templates with something without {}.*'no place for it'"):
        read_prompts(f"{tmp_path / 'l.json'},{tmp_path / 't.json'}")
    text(tmp_path / "t.json", json.dumps({"stl10": ["a {}"]}))
    prompts = read_prompts(f"{tmp_path / 'l.json'},{tmp_path / 't.json'}")
    with pytest.raises(ValueError, match=r"2 labels for stl10, the data set 10 classes"):
        chosen(prompts, card, names_on(card))
    with pytest.raises(ValueError, match=r"no templates for cub or cub200"):
        chosen(prompts, load_card("cub"), ["a"])
    swapped = list(names_on(card))[::-1]
    text(tmp_path / "l.json", json.dumps({"stl10": ["horsey" if name == "horse" else name for name in swapped]}))
    with pytest.raises(ValueError, match="which label is which class can't be told"):
        chosen(read_prompts(f"{tmp_path / 'l.json'},{tmp_path / 't.json'}"), card, names_on(card))
    with pytest.raises(ValueError, match=r"l\.json is not valid JSON"):
        text(tmp_path / "l.json", "{") and read_prompts(str(tmp_path / "l.json"))


def test_clip_benchmarks_prompts_are_those_of_its_files():
    """Read as files; its own code, imported here, loads the same."""
    benchmark = pytest.importorskip("clip_benchmark")
    folder = Path(benchmark.__file__).parent / "datasets"
    theirs = json.loads((folder / "en_zeroshot_classification_templates.json").read_text())
    prompts = clip_benchmark_prompts()
    names, templates = chosen(prompts, load_card("aircraft"), ["x"])
    assert [template.replace("{}", "A300") for template in templates] == [
        template.format(c="A300") for template in theirs["fgvc_aircraft"]
    ]
    assert names == ("x",)
    _, fallback = chosen(prompts, load_card("cub"), ["x"])  # it has none for birds
    assert len(fallback) == len(theirs["imagenet1k"]) == 80


def test_without_clip_benchmark_the_error_says_what_to_do(monkeypatch):
    from ssmclip.data.testsets import prompts

    monkeypatch.setattr(prompts.util, "find_spec", lambda name: None)
    prompts._clip_benchmark.cache_clear()
    with pytest.raises(ValueError, match="pip install clip-benchmark"):
        names_on(load_card("flowers"))
    prompts._clip_benchmark.cache_clear()


def test_real_subsets_are_found(shared, tmp_path):
    """Caltech-101 and DTD as the archives unpack, torchvision's folder names not at hand."""
    for name in ("caltech101", "dtd"):
        with tarfile.open(shared / f"data/{name}/{name}_subset.tar.gz") as tar:
            tar.extractall(tmp_path / name, filter="data")
    caltech = open_dataset("caltech101", tmp_path)
    assert (len(caltech), len(set(caltech.labels)), caltech.partial) == (102 * 8, 102, True)
    assert (caltech.classnames[0], caltech.labels.count(0)) == ("background", 8)
