"""DataCompDR's shards: a teacher's features belong to the views and captions that are drawn; bad data are counted."""

import gzip
import io
import json
import pickle
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import InterpolationMode
from torchvision.transforms.autoaugment import RandAugment, _apply_op

from pair_files import assert_continues, captions_of, opened, take, write_tar
from ssmclip.data.pairs.augment import train_transform
from ssmclip.data.pairs.loader import Weighted
from ssmclip.data.pairs.reinforced import OPERATIONS, read_augmentation

VIEWS, WRITTEN, SYNTHETIC, WIDTH = 3, 1, 2, 4
CROPS = [[2, 3, 8, 8], [0, 0, 8, 8], [5, 10, 8, 8]]  # of the size they are trained at: exact, whatever resizes
DRAWS = [[crop, [[6, 0.3], [11, 100.0]]] for crop in CROPS]


def picture(number: int) -> np.ndarray:
    return np.random.default_rng(number).integers(0, 256, (30, 40, 3), dtype=np.uint8)


def features(number: int, what: int, count: int) -> np.ndarray:
    """Rows that say the sample's number, what they are of (0: views, 1: captions) and their own number."""
    return np.array([[number, what, i, 0.5] for i in range(count)], dtype=np.float32)


def as_npz(arrays) -> bytes:
    out = io.BytesIO()
    np.savez(out, **arrays)
    return out.getvalue()


def as_pth_gz(arrays) -> bytes:
    out = io.BytesIO()
    torch.save({name: torch.from_numpy(array).bfloat16() for name, array in arrays.items()}, out)
    return gzip.compress(out.getvalue())


def reinforced(number: int, form: str = "npz", **changes) -> dict[str, bytes]:
    """One sample as apple/DataCompDR-12M has it, joined with its image and caption."""
    arrays = {"image_emb": features(number, 0, VIEWS), "text_emb": features(number, 1, WRITTEN + SYNTHETIC)}
    if form == "apart":
        arrays["syn_text_emb"], arrays["text_emb"] = arrays["text_emb"][WRITTEN:], arrays["text_emb"][:WRITTEN]
    out = io.BytesIO()
    Image.fromarray(picture(number)).save(out, "PNG")
    draws = json.dumps(DRAWS) if form == "apart" else DRAWS  # a text, as the hub's viewer has it
    files = {
        "png": out.getvalue(),
        "txt": f"{number} 0".encode(),
        "json": b'{"uid": "x"}',
        "syn.json": json.dumps({"syn_text": [f"{number} 1", f"{number} 2"]}).encode(),
        "paug.json": json.dumps({"param_aug": draws}).encode(),
    }
    files["pth.gz" if form == "pth.gz" else "npz"] = as_pth_gz(arrays) if form == "pth.gz" else as_npz(arrays)
    files |= changes.pop("files", {})
    return {f"{number:04d}.{suffix}": data for suffix, data in files.items() if data is not None}


def shard(path, count=6, form="npz", **more):
    return write_tar(path, {k: v for n in range(count) for k, v in reinforced(n, form).items()} | more)


@pytest.mark.parametrize("form", ["npz", "apart", "pth.gz"])
@pytest.mark.parametrize("workers", [0, 2])
def test_features_are_those_of_the_views_and_captions_drawn(tmp_path, form, workers):
    source = shard(tmp_path / "a.tar", form=form)
    loader = opened(
        source, 4, workers=workers, stored_teacher=True, views_per_image=2, captions_per_image=2, cache_mib=0
    )
    transform = train_transform(8, (0.5,) * 3, (0.25,) * 3)
    views, texts = Counter(), Counter()
    for batch in take(loader, 60):
        numbers = np.repeat([int(key) for key in batch.keys], 2)
        assert batch.teacher.images.dtype == batch.teacher.texts.dtype == torch.float32
        for caption, row in zip(captions_of(batch), batch.teacher.texts.tolist(), strict=True):
            assert row[:3] == [int(caption[0]), 1, int(caption[2])]
            texts[caption[2]] += 1
        for number, image, row in zip(numbers, batch.images, batch.teacher.images.tolist(), strict=True):
            assert row[:2] == [number, 0]
            crop = torch.from_numpy(picture(number)).permute(2, 0, 1)
            top, left, height, width = CROPS[int(row[2])]
            seen = crop[:, top : top + height, left : left + width]
            for name, magnitude in (("Brightness", 0.3), ("Solarize", 100.0)):
                seen = _apply_op(seen, name, magnitude, InterpolationMode.NEAREST, None)
            assert torch.equal(image, transform.normalise([seen])[0])
            views[int(row[2])] += 1
    assert set(views) == {0, 1, 2}
    assert set(texts) == {"0", "1", "2"}
    loader.close()


@pytest.mark.parametrize("crop", [[2, 3, 20, 25], [0, 0, 30, 40], [5, 10, 12, 12], [1, 2, 5, 6]])
def test_a_crop_is_resized_as_pillow_does(crop):
    """To within 1."""
    made = train_transform((8, 12), (0.5,) * 3, (0.25,) * 3).repeated(picture(0), read_augmentation([crop]))
    top, left, height, width = crop
    cut = Image.fromarray(picture(0)[top : top + height, left : left + width])
    want = torch.from_numpy(np.array(cut.resize((12, 8), Image.Resampling.BICUBIC))).permute(2, 0, 1)
    assert (made.int() - want.int()).abs().max() <= 1


def test_captions_are_drawn_by_field_with_their_features(tmp_path):
    source = shard(tmp_path / "a.tar")
    loader = opened(source, 6, stored_teacher=True, caption_shares={"syn_text": 0.7, "txt": 0.3})
    counts = Counter()
    for batch in take(loader, 300):
        for caption, row in zip(captions_of(batch), batch.teacher.texts.tolist(), strict=True):
            assert int(caption[2]) == row[2]
            counts[caption[2]] += 1
    assert counts["0"] / 1800 == pytest.approx(0.3, abs=0.04)
    only = opened(source, 6, stored_teacher=True, caption_shares={"syn_text": 1.0})
    assert {caption[2] for batch in take(only, 20) for caption in captions_of(batch)} == {"1", "2"}
    with pytest.raises(ValueError, match=r"has features of the captions txt and syn_text only \(got title\)"):
        opened(source, stored_teacher=True, caption_shares={"title": 1.0})


def test_a_stream_with_a_teacher_continues(tmp_path):
    source = shard(tmp_path / "a.tar", 9)
    settings = {"stored_teacher": True, "sizes": ((8, 8), (8, 12)), "length_buckets": 2}
    assert_continues(lambda cursor: opened(source, 2, cursor=cursor, **settings))


def test_without_the_setting_nothing_is_read(tmp_path):
    batch = next(opened(shard(tmp_path / "a.tar"), 4))
    assert batch.teacher is None
    assert all(caption.endswith(" 0") for caption in captions_of(batch))


@pytest.mark.parametrize("name", OPERATIONS)
def test_operations_are_those_of_randaugment(name):
    """Of torchvision's tensors, but for sharpness and colour, which round elsewhere; of its pictures to within 1."""
    pixels = torch.from_numpy(picture(0)).permute(2, 0, 1)
    magnitudes, signed = RandAugment()._augmentation_space(31, (30, 40))[name]
    for magnitude in [float(magnitudes[i]) for i in (3, 9, 17)] if magnitudes.ndim else [0.0]:
        for sign in (1, -1) if signed else (1,):
            draws = [[0, 0, 30, 40], [[OPERATIONS.index(name), sign * magnitude]]]
            made = read_augmentation(draws).finish(pixels).int()
            want = _apply_op(pixels, name, sign * magnitude, InterpolationMode.NEAREST, None).int()
            assert (made - want).abs().max() <= (1 if name in ("Sharpness", "Color") else 0)
            if name not in ("ShearX", "ShearY", "Rotate"):  # between two neighbours pictures take the other
                original = _apply_op(
                    Image.fromarray(picture(0)), name, sign * magnitude, InterpolationMode.NEAREST, None
                )
                assert (made - torch.from_numpy(np.array(original)).permute(2, 0, 1).int()).abs().max() <= 1


def test_operations_are_numbered_as_dataset_reinforcement_numbers_them():
    assert list(RandAugment()._augmentation_space(31, (30, 40))) == OPERATIONS
    assert read_augmentation([None, True, None]).mirrored
    assert read_augmentation([None, []]).crop is None


def unpickled(*_):
    raise AssertionError("a file of a shard was executed")


class Hostile:
    def __reduce__(self):
        return unpickled, ()


def hostile_pth_gz() -> bytes:
    out = io.BytesIO()
    torch.save({"image_emb": Hostile()}, out, pickle_module=pickle)
    return gzip.compress(out.getvalue())


def hostile_npz() -> bytes:
    return as_npz({"image_emb": np.array([Hostile()], dtype=object), "text_emb": features(0, 1, 3)})


ARRAYS = {"image_emb": features(0, 0, 3), "text_emb": features(0, 1, 3)}


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({"npz": None}, "the features are missing: neither .npz nor .pth.gz is in the shard"),
        ({"npz": b"PK no archive"}, ".npz cannot be read"),
        ({"npz": as_npz(ARRAYS)[:-40]}, ".npz cannot be read"),
        ({"npz": as_npz({"image_emb": ARRAYS["image_emb"]})}, "text_emb is missing, only image_emb are there"),
        ({"npz": as_npz(ARRAYS | {"image_emb": features(0, 0, 2)})}, "image_emb must have a row for each of 3 augment"),
        ({"npz": as_npz(ARRAYS | {"text_emb": features(0, 0, 2)})}, "text_emb must have a row for each of 3 captions"),
        ({"npz": as_npz(ARRAYS | {"text_emb": np.full((3, 4), np.nan)})}, "text_emb must be finite numbers"),
        ({"npz": as_npz(ARRAYS | {"text_emb": np.zeros(3)})}, r"of shape (rows, features) (got (3,))"),
        ({"npz": as_npz(ARRAYS | {"text_emb": np.array(["a", "b", "c"])})}, "text_emb must be numbers"),
        ({"npz": hostile_npz()}, "image_emb" if False else "Object arrays cannot be loaded"),
        ({"npz": None, "pth.gz": hostile_pth_gz()}, ".pth.gz cannot be read"),
        ({"npz": None, "pth.gz": gzip.compress(b"nothing")}, ".pth.gz cannot be read"),
        ({"npz": None, "pth.gz": as_pth_gz(ARRAYS)[:-100]}, ".pth.gz cannot be read"),
        ({"npz": None, "pth.gz": gzip.compress(bytes(2**28 + 1), 1)}, "features must take at most 268,435,456 bytes"),
        ({"paug.json": None}, "paug.json is missing"),
        ({"paug.json": b"{"}, "Expecting property name"),
        ({"paug.json": b'{"param_aug": 3}'}, "paug.json must be {'param_aug': [[crop, operations], ...]}"),
        ({"paug.json": b'{"param_aug": [[[1, 2, 3]], [], []]}'}, "param_aug must be crops of 4 numbers and lists of"),
        ({"paug.json": b'{"param_aug": [[[1, 2, 3, 4], [[99, 0]]], [], []]}'}, "(got [[99, 0]])"),
        (
            {"paug.json": json.dumps({"param_aug": [[[0, 0, 31, 40]]] * 3}).encode()},
            "the crop must lie within the image of 30 x 40 pixels (got (0, 0, 31, 40))",
        ),
    ],
)
def test_teacher_data_that_cannot_be_used_are_counted_and_never_executed(tmp_path, files, said):
    bad = {name.replace("0000", "bad"): data for name, data in reinforced(0, files=files).items()}
    loader = opened(write_tar(tmp_path / "a.tar", reinforced(1) | bad), 1, stored_teacher=True)
    assert {key for batch in take(loader, 4) for key in batch.keys} == {"0001"}
    assert set(loader.skipped) == {"broken teacher data"}
    assert f"bad: {said}" in loader.skipped_examples["broken teacher data"][0] or said in str(loader.skipped_examples)


def test_stored_features_need_shards_and_our_transform(tmp_path):
    with pytest.raises(ValueError, match=r"read from shards alone \(got synthetic:quickstart\)"):
        opened("synthetic:quickstart", stored_teacher=True)
    with pytest.raises(ValueError, match=r"read from shards alone \(got .*a.csv\)"):
        opened([Weighted(str(tmp_path / "a.csv"), 1)], stored_teacher=True)
    with pytest.raises(ValueError, match="need a TrainTransform"):
        opened(shard(tmp_path / "a.tar"), stored_teacher=True, transform=lambda image, generator: torch.zeros(3, 8, 8))
