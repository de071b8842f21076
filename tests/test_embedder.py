"""The embedder against the model called for one input at a time; the index against a sort of all dot products."""

import argparse
import copy
import importlib.util
import os
import subprocess
import sys
import weakref
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.functional import normalize

from ssmclip import Embedder, files, save_model
from ssmclip.cli import embed, search
from ssmclip.data.images import BadImage
from ssmclip.evaluate.search import index as index_module
from ssmclip.evaluate.search.index import build_index, made_by, nearest, read_index
from ssmclip.models.clip import image_transform

COLOURS = ["red", "green", "blue", "white", "black", "orange", "cyan"]


@pytest.fixture
def embedder(tiny_clip) -> Embedder:
    return Embedder(tiny_clip, batch_size=3)


@pytest.fixture
def folder(tmp_path):
    """Seven pictures at two depths, a file that is no picture, half a picture, and an empty one."""
    pictures = tmp_path / "pictures"
    (pictures / "deep").mkdir(parents=True)
    for i, colour in enumerate(COLOURS):
        where = pictures if i % 2 else pictures / "deep"
        Image.effect_noise((40 + i, 50), 90).convert("RGB").save(where / f"{colour}.png")
    (pictures / "notes.txt").write_text("no picture")
    (pictures / "empty.jpg").write_bytes(b"")
    (pictures / "half.PNG").write_bytes((pictures / "green.png").read_bytes()[:300])
    return pictures


def one_by_one(clip, images):
    model, preprocess, _ = clip
    with torch.no_grad():
        inputs = [x if isinstance(x, torch.Tensor) else preprocess(x) for x in images]
        return torch.cat([normalize(model.encode_image(x[None]), dim=-1) for x in inputs])


def noise(seed, height, width):
    return torch.randn(3, height, width, generator=torch.Generator().manual_seed(seed))


def test_mixed_shapes_keep_their_order_and_equal_one_by_one(tiny_clip, embedder):
    shapes = [(32, 32), (48, 32), (32, 32), (40, 56), (48, 32), (32, 32), (32, 32), (32, 32)]
    images = [noise(i, *shape) for i, shape in enumerate(shapes)]
    images[2] = Image.fromarray(np.random.default_rng(0).integers(0, 255, (70, 50, 3), dtype=np.uint8))
    together = embedder.encode_images(images)
    assert together.dtype == torch.float32
    torch.testing.assert_close(together, one_by_one(tiny_clip, images), rtol=0, atol=1e-5)


def test_a_path_a_picture_and_a_tensor_are_the_same_image(tiny_clip, embedder, folder):
    path = folder / "green.png"
    picture = Image.open(path)
    found = embedder.encode_images([path, str(path), picture, tiny_clip[1](picture)])
    torch.testing.assert_close(found, found[:1].expand(4, -1), rtol=0, atol=1e-6)


def transparent(size):
    """Opaque noise in the middle, around it black that cannot be seen."""
    picture = Image.new("RGBA", size, (0, 0, 0, 0))
    picture.paste(Image.effect_noise((size[0] // 2, size[1] // 2), 90).convert("RGBA"), (10, 10))
    return picture


def grey16(size):
    values = np.random.default_rng(0).integers(0, 65536, size[::-1], dtype=np.uint16)
    return Image.fromarray(values)


def palette(size):
    return transparent(size).quantize(16)


@pytest.mark.parametrize("make", [transparent, grey16, palette])
def test_a_picture_of_any_mode_is_what_its_file_is(make, tiny_clip, embedder, tmp_path):
    picture = make((60, 50))
    picture.save(tmp_path / "a.png")
    opened, given = embedder.encode_images([tmp_path / "a.png", Image.open(tmp_path / "a.png")])
    torch.testing.assert_close(given, opened, rtol=0, atol=1e-6)
    torch.testing.assert_close(embedder.encode_images(picture)[0], opened, rtol=0, atol=1e-6)
    if make is transparent:  # laid over white by hand
        pixels = np.asarray(picture)
        laid = np.where(pixels[..., 3:] == 255, pixels[..., :3], 255).astype(np.uint8)
        torch.testing.assert_close(one_by_one(tiny_clip, [Image.fromarray(laid)])[0], given, rtol=0, atol=1e-5)


def test_what_can_be_gone_through_once_is_gone_through_once(embedder):
    images = [noise(i, 32, 32 + 8 * (i % 2)) for i in range(5)]
    texts = ["a dog", "a", "two cats", "a"]
    assert torch.equal(embedder.encode_images(x for x in images), embedder.encode_images(images))
    assert torch.equal(embedder.encode_images(torch.stack(images[::2])), embedder.encode_images(images[::2]))
    assert torch.equal(embedder.encode_texts(text for text in texts), embedder.encode_texts(texts))
    with pytest.raises(ValueError, match="no images"):
        embedder.encode_images(iter([]))
    with pytest.raises(ValueError, match="no texts"):
        embedder.encode_texts(iter([]))


@pytest.mark.usefixtures("untyped")
@pytest.mark.parametrize(
    ("images", "error", "says"),
    [
        (
            torch.zeros(3, 32, 32, dtype=torch.uint8),
            ValueError,
            r"\(3, 32, 32\) of torch\.uint8\); pass raw pixels as a PIL",
        ),
        (torch.zeros(1, 32, 32), ValueError, r"got \(1, 32, 32\) of torch\.float32"),
        (torch.zeros(32, 32, 3), ValueError, r"got \(32, 32, 3\)"),
        (torch.zeros(32, 32), ValueError, r"got \(32,\)"),
        (
            np.zeros((32, 32, 3), np.uint8),
            TypeError,
            r"a path, a PIL image or a tensor .* \(got ndarray\); PIL.Image.fromarray",
        ),
        ([np.zeros((32, 32, 3), np.uint8)], TypeError, "got ndarray"),
        ([b"png"], TypeError, "got bytes"),
        (None, TypeError, "got NoneType"),
    ],
)
def test_what_is_no_image_is_named(images, error, says, embedder):
    with pytest.raises(error, match=says):
        embedder.encode_images(images)


def test_texts_keep_their_order_and_equal_one_by_one(tiny_clip, embedder):
    model, _, tokenizer = tiny_clip
    texts = ["a long text about a dog on a beach", "a", "a dog", "a", "cats", "", "two dogs and a cat"]
    found = embedder.encode_texts(texts)
    with torch.no_grad():
        each = torch.cat([normalize(model.encode_text(tokenizer([text])), dim=-1) for text in texts])
    torch.testing.assert_close(found, each, rtol=0, atol=1e-5)
    assert torch.equal(embedder.encode_texts("cats"), embedder.encode_texts(["cats"]))


def test_threads_get_what_they_would_alone(embedder):
    work = [[noise(10 * i + j, 32 + 8 * (j % 2), 32) for j in range(5)] for i in range(6)]
    alone = [embedder.encode_images(images) for images in work]
    texts = embedder.encode_texts(["a dog", "b"])
    with ThreadPoolExecutor(6) as pool:
        both = [pool.submit(embedder.encode_texts, ["a dog", "b"]) for _ in range(3)]
        together = list(pool.map(embedder.encode_images, work))
        assert all(torch.equal(future.result(), texts) for future in both)
    for a, b in zip(alone, together, strict=True):
        assert torch.equal(a, b)


def test_half_precision_gives_float32_vectors_near_the_others(tiny_clip, embedder):
    images = [noise(i, 32, 32) for i in range(3)]
    full = embedder.encode_images(images)
    half = Embedder(tiny_clip, dtype=torch.bfloat16).encode_images(images)
    assert half.dtype == torch.float32
    assert not torch.equal(half, full)
    torch.testing.assert_close(half, full, rtol=0, atol=0.05)


def test_bad_input_is_named(embedder, tiny_clip, tmp_path):
    with pytest.raises(ValueError, match="no images"):
        embedder.encode_images([])
    with pytest.raises(ValueError, match="no texts"):
        embedder.encode_texts([])
    for images in ([tmp_path / "none.png"], tmp_path / "none.png", str(tmp_path / "none.png")):
        with pytest.raises(BadImage, match=r"missing image file.*none\.png"):
            embedder.encode_images(images)
    assert torch.equal(embedder.encode_images(torch.ones(3, 32, 32)), embedder.encode_images([torch.ones(3, 32, 32)]))
    with pytest.raises(ValueError, match=r"\(3, height, width\) \(got \(1, 3, 32, 32\)"):
        embedder.encode_images([torch.zeros(1, 3, 32, 32)])
    with pytest.raises(ValueError, match="1 of 1 image embeddings are not finite"):
        embedder.encode_images([torch.full((3, 32, 32), torch.nan)])
    with pytest.raises(ValueError, match=r"batch_size must be at least 1 \(got 0\)"):
        Embedder(tiny_clip, batch_size=0)
    with pytest.raises(ValueError, match="floating-point type"):
        Embedder(tiny_clip, dtype=torch.int8)


def test_an_index_holds_every_picture_that_can_be_read(embedder, folder, tmp_path):
    index = build_index(folder, embedder, tmp_path / "index.parquet")
    wanted = sorted(f"{'' if i % 2 else 'deep/'}{colour}.png" for i, colour in enumerate(COLOURS))
    assert index.paths == wanted
    assert set(index.about["unreadable"]) == {"empty.jpg", "half.PNG"}
    each = torch.stack([embedder.encode_images([folder / path])[0] for path in wanted])
    np.testing.assert_allclose(index.vectors, each, atol=1e-5)
    assert [p.name for p in tmp_path.iterdir() if "index" in p.name] == ["index.parquet"]


@pytest.mark.parametrize("mode", ["shortest", "longest"])
def test_thin_pictures_are_listed_and_do_not_end_an_index(tiny_clip, folder, tmp_path, mode):
    """Resized to a model's size, 1 x 2,000,000 pixels would become 32 x 64,000,000, and at 900 : 1 no pixels at all."""
    model, _, tokenizer = tiny_clip
    transform = image_transform(32, mean=[0.5] * 3, std=[0.5] * 3, resize_mode=mode)
    embedder = Embedder((model, transform, tokenizer), batch_size=3)
    Image.new("RGB", (1, 2_000_000)).save(folder / "thin.png")
    Image.new("RGB", (900, 1)).save(folder / "line.png")
    index = build_index(folder, embedder, tmp_path / "index.parquet")
    assert "thin.png" in index.about["unreadable"]
    assert "got 1 x 2000000" in index.about["unreadable"]["thin.png"]
    assert ("line.png" in index.paths) == (mode == "shortest")
    assert set(COLOURS) <= {path.split("/")[-1].removesuffix(".png") for path in index.paths}
    with Image.open(folder / "thin.png") as thin, pytest.raises(BadImage, match="image too thin"):
        embedder.encode_images(thin)


WRITES = """
import sys
from pathlib import Path
from ssmclip.files import locked
with locked(Path(sys.argv[1]), "two holders"):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_two_processes_do_not_write_one_index(embedder, folder, tmp_path, monkeypatch):
    """The one that ended first removed the parts that the other was writing."""
    out, parts = tmp_path / "index.parquet", tmp_path / "index.parquet.parts"
    monkeypatch.setattr(index_module, "PART", 2)
    _, _ = interrupt(embedder, monkeypatch, 4)
    with pytest.raises(KeyboardInterrupt):
        build_index(folder, embedder, out)
    kept = sorted(path.name for path in parts.iterdir())
    assert len(kept) == 2
    lock = tmp_path / ".index.parquet.lock"
    command = [sys.executable, "-c", WRITES, str(lock)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(FileExistsError, match=r"another process is writing .*index\.parquet: wait"):
            build_index(folder, embedder, out)
        assert sorted(path.name for path in parts.iterdir()) == kept
        other.kill()
    monkeypatch.undo()
    assert len(build_index(folder, embedder, out).paths) == len(COLOURS)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["index.parquet", "pictures"]


def test_a_lock_that_was_removed_while_it_was_opened_is_taken_again(tmp_path, monkeypatch):
    """Between opening and locking, its holder may end and remove it: the next process would lock another file."""
    path, lock, attempts = tmp_path / "lock", files._lock, []

    def removed_first(file):
        attempts.append(file)
        if len(attempts) == 1:
            path.unlink()
        return lock(file)

    monkeypatch.setattr(files, "_lock", removed_first)
    with files.locked(path, "two holders", remove=True):
        assert path.exists()
    assert (len(attempts), path.exists()) == (2, False)


@pytest.mark.parametrize("name", ["half.PNG", "empty.jpg", "gone.png"])
def test_a_picture_that_cannot_be_read_is_named_once(embedder, folder, name):
    with pytest.raises(BadImage) as caught:
        embedder.encode_images([folder / "green.png", str(folder / name)])
    assert str(caught.value).count(name) == 1


def interrupt(embedder, monkeypatch, after):
    """From now on the embedder is stopped once it was given so many pictures; returns (as it was, those given)."""
    encode, given = embedder.encode_images, []

    def interrupted(images):
        if len(given) == after:
            raise KeyboardInterrupt
        given.extend(images)
        return encode(images)

    monkeypatch.setattr(embedder, "encode_images", interrupted)
    return encode, given


def test_an_interrupted_index_goes_on_where_it_was(embedder, folder, tmp_path, monkeypatch):
    whole = build_index(folder, embedder, tmp_path / "whole.parquet")
    monkeypatch.setattr(index_module, "PART", 2)
    encode, opened = interrupt(embedder, monkeypatch, 4)
    with pytest.raises(KeyboardInterrupt):
        build_index(folder, embedder, tmp_path / "index.parquet")
    before = len(opened)
    monkeypatch.setattr(embedder, "encode_images", lambda images: opened.extend(images) or encode(images))
    again = build_index(folder, embedder, tmp_path / "index.parquet")
    assert (before, len(opened)) == (4, len(COLOURS))
    assert again.paths == whole.paths
    np.testing.assert_allclose(again.vectors, whole.vectors, atol=1e-5)


def test_a_picture_replaced_between_two_runs_is_embedded_anew(embedder, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(index_module, "PART", 2)
    encode, _ = interrupt(embedder, monkeypatch, 4)
    with pytest.raises(KeyboardInterrupt):
        build_index(folder, embedder, tmp_path / "index.parquet")
    monkeypatch.setattr(embedder, "encode_images", encode)
    replaced, mended = folder / "deep" / "red.png", folder / "empty.jpg"
    Image.effect_noise((30, 30), 90).convert("RGB").save(replaced)
    Image.effect_noise((30, 30), 90).convert("RGB").save(mended)
    index = build_index(folder, embedder, tmp_path / "index.parquet")
    assert set(index.about["unreadable"]) == {"half.PNG"}
    for file in (replaced, mended):
        vector = index.vectors[index.paths.index(file.relative_to(folder).as_posix())]
        np.testing.assert_allclose(vector, encode(file)[0], atol=1e-5)


def test_a_folder_without_one_good_picture_leaves_nothing_behind(embedder, tmp_path):
    picture = tmp_path / "pictures" / "a.png"
    picture.parent.mkdir()
    picture.write_bytes(b"x")
    with pytest.raises(ValueError, match="none of the 1 images"):
        build_index(picture.parent, embedder, tmp_path / "i")
    assert [path.name for path in tmp_path.iterdir()] == ["pictures"]
    Image.new("RGB", (40, 40), "red").save(picture)
    assert build_index(picture.parent, embedder, tmp_path / "i").paths == ["a.png"]


def test_names_that_are_not_utf8_are_named_and_left_out(embedder, folder, tmp_path):
    odd = os.fsdecode(b"caf\xe9.png")
    try:
        Image.new("RGB", (40, 40), "red").save(folder / odd)
    except OSError:
        pytest.skip("this file system takes UTF-8 names alone")
    index = build_index(folder, embedder, tmp_path / "index.parquet")
    assert len(index.paths) == len(COLOURS)
    assert index.about["unreadable"]["caf\\xe9.png"] == "the name is not UTF-8"
    alone = tmp_path / "alone"
    alone.mkdir()
    (folder / odd).rename(alone / odd)
    with pytest.raises(ValueError, match=r"none of the 1 images .* caf\\xe9\.png \(the name is not UTF-8"):
        build_index(alone, embedder, tmp_path / "i")


def test_no_batch_of_pictures_is_held_at_full_size(embedder, folder, tmp_path, monkeypatch):
    opened, alive = [], []

    def open_image(path):
        picture = index_module_open(path)
        opened.append(weakref.ref(picture))
        alive.append(sum(one() is not None for one in opened))
        return picture

    index_module_open = index_module.open_image
    monkeypatch.setattr(index_module, "open_image", open_image)
    build_index(folder, embedder, tmp_path / "index.parquet")
    assert len(alive) == len(COLOURS)
    assert max(alive) == 1


@pytest.mark.parametrize("library", ["faiss", "numpy"])
def test_the_nearest_are_the_largest_dot_products(library, monkeypatch):
    if library == "numpy":
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    else:
        pytest.importorskip("faiss")
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(200, 24)).astype(np.float32)
    queries = rng.normal(size=(3, 24)).astype(np.float32)
    scores, places = nearest(vectors, queries, 7)
    exact = queries.astype(np.float64) @ vectors.T.astype(np.float64)
    order = np.argsort(-exact, axis=1)[:, :7]
    assert np.array_equal(places, order)
    np.testing.assert_allclose(scores, np.take_along_axis(exact, order, axis=1), rtol=1e-5)
    assert nearest(vectors[:2], queries, 5)[1].shape == (3, 2)
    with pytest.raises(ValueError, match=r"k must be at least 1 \(got 0\)"):
        nearest(vectors, queries, 0)
    with pytest.raises(ValueError, match=r"must have 24 dimensions, like the index \(got 23\)"):
        nearest(vectors, queries[:, 1:], 1)


def run(command, *words):
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return command.run(parser.parse_args([str(word) for word in words]))


def test_embed_then_search(tiny_clip, tiny_config, folder, tmp_path, capsys):
    model = tmp_path / "model"
    save_model(tiny_clip[0], tiny_config, model)
    out = tmp_path / "index.parquet"
    assert run(embed, folder, "--model", model, "--out", out) == 0
    said = capsys.readouterr().out
    assert "2 images could not be read" in said
    assert "empty.jpg: broken image" in said
    assert f"7 images in {out}" in said
    assert run(search, "a dog", out, "-k", 3) == 0
    lines = [line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines()]
    index, text = read_index(out), Embedder(tiny_clip).encode_texts(["a dog"]).numpy()
    best = np.argsort(-(text @ index.vectors.T)[0])[:3]
    assert [path for _, path in lines] == [str(folder / index.paths[i]) for i in best]
    assert [float(score) for score, _ in lines] == pytest.approx((text @ index.vectors.T)[0][best], abs=1e-4)
    with torch.no_grad():
        next(tiny_clip[0].parameters()).add_(1)
    save_model(tiny_clip[0], tiny_config, model)
    with pytest.raises(ValueError, match="does not have the weights"):
        run(search, "a dog", out)
    with pytest.raises(ValueError, match="the text is empty"):
        run(search, " ", out)


def test_what_is_no_index_or_folder_is_named(embedder, tmp_path):
    with pytest.raises(FileNotFoundError, match="index not found"):
        read_index(tmp_path / "none.parquet")
    (tmp_path / "text.parquet").write_text("no")
    with pytest.raises(ValueError, match="is not an index written by `ssmclip embed`"):
        read_index(tmp_path / "text.parquet")
    with pytest.raises(FileNotFoundError, match="folder not found"):
        build_index(tmp_path / "none", embedder, tmp_path / "i")
    with pytest.raises(ValueError, match="no images in"):
        build_index(tmp_path, embedder, tmp_path / "i")
    (tmp_path / "a.png").write_bytes(b"x")
    with pytest.raises(ValueError, match="none of the 1 images"):
        build_index(tmp_path, embedder, tmp_path / "i")


def test_an_index_is_searched_from_any_folder(tiny_clip, tiny_config, folder, tmp_path, capsys, monkeypatch):
    """The model's path is kept whole, whatever it was called from; picture names go to a terminal of any encoding."""
    (folder / "Hündin – 犬.png").write_bytes((folder / "green.png").read_bytes())
    (folder / ".hidden").mkdir()
    (folder / ".hidden/x.png").write_bytes((folder / "green.png").read_bytes())
    (folder / "._green.png").write_bytes(b"\0\5\x16\7")
    save_model(tiny_clip[0], tiny_config, tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    assert run(embed, "pictures", "--model", "model", "--out", "index.parquet") == 0
    index = read_index("index.parquet")
    assert index.about["model"] == str(tmp_path / "model")
    assert len(index.paths) == 8
    assert not any("hidden" in path or "._" in path for path in [*index.paths, *index.about["unreadable"]])
    (tmp_path / "elsewhere").mkdir()
    command = [sys.executable, "-m", "ssmclip", "search", "a dog", str(tmp_path / "index.parquet"), "-k", "8"]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(
        command, env=environment, cwd=tmp_path / "elsewhere", capture_output=True, text=True, check=False
    )
    assert (done.returncode, len(done.stdout.splitlines())) == (0, 8), done.stderr
    assert r"H\xfcndin \u2013 \u72ac.png" in done.stdout


def test_an_index_belongs_to_a_preprocessing_and_to_settings(tiny_clip, folder, tmp_path):
    model, preprocess, tokenizer = tiny_clip
    index = build_index(folder, Embedder(tiny_clip), tmp_path / "i.parquet")
    assert made_by(index, Embedder(tiny_clip))
    assert not made_by(index, Embedder((model, lambda picture: 2 * preprocess(picture), tokenizer)))
    other = copy.deepcopy(model)
    other.transformer.resblocks[0].attn.num_heads = 1
    assert not made_by(index, Embedder((other, preprocess, tokenizer)))
    earlier = {key: value for key, value in index.about.items() if key != "made_by"}  # as older versions wrote it
    assert made_by(replace(index, about=earlier), Embedder(tiny_clip))
    with torch.no_grad():
        next(other.parameters()).add_(1)
    assert not made_by(replace(index, about=earlier), Embedder((other, preprocess, tokenizer)))
