"""Folders of pictures distorted by the command, and the published sets rebuilt from a folder made like ImageNet."""

import argparse
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from torchvision.transforms.functional import center_crop, resize

import ssmclip
from ssmclip import UnknownName
from ssmclip.cli import distort as command
from ssmclip.data.distortions.folder import folder_jobs, run_jobs
from ssmclip.data.distortions.pictures import crop, picture_seed
from ssmclip.data.distortions.registry import DISTORTIONS
from ssmclip.humans.rebuild import rebuild_jobs
from ssmclip.humans.stimuli import find_stimuli


def picture(path: Path, seed: int, size: tuple[int, int] = (90, 70)) -> np.ndarray:
    path.parent.mkdir(parents=True, exist_ok=True)
    coarse = np.random.default_rng(seed).integers(0, 256, (7, 9, 3), dtype=np.uint8)
    image = Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)
    image.save(path)
    return np.array(Image.open(path).convert("RGB"))


def run(*arguments: str | Path) -> int:
    """`ssmclip distort ARGUMENTS`, without the command line's handling of errors."""
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return command.run(parser.parse_args([str(argument) for argument in arguments]))


def test_a_folder(tmp_path, capsys):
    """Class folders are kept, what does not open is named, and a second run writes what is missing and no more."""
    folder, out = tmp_path / "in", tmp_path / "out"
    pixels = picture(folder / "cat/one.png", 0)
    picture(folder / "dog/deep/one.jpg", 1)
    picture(folder / "dog/deep/one.bmp", 2)
    (folder / "dog/broken.png").write_bytes(b"not a picture")
    (folder / "notes.txt").write_text("nor this")
    arguments = [folder, "--out", out, "--distortions", "high-pass,uniform-noise", "--size", "0"]
    assert run(*arguments) == 1
    printed = capsys.readouterr().out
    assert "48 written, 0 already there, 1 pictures unreadable" in printed
    assert "dog/broken.png: broken image" in printed
    files = sorted(path.relative_to(out).as_posix() for path in out.rglob("*.png"))
    levels = DISTORTIONS["high-pass"].levels
    names = ["cat/one.png", "dog/deep/one.bmp.png", "dog/deep/one.jpg.png"]
    assert [f for f in files if f.startswith("high")] == sorted(f"high-pass/{v}/{n}" for v in levels for n in names)
    written = np.array(Image.open(out / "high-pass/1.5/cat/one.png"))
    np.testing.assert_array_equal(written, ssmclip.distort(pixels, "high-pass", 1.5))

    noise = {path: path.read_bytes() for path in (out / "uniform-noise").rglob("*.png")}
    lost = out / "uniform-noise/0.1/cat/one.png"
    lost.unlink()
    kept = (out / "uniform-noise/0.2/cat/one.png").stat().st_mtime_ns
    run(*arguments)
    assert "1 written, 47 already there" in capsys.readouterr().out
    assert lost.read_bytes() == noise[lost]
    assert (out / "uniform-noise/0.2/cat/one.png").stat().st_mtime_ns == kept


def test_noise_differs_between_pictures_and_not_between_folders(tmp_path):
    for name in ("a", "b"):
        picture(tmp_path / f"in/{name}.png", 0)
    picture(tmp_path / "other/b.png", 0)
    jobs = folder_jobs(tmp_path / "in", tmp_path / "out", ["uniform-noise"], ["0.2"])
    jobs += folder_jobs(tmp_path / "other", tmp_path / "out2", ["uniform-noise"], ["0.2"])
    run_jobs(jobs)
    a, b, other = (np.array(Image.open(job.target)) for job in jobs)
    assert (a != b).mean() > 0.9
    np.testing.assert_array_equal(b, other)
    assert folder_jobs(tmp_path / "in", tmp_path / "out", ["uniform-noise"], ["0.2"], seed=1)[0].seed != jobs[0].seed


def test_the_crop_is_torchvisions():
    for size in ((500, 375), (60, 333), (224, 260)):
        image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8))
        np.testing.assert_array_equal(crop(image, 224), center_crop(resize(image, 256), 224))


@pytest.mark.parametrize(
    ("arguments", "error", "complaint"),
    [
        (["empty", "--out", "out"], FileNotFoundError, "no picture"),
        (["in", "--out", "in/out"], ValueError, "distorted again by the next run"),
        (["in", "--out", "out", "--distortions", "contrst"], UnknownName, "did you mean 'contrast'"),
        (["in", "--out", "out", "--distortions", "contrast", "--levels", "0.5,x"], ValueError, "one of c100"),
        (["in", "--out", "out", "--distortions", "contrast,power-equalisation"], ValueError, "needs amplitude"),
        (["--out", "out"], ValueError, "either a folder"),
        (["--out", "out", "--humans", "h.parquet"], ValueError, "both --humans"),
    ],
)
def test_folders_that_cannot_be(tmp_path, monkeypatch, arguments, error, complaint):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    picture(tmp_path / "in/a.png", 0)
    with pytest.raises(error, match=complaint):
        run(*arguments)
    assert not (tmp_path / "out").exists()


# ---- the published sets ----------------------------------------------------------------------------------------------


@pytest.fixture
def imagenet(tmp_path) -> Path:
    """Four images of three classes in ILSVRC2012's layout, one of them not a JPEG."""
    train = tmp_path / "imagenet/ILSVRC/Data/CLS-LOC/train"
    for seed, stem in enumerate(("n02690373_1", "n02690373_22", "n03662601_333")):
        picture(train / stem.split("_")[0] / f"{stem}.JPEG", seed, (300, 260))
    (train / "n03041632").mkdir()
    (train / "n03041632/n03041632_9.JPEG").write_bytes(b"\xff\xd8\xff cut")
    return tmp_path / "imagenet"


def humans(path: Path, key: str) -> Path:
    stimuli = [
        ("high-pass", "3.0", "boat", "n03662601_333"),
        ("high-pass", "0.4", "airplane", "n02690373_1"),
        ("high-pass", "inf", "airplane", "n02690373_1"),
        ("uniform-noise", "0.9", "airplane", "n02690373_22"),
        ("uniform-noise", "0.9", "knife", "n03041632_9"),
        ("rotation", "90", "knife", "n03041632_404"),
        ("edge", "0", "oven", "oven10"),
    ]
    rows = [
        {
            "dataset": dataset,
            "condition": condition,
            "category": category,
            key: f"0001_xx_s{observer:02}_{condition}_{category}_10_{image}.png"
            if key == "imagename"
            else f"{image}.png",
        }
        for observer in (1, 2)
        for dataset, condition, category, image in stimuli
    ]
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


@pytest.mark.parametrize("key", ["imagename", "image_id"])
def test_sets_are_rebuilt_from_the_human_data(tmp_path, imagenet, key, capsys):
    table = humans(tmp_path / "humans.parquet", key)
    out = tmp_path / "datasets"
    arguments = ["--humans", table, "--imagenet", imagenet, "--out", out]
    arguments += ["--distortions", "high-pass,uniform-noise,rotation"]
    assert run(*arguments) == 1
    printed = capsys.readouterr().out
    assert "1 images, needed for 1 stimuli, are not in" in printed
    assert "missing: n03041632_404" in printed
    assert "4 written, 0 already there, 1 pictures unreadable" in printed
    assert "n03041632_9.JPEG: broken image" in printed
    found = find_stimuli(tmp_path, "high-pass")
    assert [(s.number, s.condition, s.category, s.image_id) for s in found] == [
        (1, "inf", "airplane", "n02690373_1.png"),
        (2, "3.0", "boat", "n03662601_333.png"),
        (3, "0.4", "airplane", "n02690373_1.png"),
    ]
    source = next(imagenet.rglob("n03662601_333.JPEG"))
    cropped = np.array(center_crop(resize(Image.open(source), 256), 224))
    np.testing.assert_array_equal(np.array(Image.open(found[1].path)), ssmclip.distort(cropped, "high-pass", 3.0))
    [noisy] = find_stimuli(tmp_path, "uniform-noise")
    source = next(imagenet.rglob("n02690373_22.JPEG"))
    cropped = np.array(center_crop(resize(Image.open(source), 256), 224))
    seed = picture_seed(0, "uniform-noise", "n02690373_22")
    wanted = ssmclip.distort(cropped, "uniform-noise", 0.9, seed=seed)
    np.testing.assert_array_equal(np.array(Image.open(noisy.path)), wanted)
    run(*arguments)
    assert "0 written, 4 already there" in capsys.readouterr().out


def test_the_real_recipe_is_whole(shared, imagenet, tmp_path):
    """Of the real human data: 14,880 stimuli, 13,061 images, all but none of which are missing here."""
    recipe = rebuild_jobs(shared / "data/ood/human_compact.parquet", imagenet, tmp_path)
    assert recipe.jobs == []
    assert sum(recipe.missing.values()) == 14_880
    assert len(recipe.missing) == 13_061


def test_the_real_recipe_names_files_as_people_saw_them(shared, imagenet, tmp_path, monkeypatch):
    """Fields of the files' names, but for number and subject, against those in the human data; and all seeds differ."""
    table = pq.read_table(shared / "data/ood/human.parquet", columns=["dataset", "condition", "imagename"])
    seen = {}
    for row in table.to_pylist():
        if row["dataset"] in DISTORTIONS:
            _, code, _, _, category, count, image = row["imagename"].split("_", 6)
            seen.setdefault((row["dataset"], row["condition"]), set()).add((code, category, count, image))
    monkeypatch.setattr(Path, "is_file", lambda path: path.suffix == ".JPEG")
    recipe = rebuild_jobs(shared / "data/ood/human.parquet", imagenet, tmp_path)
    assert recipe.missing == {}
    made, seeds, numbers = {}, {}, {}
    for job in recipe.jobs:
        number, code, subject, level, category, count, image = job.target.name.split("_", 6)
        assert job.target.parent == tmp_path / job.distortion / "dnn/session-1"
        assert (subject, level) == ("dnn", job.level)
        assert job.source.parts[-2:] == (image.split("_")[0], image.removesuffix("png") + "JPEG")
        made.setdefault((job.distortion, job.level), set()).add((code, category, count, image))
        seeds.setdefault((job.distortion, image), set()).add(job.seed)
        numbers.setdefault(job.distortion, []).append(int(number))
    assert made == seen
    # An image has one noise at all levels of a distortion, and shares it with no other image and no other distortion.
    assert {len(own) for own in seeds.values()} == {1}
    assert len(set.union(*seeds.values())) == len(seeds)
    assert all(sorted(those) == list(range(1, len(those) + 1)) for those in numbers.values())


def test_recipes_that_cannot_be(tmp_path, imagenet):
    table = humans(tmp_path / "humans.parquet", "image_id")
    with pytest.raises(ValueError, match="contains no stimulus of contrast"):
        rebuild_jobs(table, imagenet, tmp_path, ["contrast"])
    with pytest.raises(FileNotFoundError, match="must contain class folders such as n01234567"):
        rebuild_jobs(table, tmp_path / "nowhere", tmp_path, ["high-pass"])
    pq.write_table(pa.table({"dataset": ["high-pass"]}), tmp_path / "bare.parquet")
    with pytest.raises(ValueError, match="lacks the columns category, condition, imagename"):
        rebuild_jobs(tmp_path / "bare.parquet", imagenet, tmp_path, ["high-pass"])
