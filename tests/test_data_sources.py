"""Cards and the test sets they lead to. torchvision reads the same files, and must find the same in them."""

import gzip
import io
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torchvision
from open_clip import zero_shot_metadata
from PIL import Image

from ssmclip.data import synthetic
from ssmclip.data.images import BadImage
from ssmclip.data.testsets.card import LAYOUTS
from ssmclip.data.testsets.open import list_cards, load_card, open_dataset, read_card
from ssmclip.data.testsets.prompts import names_on, templates_on
from ssmclip.registry import UnknownName

CIFAR10 = load_card("cifar10")
FASHION = load_card("fashion_mnist")


@pytest.fixture
def draws() -> np.random.Generator:
    return np.random.default_rng(0)


def png(pixels: np.ndarray) -> bytes:
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG")
    return out.getvalue()


def write_tar(path: Path, files: dict[str, bytes]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def assert_same(dataset, reference) -> None:
    """Pictures and labels equal those of a torchvision data set."""
    assert len(dataset) == len(reference)
    for (picture, label), (expected, known) in zip((dataset[i] for i in range(len(dataset))), reference, strict=True):
        assert picture.mode == "RGB"
        assert (np.asarray(picture) == np.asarray(expected.convert("RGB"))).all()
        assert label == known


# ---- cards -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list_cards())
def test_every_card_is_complete(name):
    card = load_card(name)
    assert card.name == name
    assert all([card.title, card.citation, card.source, card.licence, card.metric, card.layouts])
    assert card.test_size > 0 or name == "vl_checklist"  # whose authors give no number of texts
    if card.kind == "classification":
        assert len(names_on(card)) > 1 or card.classes > 1
        assert templates_on(card)
        assert all(template.count("{}") == 1 for template in templates_on(card))


def test_cards_agree_with_what_they_describe():
    assert {"digits", "scenes", "cifar10", "fashion_mnist", "flickr8k"} <= set(list_cards())
    assert load_card("digits").classnames == synthetic.DIGIT_NAMES
    assert load_card("scenes").classnames == tuple(" ".join(pair) for pair in synthetic.HELD_OUT)
    assert list(FASHION.classnames) == torchvision.datasets.FashionMNIST.classes
    for ours, theirs in zip(templates_on(CIFAR10), zero_shot_metadata.SIMPLE_IMAGENET_TEMPLATES, strict=True):
        assert ours.replace("{}", "cat") == theirs("cat")


def test_unknown_names_and_keys_list_the_known():
    with pytest.raises(UnknownName, match=r"unknown data set 'cifar'; did you mean 'cifar10'\? known: .*cifar10, "):
        open_dataset("cifar", "anywhere")
    text = 'title="t"\ncitation="c"\nsource="s"\nlicence="l"\nkind="classification"\nmetric="top1"\ntest_size=1\n'
    with pytest.raises(ValueError, match=r"card x, line 10: unknown keys metrics, temples; known: .*templates"):
        read_card("x", text + 'layouts=[]\ntemples=["a"]\nmetrics=""')
    with pytest.raises(ValueError, match="card x: layouts must be given"):
        read_card("x", text)
    with pytest.raises(UnknownName, match="card x, line 8: unknown layout 'idx_file'; did you mean 'idx_files'"):
        read_card("x", text + 'layouts=["idx_file"]')
    with pytest.raises(ValueError, match=r"card x, line 9: class names that occur more than once: cat"):
        read_card("x", text + 'layouts=[]\nclassnames=["cat", "dog", "cat"]')
    with pytest.raises(ValueError, match="card x, line 5: kind 'regression', there are classification, retrieval"):
        read_card("x", text.replace("classification", "regression") + "layouts=[]")


def test_a_missing_set_lists_what_was_looked_for_and_where(tmp_path):
    with pytest.raises(FileNotFoundError) as caught:
        open_dataset("cifar10", tmp_path)
    for folder in (tmp_path, tmp_path / "cifar10"):
        for what in ("cifar-10-batches-py/test_batch", "test/0.tar", "test/CLASS/"):
            assert f"{folder}: {what}" in str(caught.value)


# ---- embedded --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "items"), [("digits", synthetic.digits), ("scenes", synthetic.scenes)])
def test_embedded_sets_need_no_files(name, items, tmp_path):
    dataset = open_dataset(name, tmp_path / "nowhere")
    expected = items("test")
    assert (dataset.n, dataset.expected, dataset.partial) == (len(expected), len(expected), False)
    assert dataset.keys == [item.key for item in expected]
    for number in (0, 17, len(expected) - 1):
        picture, label = dataset[number]
        assert picture.tobytes() == expected[number].draw(synthetic.NATIVE_SIZE).tobytes()
        assert any(dataset.classnames[label] in caption for caption in expected[number].captions)
    with pytest.raises(IndexError):
        dataset[len(expected)]


# ---- torchvision's formats -------------------------------------------------------------------------------------------


def write_cifar(root: Path, pixels: np.ndarray, labels: list[int], encode=str) -> Path:
    folder = root / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    rows = pixels.transpose(0, 3, 1, 2).reshape(len(pixels), -1)
    names = [encode(f"{i}.png") for i in range(len(labels))]
    batch = {encode("data"): rows, encode("labels"): labels, encode("filenames"): names}
    (folder / "test_batch").write_bytes(pickle.dumps(batch, protocol=2))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": list(CIFAR10.classnames)}, protocol=2))
    return folder / "test_batch"


@pytest.mark.parametrize("place", ["", "cifar10", "wds_cifar10"])
def test_cifar_is_what_torchvision_reads(tmp_path, draws, monkeypatch, place):
    pixels = draws.integers(0, 256, (30, 32, 32, 3), dtype=np.uint8)
    write_cifar(tmp_path / place, pixels, draws.integers(0, 10, 30).tolist())
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "_check_integrity", lambda self: True)
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *args: True)
    dataset = open_dataset("cifar10", tmp_path)
    assert_same(dataset, torchvision.datasets.CIFAR10(tmp_path / place, train=False))
    assert (dataset.n, dataset.expected, dataset.partial) == (30, 10000, True)
    assert dataset.keys[2] == "2.png"


def test_cifar_pickled_again_by_python_3(tmp_path, draws):
    pixels = draws.integers(0, 256, (5, 32, 32, 3), dtype=np.uint8)
    write_cifar(tmp_path, pixels, [0, 1, 2, 3, 4], encode=str.encode)
    dataset = open_dataset("cifar10", tmp_path)
    assert [(np.asarray(picture) == pixels[label]).all() for picture, label in (dataset[i] for i in range(5))] == [
        True
    ] * 5


class Hostile:
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


def test_a_hostile_pickle_is_refused_and_does_nothing(tmp_path):
    path = tmp_path / "cifar-10-batches-py" / "test_batch"
    path.parent.mkdir()
    path.write_bytes(pickle.dumps({"data": Hostile(tmp_path / "owned")}))
    with pytest.raises(ValueError, match=r"test_batch is not a CIFAR batch: .*only arrays are allowed"):
        open_dataset("cifar10", tmp_path)
    assert not (tmp_path / "owned").exists()
    pickle.loads(path.read_bytes())  # the attack itself works
    assert (tmp_path / "owned").exists()


@pytest.mark.parametrize("damage", ["cut", "labels", "text"])
def test_damaged_cifar_is_named(tmp_path, draws, damage):
    path = write_cifar(
        tmp_path, draws.integers(0, 256, (9, 32, 32, 3), dtype=np.uint8), [0] * (8 if damage == "labels" else 9)
    )
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:5000])
    if damage == "text":
        path.write_bytes(b"<html>")
    with pytest.raises(ValueError, match="test_batch is not a CIFAR batch"):
        open_dataset("cifar10", tmp_path)


def test_labels_without_a_class_are_named(tmp_path, draws):
    write_cifar(tmp_path, draws.integers(0, 256, (4, 32, 32, 3), dtype=np.uint8), [0, 9, 10, -1])
    with pytest.raises(ValueError, match=r"2 labels are outside the 10 classes; the first is 10 of 2\.png"):
        open_dataset("cifar10", tmp_path)


def idx(values: np.ndarray) -> bytes:
    return bytes([0, 0, 8, values.ndim]) + np.array(values.shape, ">u4").tobytes() + values.tobytes()


def write_fashion(root: Path, pixels: np.ndarray, labels: np.ndarray, zipped: bool) -> Path:
    raw = root / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    for name, values in (("images-idx3", pixels), ("labels-idx1", labels)):
        for prefix in ("t10k", "train"):
            path = raw / f"{prefix}-{name}-ubyte{'.gz' * zipped}"
            path.write_bytes(gzip.compress(idx(values)) if zipped else idx(values))
    return raw


@pytest.mark.parametrize("place", ["", "fashion_mnist", "fashion-mnist"])
@pytest.mark.parametrize("zipped", [False, True])
def test_fashion_mnist_is_what_torchvision_reads(tmp_path, draws, zipped, place):
    pixels = draws.integers(0, 256, (20, 28, 28), dtype=np.uint8)
    labels = draws.integers(0, 10, 20, dtype=np.uint8)
    write_fashion(tmp_path / place, pixels, labels, zipped)
    dataset = open_dataset("fashion_mnist", tmp_path)
    plain = write_fashion(tmp_path / "plain", pixels, labels, zipped=False).parents[
        1
    ]  # torchvision unzips only downloads
    assert_same(dataset, torchvision.datasets.FashionMNIST(plain, train=False))


@pytest.mark.parametrize("zipped", [False, True])
def test_damaged_idx_is_named(tmp_path, draws, zipped):
    raw = write_fashion(tmp_path, draws.integers(0, 256, (20, 28, 28), dtype=np.uint8), np.zeros(20, np.uint8), zipped)
    path = raw / f"t10k-images-idx3-ubyte{'.gz' * zipped}"
    path.write_bytes(path.read_bytes()[:-3000])
    with pytest.raises(
        ValueError, match=r"t10k-images.*( is damaged| should hold 15680 bytes of data and holds 12680)"
    ):
        open_dataset("fashion_mnist", tmp_path)


# ---- class folders ---------------------------------------------------------------------------------------------------


@pytest.fixture
def folders(tmp_path, draws) -> Path:
    """Two pictures in each of CIFAR-10's ten class folders."""
    for name in CIFAR10.classnames:
        folder = tmp_path / "cifar10" / "test" / name
        folder.mkdir(parents=True)
        for number in range(2):
            (folder / f"{number}.png").write_bytes(png(draws.integers(0, 256, (9, 8, 3), dtype=np.uint8)))
    return tmp_path / "cifar10" / "test"


def test_class_folders_are_what_torchvision_reads(folders):
    # torchvision numbers folders in alphabetical order, which CIFAR-10's classes are in.
    dataset = open_dataset("cifar10", folders.parents[1])
    assert_same(dataset, torchvision.datasets.ImageFolder(folders))
    assert dataset.keys[3] == "automobile/1.png"
    assert_same(open_dataset("cifar10", folders), torchvision.datasets.ImageFolder(folders))


def test_class_folders_take_their_label_from_the_card(folders):
    for path in sorted(folders.iterdir()):
        path.rename(folders / path.name.title().replace("Automobile", "AUTO-MOBILE"))
    (folders / "AUTO-MOBILE").rename(folders / "Automobile_")
    dataset = open_dataset("cifar10", folders.parents[1])
    for number, key in enumerate(dataset.keys):
        assert dataset.classnames[dataset[number][1]] == key.split("/")[0].lower().rstrip("_")


def test_class_folders_that_can_not_be_right_are_named(folders):
    root = folders.parents[1]
    (folders / "Cat").mkdir()
    (folders / "Cat" / "0.png").write_bytes((folders / "cat" / "0.png").read_bytes())
    with pytest.raises(ValueError, match="Cat and cat are the same class"):
        open_dataset("cifar10", root)
    (folders / "Cat").rename(folders / "lion")
    with pytest.raises(ValueError, match=r"folders that are no class: lion. Classes: airplane, "):
        open_dataset("cifar10", root)
    (folders / "lion" / "0.png").unlink()
    (folders / "lion").rmdir()
    for path in (folders / "dog").iterdir():
        path.unlink()
    with pytest.raises(ValueError, match=r"the class folder .*dog has no picture"):
        open_dataset("cifar10", root)


def test_a_picture_that_can_not_be_opened_is_named(folders):
    (folders / "cat" / "0.png").write_bytes(b"no picture")
    dataset = open_dataset("cifar10", folders.parents[1])
    with pytest.raises(BadImage, match=r"broken image: .*cat/0\.png"):
        dataset[dataset.keys.index("cat/0.png")]


# ---- CLIP_benchmark's shards -----------------------------------------------------------------------------------------


def write_benchmark(root: Path, pictures: np.ndarray, labels: list[int]) -> Path:
    """12 pictures in shards of 5, in the classification form."""
    for shard in range(0, len(labels), 5):
        files = {}
        for number in range(shard, min(shard + 5, len(labels))):
            files |= {f"s{number:04d}.cls": str(labels[number]).encode(), f"s{number:04d}.png": png(pictures[number])}
        write_tar(root / "test" / f"{shard // 5}.tar", files)
    (root / "test" / "nshards.txt").write_text(str(-(-len(labels) // 5)))
    (root / "classnames.txt").write_text("\n".join(CIFAR10.classnames).replace("automobile", "car"))
    (root / "zeroshot_classification_templates.txt").write_text("a photo of a {c}.\na {c}.\n")
    return root


@pytest.fixture
def benchmark_set(tmp_path, draws):
    pictures = draws.integers(0, 256, (12, 8, 10, 3), dtype=np.uint8)
    labels = draws.integers(0, 10, 12).tolist()
    return write_benchmark(tmp_path / "wds_cifar10", pictures, labels), pictures, labels


@pytest.mark.parametrize("place", ["..", "."])
def test_clip_benchmark_classification(benchmark_set, place):
    root, pictures, labels = benchmark_set
    dataset = open_dataset("cifar10", root / place)
    assert dataset.keys == [f"s{n:04d}" for n in range(12)]
    assert dataset.labels == labels
    assert all((np.asarray(dataset[n][0]) == pictures[n]).all() for n in range(12))
    assert dataset.classnames[:3] == ("airplane", "car", "bird")
    assert dataset.templates == ("a photo of a {}.", "a {}.")
    assert dataset.partial


def test_without_nshards_shards_are_in_numerical_order(tmp_path, draws):
    pictures = draws.integers(0, 256, (52, 4, 4, 3), dtype=np.uint8)
    root = write_benchmark(tmp_path, pictures, [n % 10 for n in range(52)])
    (root / "test" / "nshards.txt").unlink()
    assert open_dataset("cifar10", root).keys == [f"s{n:04d}" for n in range(52)]


def test_clip_benchmark_retrieval(tmp_path, draws):
    root = tmp_path / "flickr8k"
    files = {}
    for number in range(4):
        lines = [f"caption {c} of {number}" for c in range(number + 1)]
        picture = draws.integers(0, 256, (4, 4, 3), dtype=np.uint8)
        files |= {f"dir/{number}.jpg": png(picture), f"dir/{number}.txt": "\n".join(lines).encode() + b"\n"}
    write_tar(root / "test" / "0.tar", files)
    (root / "dataset_type.txt").write_text("retrieval\n")
    dataset = open_dataset("flickr8k", tmp_path)
    assert [len(captions) for captions in dataset.captions] == [1, 2, 3, 4]
    assert dataset.captions[2][1] == "caption 1 of 2"
    assert dataset[3].tobytes() == Image.open(io.BytesIO(files["dir/3.jpg"])).tobytes()
    assert dataset.keys == [f"dir/{n}" for n in range(4)]
    with pytest.raises(FileNotFoundError, match=r"dataset_type.txt says 'retrieval'"):
        open_dataset("cifar10", root)


def test_another_set_under_the_root_is_not_taken_for_this_one(benchmark_set):
    root, _, _ = benchmark_set
    with pytest.raises(ValueError, match=r"it is another data set"):
        open_dataset("fashion_mnist", root)
    (root / "classnames.txt").write_text("cat\ndog\n")
    with pytest.raises(ValueError, match=r"has 2 classes \(cat, dog \.\.\.\), cifar10 has 10"):
        open_dataset("cifar10", root)
    (root / "classnames.txt").write_text("\n".join([*CIFAR10.classnames[:9], "cat"]))
    with pytest.raises(ValueError, match=r"class names that occur more than once: cat"):
        open_dataset("cifar10", root)


def test_damaged_benchmark_shards_are_named(benchmark_set):
    root, pictures, _ = benchmark_set
    shard = root / "test" / "2.tar"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:700])
    with pytest.raises(ValueError, match=r"the shard .*2\.tar is damaged after \d samples"):
        open_dataset("cifar10", root)
    shard.unlink()
    with pytest.raises(FileNotFoundError, match=r"nshards\.txt says 3 shards, but 2\.tar is not there"):
        open_dataset("cifar10", root)
    write_tar(shard, {"x.png": png(pictures[0])})
    with pytest.raises(ValueError, match=r"x in .*2\.tar has no \.cls; it has \.png"):
        open_dataset("cifar10", root)
    write_tar(shard, {"x.png": png(pictures[0]), "x.cls": b"cat"})
    with pytest.raises(ValueError, match=r"the label of x in .*2\.tar is not a number: b'cat'"):
        open_dataset("cifar10", root)


# ---- real data -------------------------------------------------------------------------------------------------------


def test_real_sets(shared):
    root = shared / "data"
    sets = {name: open_dataset(name, root) for name in ("cifar10", "fashion_mnist", "flickr8k")}
    assert {name: (s.n, s.partial) for name, s in sets.items()} == {
        "cifar10": (1000, True),
        "fashion_mnist": (10000, False),
        "flickr8k": (1000, False),
    }
    assert {len(captions) for captions in sets["flickr8k"].captions} == {5}
    lines = (root / "captions/retrieval/flickr8k_test_karpathy.txt").read_text(encoding="utf-8").splitlines()
    first = next(line for line in lines if ".jpg" in line)
    assert first.startswith(f"{sets['flickr8k'].keys[0]}.jpg,{sets['flickr8k'].captions[0][0]}")
    assert set(sets["cifar10"].labels) == set(range(10))


def test_every_layout_is_used_by_some_card():
    assert {layout for name in list_cards() for layout in load_card(name).layouts} == set(LAYOUTS)
