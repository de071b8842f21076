"""Test sets in the files their authors published, those that list their pictures by torchvision's own classes.

Folders are walked here: torchvision takes hidden ones, and what systems leave among pictures, for classes.

torchvision compares checksums of whole copies; a part of a data set has others and is read all the same: what is
missing shows in the number of images.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from importlib import util
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ssmclip.data.delimited import Delimited, read_content
from ssmclip.data.images import folders_in, pictures_below
from ssmclip.data.lines import read_lines
from ssmclip.data.testsets.card import LAYOUTS, WHOLE, Card, Found, Pictures
from ssmclip.data.testsets.files import from_file, picture_files, read_json, read_records, read_rows
from ssmclip.data.testsets.layouts.arrays import from_array
from ssmclip.data.testsets.layouts.folders import label_folders, labelled_pictures
from ssmclip.data.testsets.prompts import plain, spoken

BELOW = {"test": "test", "train": "train", "val": "valid"}  # split -> how folders and files are called
SUN397_LISTS = {"test": "Testing_01.txt", "train": "Training_01.txt"}
FER2013_USAGES = {"test": "PrivateTest", "train": "Training", "val": "PublicTest"}
CUB_FLAGS = {"test": "0", "train": "1"}
VEHICLES = ("Car", "Van", "Truck")
VEHICLE_LIMITS = (8.0, 20.0, 999.0)  # metres
CLEVR_LIMITS = (8.0, 8.5, 9.0, 9.5, 10.0)  # distances from the camera
OBJECTNET_BORDER = 2  # pixels of red around every picture, there to tell leaks into training sets


def torchvision_layout(name: str, splits: Mapping[str, tuple[str, str]], **arguments: Any):
    """Decorator: a layout from a function (torchvision data set, card) -> (paths, labels, class names).

    splits: split -> (what torchvision calls it, marker: what must be there below the folder, or, in a folder of the
    data set's name, without its first parts, as an archive unpacked there leaves it); arguments: of torchvision's class
    of that name.
    """

    def add(take: Callable[[Any, Card], tuple[Sequence, Sequence[int], Sequence[str]]]):
        def layout(folder: Path, card: Card) -> Found | str:
            split = card.part or "test"
            if split not in splits:
                return _no_split(split, splits)
            called, marker = splits[split]
            head = _missing_head(folder, marker, card)
            if head is None:
                return marker
            with tempfile.TemporaryDirectory() as view:  # where the folder lies as deep as torchvision wants it
                if head.parts:
                    (Path(view) / head).parent.mkdir(parents=True, exist_ok=True)
                    (Path(view) / head).symlink_to(folder.resolve(), target_is_directory=True)
                dataset = _opened(name, Path(view) if head.parts else folder, {"split": called} | arguments)
                paths, labels, classnames = take(dataset, card)
                paths = [folder / Path(path).relative_to(Path(view) / head) if head.parts else path for path in paths]
            where = folder / Path(marker).relative_to(head)
            return _from_files(str(where), folder, [Path(path) for path in paths], labels, classnames, split=split)

        LAYOUTS.register(f"torchvision_{name.lower()}")(layout)
        return take

    return add


def _no_split(split: str, known: Iterable[str]) -> str:
    return f"a split {split} (there are {', '.join(known)})"


def _missing_head(folder: Path, marker: str, card: Card) -> Path | None:
    """What of the marker's path must come before the folder's contents: nothing, some parts; None: it is not there."""
    if (folder / marker).exists():
        return Path()
    parts = Path(marker).parts
    if plain(folder.name) in {plain(name) for name in (card.name, *card.aliases)}:
        for depth in range(1, len(parts)):
            # Any form of any data set may have a folder test/.
            if parts[depth:] != ("test",) and folder.joinpath(*parts[depth:]).exists():
                return Path(*parts[:depth])
    return None


def _place(folder: Path, marker: str, card: Card) -> Path | None:
    """The marker, wherever its archive was unpacked; None where it is not there."""
    head = _missing_head(folder, marker, card)
    return None if head is None else folder / Path(marker).relative_to(head)


def _class_folders(folder: Path, markers: Mapping[str, str], card: Card, last: str = "") -> Found | str:
    """A set of class folders. markers: split -> the folder they are in; last: one whose pictures come after all
    others."""
    split = card.part or next(iter(markers))
    if split not in markers:
        return _no_split(split, markers)
    marker = markers[split]
    place = _place(folder, marker, card)
    if place is None:
        return marker
    folders = sorted(folders_in(place), key=lambda path: (path.name == last, path.name))
    paths, labels = labelled_pictures(label_folders(place, folders, card))
    return _from_files(str(place), folder, paths, labels, (), split=split)


def _opened(name: str, folder: Path, arguments: dict[str, Any]) -> Any:
    from torchvision import datasets  # and torch with it: seconds, where only such a data set needs them

    whole = getattr(datasets, name)
    cls = type(name, (whole,), {"_check_integrity": lambda self: True})
    try:
        return cls(folder, **arguments)
    except (RuntimeError, ImportError, LookupError, AssertionError) as error:
        raise ValueError(f"torchvision's {name} can't read {folder}: {type(error).__name__}: {error}") from error


def _from_files(
    where: str, folder: Path, paths: list[Path], labels: Sequence[int], classnames: Sequence[str], *, split: str
) -> Found:
    """A set of picture files; those a list names and that are not there are left out, which the count shows."""
    there = [place for place, path in enumerate(paths) if path.is_file()]
    if not there:
        raise ValueError(f"{where} names {len(paths)} pictures and none of them is there")
    paths = [paths[place] for place in there]
    return Found(
        where=where,
        pictures=picture_files(paths),
        keys=[str(path.relative_to(folder)) for path in paths],
        labels=[int(labels[place]) for place in there],
        classnames=tuple(classnames),
        files=tuple(paths),
        split=split,
    )


@torchvision_layout("Food101", {split: (split, f"food-101/meta/{split}.json") for split in ("test", "train")})
def food101(dataset: Any, card: Card):
    """food-101/meta/{test,train}.json and food-101/images/CLASS/NUMBER.jpg."""
    return dataset._image_files, dataset._labels, [spoken(name) for name in dataset.classes]


@LAYOUTS.register("torchvision_sun397")
def sun397(folder: Path, card: Card) -> Found | str:
    """SUN397/ClassName.txt and SUN397/a/abbey/sun_*.jpg; of these, those in Testing_01.txt where that file is there.

    For training, those in Training_01.txt.
    """
    split = card.part or "test"
    if split not in SUN397_LISTS:
        return _no_split(split, SUN397_LISTS)
    place = _place(folder, marker := "SUN397/ClassName.txt", card)
    if place is None:
        return marker
    root = place.parent
    classes = [line.strip()[3:] for line in read_lines(place) if line.strip()]  # /a/abbey
    label = {name: number for number, name in enumerate(classes)}
    paths = [path for path in pictures_below(root) if path.name.startswith("sun_")]
    listed = root / SUN397_LISTS[split]
    if card.part and not listed.is_file():
        return f"SUN397/{listed.name}"
    if listed.is_file():
        wanted = {line.strip().lstrip("/") for line in read_lines(listed)}
        paths = [path for path in paths if path.relative_to(root).as_posix() in wanted]
    names = ["/".join(path.relative_to(root).parts[1:-1]) for path in paths]
    if strangers := sorted({name for name in names if name not in label}):
        raise ValueError(f"{root} has folders that are no class of {place.name}: {', '.join(strangers[:5])}")
    classnames = [name.replace("_", " ").replace("/", " ") for name in classes]
    labels = [label[name] for name in names]
    return _from_files(str(place), folder, paths, labels, classnames, split=split if listed.is_file() else WHOLE)


@torchvision_layout(
    "StanfordCars",
    {"test": ("test", "stanford_cars/devkit"), "train": ("train", "stanford_cars/devkit/cars_train_annos.mat")},
)
def stanford_cars(dataset: Any, card: Card):
    """stanford_cars/devkit/cars_meta.mat, cars_test_annos_withlabels.mat and cars_test/*.jpg.

    For training, devkit/cars_train_annos.mat and cars_train/*.jpg.
    """
    return [path for path, _ in dataset._samples], [label for _, label in dataset._samples], dataset.classes


@torchvision_layout(
    "FGVCAircraft",
    {split: (split, f"fgvc-aircraft-2013b/data/images_variant_{split}.txt") for split in ("test", "train", "val")},
    annotation_level="variant",
)
def aircraft(dataset: Any, card: Card):
    """fgvc-aircraft-2013b/data/{variants,images_variant_{test,train,val}}.txt and images/*.jpg."""
    return dataset._image_files, dataset._labels, dataset.classes


@torchvision_layout(
    "DTD", {split: (split, f"dtd/dtd/labels/{split}1.txt") for split in ("test", "train", "val")}, partition=1
)
def dtd(dataset: Any, card: Card):
    """dtd/dtd/labels/{test,train,val}1.txt and dtd/dtd/images/CLASS/*.jpg."""
    return dataset._image_files, dataset._labels, [spoken(name) for name in dataset.classes]


@torchvision_layout(
    "OxfordIIITPet",
    {
        "test": ("test", "oxford-iiit-pet/annotations/test.txt"),
        "train": ("trainval", "oxford-iiit-pet/annotations/trainval.txt"),
    },
)
def pets(dataset: Any, card: Card):
    """oxford-iiit-pet/annotations/{test,trainval}.txt and images/*.jpg."""
    return dataset._images, dataset._labels, dataset.classes


@LAYOUTS.register("torchvision_caltech101")
def caltech101(folder: Path, card: Card) -> Found | str:
    """caltech101/101_ObjectCategories/CLASS/image_0001.jpg, and BACKGROUND_Google, which torchvision leaves out."""
    return _class_folders(folder, {WHOLE: "caltech101/101_ObjectCategories"}, card, last="BACKGROUND_Google")


@torchvision_layout("Flowers102", {split: (split, "flowers-102/setid.mat") for split in ("test", "train", "val")})
def flowers(dataset: Any, card: Card):
    """flowers-102/{setid,imagelabels}.mat and jpg/image_00001.jpg."""
    return dataset._image_files, dataset._labels, ()


@LAYOUTS.register("torchvision_eurosat")
def eurosat(folder: Path, card: Card) -> Found | str:
    """eurosat/2750/CLASS/*.jpg: all 27,000 images, for which no split was published."""
    return _class_folders(folder, {WHOLE: "eurosat/2750"}, card)


@LAYOUTS.register("gtsrb_csv")
def gtsrb(folder: Path, card: Card) -> Found | str:
    """GTSRB/Final_Test/Images/*.ppm; GT-final_test.csv among them or in a folder above, as torchvision has it.

    For training, a folder for each class in GTSRB/Final_Training/Images or, as torchvision has it, GTSRB/Training.
    """
    name, places = "GT-final_test.csv", (folder, folder / "GTSRB")
    if card.part:
        return _gtsrb_training(places, card)
    images = next((place / "Final_Test/Images" for place in places if (place / "Final_Test/Images").is_dir()), None)
    above = [] if images is None else [place for place in (images, *images.parents) if place.is_relative_to(folder)]
    table = next((place / name for place in above if (place / name).is_file()), None)
    if table is None:
        return f"GTSRB/Final_Test/Images and {name}"
    rows = read_rows(table)
    if missing := {"Filename", "ClassId"} - set(rows[0]):
        raise ValueError(f"{table} has no column {' and no '.join(sorted(missing))}; it has {', '.join(rows[0])}")
    paths = [images / row["Filename"] for row in rows]
    return _from_files(str(table), folder, paths, [int(row["ClassId"]) for row in rows], (), split="test")


def _gtsrb_training(places: Sequence[Path], card: Card) -> Found | str:
    if card.part != "train":
        return _no_split(card.part, ("test", "train"))
    below = ("Final_Training/Images", "Training")
    place = next((place / name for place in places for name in below if (place / name).is_dir()), None)
    if place is None:
        return " or ".join(f"GTSRB/{name}" for name in below)
    paths, labels = labelled_pictures(label_folders(place, folders_in(place), card))
    return _from_files(str(place), place, paths, labels, (), split="train")


@LAYOUTS.register("torchvision_country211")
def country211(folder: Path, card: Card) -> Found | str:
    """country211/{test,train,valid}/CODE/*.jpg."""
    return _class_folders(folder, {split: f"country211/{below}" for split, below in BELOW.items()}, card)


@LAYOUTS.register("torchvision_clevrclassification")
def clevr(folder: Path, card: Card) -> Found | str:
    """clevr/CLEVR_v1.0/{scenes/CLEVR_val_scenes.json,images/val/*.png}: three to ten objects. Also train."""
    split = card.part or "val"
    place = _place(folder, marker := f"clevr/CLEVR_v1.0/scenes/CLEVR_{split}_scenes.json", card)
    if place is None:
        return marker
    count = {scene["image_filename"]: len(scene["objects"]) for scene in read_json(place)["scenes"]}
    paths = pictures_below(place.parents[1] / "images" / split)
    if unknown := [path for path in paths if path.name not in count]:
        raise ValueError(f"{place} says nothing of {len(unknown)} pictures; the first: {unknown[0]}")
    return _from_files(str(place), folder, paths, [count[path.name] - 3 for path in paths], (), split=split)


@LAYOUTS.register("clevr_distances")
def clevr_distances(folder: Path, card: Card) -> Found | str:
    """The same files: how far the nearest object is from the camera, in six classes (VTAB). Also train."""
    split = card.part or "val"
    place = _place(folder, marker := f"clevr/CLEVR_v1.0/scenes/CLEVR_{split}_scenes.json", card)
    if place is None:
        return marker
    scenes = {scene["image_filename"]: scene["objects"] for scene in read_json(place)["scenes"]}
    nearest = {name: min(thing["pixel_coords"][2] for thing in objects) for name, objects in scenes.items()}
    paths = pictures_below(place.parents[1] / "images" / split)
    if unknown := [path for path in paths if path.name not in nearest]:
        raise ValueError(f"{place} says nothing of {len(unknown)} pictures; the first: {unknown[0]}")
    labels = [sum(nearest[path.name] > limit for limit in CLEVR_LIMITS) for path in paths]
    return _from_files(str(place), folder, paths, labels, (), split=split)


@LAYOUTS.register("svhn_mat")
def svhn(folder: Path, card: Card) -> Found | str:
    """{test,train}_32x32.mat, cropped house numbers, where 10 stands for the digit 0."""
    split = card.part or "test"
    path = folder / f"{split}_32x32.mat"
    if not path.is_file():
        return path.name
    from scipy.io import loadmat

    try:
        content = loadmat(path)
        pixels = np.ascontiguousarray(content["X"].transpose(3, 0, 1, 2))
        labels = (content["y"].reshape(-1).astype(int) % 10).tolist()
    except Exception as error:  # a damaged file raises nearly anything
        raise ValueError(f"{path} is no file of SVHN's digits: {type(error).__name__}: {error}") from error
    return _from_pixels(path, pixels, labels, split)


@LAYOUTS.register("torchvision_renderedsst2")
def rendered_sst2(folder: Path, card: Card) -> Found | str:
    """rendered-sst2/{test,train,valid}/{negative,positive}/*.png."""
    return _class_folders(folder, {split: f"rendered-sst2/{below}" for split, below in BELOW.items()}, card)


@LAYOUTS.register("torchvision_kitti")
def kitti(folder: Path, card: Card) -> Found | str:
    """Kitti/raw/training/{image_2,label_2}: the distance to the nearest car, van or truck, in four classes (VTAB)."""
    if card.part:
        return _no_split(card.part, [WHOLE])
    place = _place(folder, marker := "Kitti/raw/training/label_2", card)
    if place is None:
        return marker
    paths = pictures_below(place.with_name("image_2"))
    labels = [_distance_class(place / f"{path.stem}.txt") for path in paths]
    return _from_files(str(place), folder, paths, labels, (), split=WHOLE)


def _distance_class(file: Path) -> int:
    """0: below 8 m, 1: below 20 m, 2: further, 3: no vehicle. file: an object a line, its kind first, metres at 13."""
    objects = [line.split() for line in read_lines(file) if line.strip()]
    nearest = min((float(words[13]) for words in objects if words[0] in VEHICLES), default=1000.0)
    return sum(nearest > limit for limit in VEHICLE_LIMITS)


@LAYOUTS.register("torchvision_stl10")
def stl10(folder: Path, card: Card) -> Found | str:
    """stl10_binary/{test_X,test_y}.bin and class_names.txt; train_X.bin and train_y.bin."""
    split = card.part or "test"
    marker = f"stl10_binary/{split}_X.bin"
    if not (folder / marker).is_file():
        return marker
    dataset = _opened("STL10", folder, {"split": split})
    pixels = np.ascontiguousarray(dataset.data.transpose(0, 2, 3, 1))
    return _from_pixels(folder / marker, pixels, dataset.labels.tolist(), split)


@LAYOUTS.register("torchvision_pcam")
def pcam(folder: Path, card: Card) -> Found | str:
    """pcam/camelyonpatch_level_2_split_{test,train,valid}_{x,y}.h5. Raises ValueError without h5py."""
    split = card.part or "test"
    marker = f"pcam/camelyonpatch_level_2_split_{BELOW[split]}_x.h5"
    if not (folder / marker).is_file():
        return marker
    if util.find_spec("h5py") is None:
        raise ValueError(f"{folder / marker} is read with h5py: pip install ssmclip[evaluate]")
    import h5py

    with h5py.File(folder / marker.replace("_x.", "_y.")) as file:
        labels = file["y"][:, 0, 0, 0].tolist()
    pictures = Pictures(len(labels), partial(_from_h5, folder / marker))
    files = (folder / marker,)
    return Found(str(folder / marker), pictures, _numbers(labels), labels=labels, files=files, split=split)


def _from_h5(path: Path, index: int) -> Image.Image:
    import h5py

    with h5py.File(path) as file:  # opened each time: a process cannot hand an open file to another
        return Image.fromarray(file["x"][index]).convert("RGB")


@LAYOUTS.register("fer2013_csv")
def fer2013(folder: Path, card: Card) -> Found | str:
    """fer2013.csv or icml_face_data.csv, in the folder or fer2013/: the rows for PrivateTest (3,589 faces).

    torchvision's class takes the rows for PublicTest too, on which models were chosen in the competition: the
    validation split here.
    """
    split = card.part or "test"
    usage = FER2013_USAGES[split]
    names = [f"{below}{name}" for below in ("", "fer2013/") for name in ("fer2013.csv", "icml_face_data.csv")]
    path = next((folder / name for name in names if (folder / name).is_file()), None)
    if path is None:
        return "fer2013.csv"
    # As the file counts them; the card's order is that of the class folders.
    names = ("angry", "disgust", "fear", "happy", "sad", "surprise", "neutral")
    order = {str(number): card.folders.index(name) for number, name in enumerate(names)}
    rows = [row for row in Delimited(path, read_content(path)).rows(skip_spaces=True) if row["Usage"] == usage]
    if not rows and card.part:
        return f"rows whose Usage is {usage} in {path.name}"
    if not rows:
        raise ValueError(f"{path} has no row whose Usage is PrivateTest")
    if bad := [row["emotion"] for row in rows if row["emotion"] not in order]:
        raise ValueError(f"{path}: {len(bad)} labels are none of the {len(names)} classes; the first: {bad[0]!r}")
    pixels = [np.array(row["pixels"].split(), np.uint8).reshape(48, 48) for row in rows]
    return _from_pixels(path, np.stack(pixels), [order[row["emotion"]] for row in rows], split)


@LAYOUTS.register("cub_lists")
def cub(folder: Path, card: Card) -> Found | str:
    """CUB_200_2011/{images,classes,image_class_labels,train_test_split}.txt and images/CLASS/*.jpg."""
    root = next((p for p in (folder, folder / "CUB_200_2011") if (p / "train_test_split.txt").is_file()), None)
    if root is None:
        return "CUB_200_2011/train_test_split.txt"
    split = card.part or "test"
    if split not in CUB_FLAGS:
        return _no_split(split, CUB_FLAGS)
    path, label, train, names = (
        dict(line.split(maxsplit=1) for line in read_lines(root / f"{name}.txt") if line.strip())
        for name in ("images", "image_class_labels", "train_test_split", "classes")
    )
    chosen = [number for number in path if train[number].strip() == CUB_FLAGS[split]]
    paths = [root / "images" / path[number].strip() for number in chosen]
    labels = [int(label[number]) - 1 for number in chosen]
    ordered = [names[number] for number in sorted(names, key=int)]  # labels count them, whatever order they stand in
    return _from_files(str(root), root, paths, labels, [spoken(name.strip()) for name in ordered], split=split)


@LAYOUTS.register("hateful_memes_jsonl")
def hateful_memes(folder: Path, card: Card) -> Found | str:
    """dev.jsonl or dev_seen.jsonl (id, img, label) and img/*.png, in the folder or data/. For training, train.jsonl."""
    split = card.part or "dev"
    files = {"dev": ("dev.jsonl", "dev_seen.jsonl"), "train": ("train.jsonl",)}
    names = [f"{below}{name}" for below in ("", "data/") for name in files.get(split, ())]
    path = next((folder / name for name in names if (folder / name).is_file()), None)
    if path is None:
        return names[0] if names else _no_split(split, files)
    rows = list(read_records(path))
    if bare := [row for row in rows if row.get("label") is None]:
        raise ValueError(f"{path}: {len(bare)} of {len(rows)} pictures have no label; the first: {bare[0].get('img')}")
    paths = [path.parent / row["img"] for row in rows]
    return _from_files(str(path), path.parent, paths, [row["label"] for row in rows], (), split=split)


@LAYOUTS.register("objectnet_mappings")
def objectnet(folder: Path, card: Card) -> Found | str:
    """objectnet-1.0/{images,mappings}: the folders of the 113 classes that ImageNet has too, without the red border."""
    root = next((p for p in (folder, folder / "objectnet-1.0") if (p / "mappings").is_dir()), None)
    if root is None:
        return "objectnet-1.0/mappings"
    labels, shared = (
        read_json(root / "mappings" / name)
        for name in ("folder_to_objectnet_label.json", "objectnet_to_imagenet_1k.json")
    )
    classes = sorted(name for name, label in labels.items() if label in shared)
    found = [(path, i) for i, name in enumerate(classes) for path in _pictures_in(root / "images" / name)]
    paths = [path for path, _ in found]
    if not paths:
        raise ValueError(f"{root} has no pictures of the {len(classes)} classes that ImageNet has too")
    return Found(
        where=str(root),
        pictures=Pictures(len(paths), partial(_without_border, paths)),
        keys=[str(path.relative_to(root)) for path in paths],
        labels=[label for _, label in found],
        classnames=tuple(labels[name].lower() for name in classes),
        files=tuple(paths),
    )


def _pictures_in(folder: Path) -> list[Path]:
    return pictures_below(folder) if folder.is_dir() else []


def _without_border(paths: Sequence[Path], index: int) -> Image.Image:
    picture = from_file(paths, index)
    width, height = picture.size
    return picture.crop((OBJECTNET_BORDER, OBJECTNET_BORDER, width - OBJECTNET_BORDER, height - OBJECTNET_BORDER))


def _from_pixels(path: Path, pixels: np.ndarray, labels: list[int], split: str) -> Found:
    if len(pixels) != len(labels):
        raise ValueError(f"{path} holds {len(pixels)} images, the file beside it {len(labels)} labels")
    pictures = Pictures(len(labels), partial(from_array, pixels))
    return Found(str(path), pictures, _numbers(labels), labels=labels, files=(path,), split=split)


def _numbers(labels: Sequence) -> list[str]:
    return [str(i) for i in range(len(labels))]
