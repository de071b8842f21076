"""The registry of distortions, against the authors' own pictures and the definitions in plain NumPy, SciPy, Pillow."""

import importlib
import io
import math
import sys
from functools import lru_cache
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import ssmclip
from ssmclip import UnknownName
from ssmclip.data.distortions import DISTORTIONS, GEIRHOS, IMAGENET_C, UNDISTORTED, imagenet_c
from ssmclip.data.distortions import eidolon as fast
from ssmclip.data.distortions import reference as plain
from ssmclip.data.distortions.registry import Distortion, kept, parse_level, prepare
from ssmclip.humans.stimuli import STIMULUS_SETS

RANDOM = {"phase-scrambling", "uniform-noise"}  # bit-reproducible from a RandomState; eidolons are not
EIDOLONS = {"eidolonI", "eidolonII", "eidolonIII"}
# The published list: what does not distort, and what people get right in less than 20 % of trials.
NOT_COUNTED = {
    "colour": "cr",
    "contrast": "c100 c03 c01",
    "high-pass": "inf 0.55 0.45 0.4",
    "low-pass": "0 15 40",
    "phase-scrambling": "0 150 180",
    "power-equalisation": "0",
    "false-colour": "True",
    "rotation": "0",
    "eidolonI": "1-10-10 64-10-10 128-10-10",
    "eidolonII": "1-3-10 32-3-10 64-3-10 128-3-10",
    "eidolonIII": "1-0-10 16-0-10 32-0-10 64-0-10 128-0-10",
    "uniform-noise": "0.0 0.6 0.9",
}
PARAMETRIC = [name for name, known in STIMULUS_SETS.items() if len(known.conditions) > 1]


def photograph(seed: int, height: int = 224, width: int = 224) -> np.ndarray:
    """A picture with the spectrum of photographs (amplitude 1 / frequency), and colours."""
    rng = np.random.default_rng(seed)
    frequency = np.hypot(*np.meshgrid(np.fft.fftfreq(width), np.fft.fftfreq(height))) + 1 / 224
    noise = np.fft.fft2(rng.standard_normal((3, height, width)))
    channels = np.fft.ifft2(noise / frequency).real
    channels = 0.7 * channels.mean(axis=0) + 0.3 * channels
    return np.clip(128 + 55 * channels / channels.std(), 0, 255).astype(np.uint8).transpose(1, 2, 0).copy()


@pytest.fixture(scope="module")
def tables() -> dict[str, np.ndarray]:
    """Tables of the right form: a screen of gamma 2.2, the mean amplitudes of four made pictures."""
    spectra = [np.abs(np.fft.fftshift(np.fft.fft2(plain.grey(photograph(seed))))) for seed in range(4)]
    return {"gamma": np.linspace(0, 1, 256) ** 2.2, "amplitude": np.mean(spectra, axis=0)}


@lru_cache(maxsize=1)
def undisarrayed(seed: int) -> np.ndarray:
    """By the definition, with a reach of 0: a second, for all coherences."""
    return plain.eidolon(photograph(seed), 0, 1.0, np.random.RandomState(0))


def published(shared: Path, name: str) -> np.ndarray:
    return np.array(Image.open(shared / f"data/ood/golden/example_image{name}.png").convert("RGB"))


def test_all_parametric_sets_have_a_distortion():
    assert len(PARAMETRIC) == 12
    assert set(GEIRHOS) == set(PARAMETRIC) == set(plain.REFERENCE)
    assert set(DISTORTIONS) == {*GEIRHOS, *IMAGENET_C}


@pytest.mark.parametrize("name", GEIRHOS)
def test_levels_are_the_conditions_of_the_experiment(name):
    assert DISTORTIONS[name].labels == STIMULUS_SETS[name].conditions
    left_out = NOT_COUNTED[name].split()
    assert [DISTORTIONS[name].labels[place] for place in kept(name)] == [
        label for label in STIMULUS_SETS[name].conditions if label not in left_out
    ]


@pytest.mark.parametrize(
    ("name", "level", "file"),
    [
        ("colour", "bw", "_grayscale"),
        ("contrast", 0.3, "_low_contrast"),
        ("high-pass", 3.0, "_highpass"),
        ("rotation", 90, "_rotation90"),
        ("false-colour", "False", "_false-colour"),
    ],
)
def test_the_authors_pixels(shared, name, level, file):
    out = ssmclip.distort(published(shared, ""), name, level, gamma=shared / "data/ood/golden/x_gamma_function.npy")
    np.testing.assert_array_equal(out, published(shared, file))


def test_the_authors_phase_scrambling(shared):
    """The published shifts were not seeded: contrast and what is left of the picture are compared over many seeds."""
    image, wanted = published(shared, ""), published(shared, "_phase-scrambling")[..., 0].astype(float)
    batch = np.repeat(image[None], 24, axis=0)
    out = ssmclip.distort(batch, "phase-scrambling", 90)[..., 0].astype(float)
    grey = plain.grey(image) * 255

    def statistics(x):
        spectrum = np.abs(np.fft.fft2(x / 255))[1:112, 1:112]
        return x.mean(), x.std(), np.corrcoef(x.ravel(), grey.ravel())[0, 1], np.log(spectrum).mean()

    drawn = np.array([statistics(x) for x in out])
    distance = np.abs(np.array(statistics(wanted)) - drawn.mean(axis=0)) / drawn.std(axis=0, ddof=1)
    assert (distance < 3.5).all(), distance
    # Shifts mirrored as conjugate pairs need them would lose less power than the published picture has lost.
    assert 0.55 < (wanted.var() / grey.var()) < 0.75
    assert np.all(np.abs(drawn[:, 1] / wanted.std() - 1) < 0.15)


def test_published_tables_equalise_power(shared):
    golden = shared / "data/ood/golden"
    table = np.load(golden / "mean_power_spectrum_grey.npy")
    image = published(shared, "")
    out = ssmclip.distort(image, "power-equalisation", amplitude=golden / "mean_power_spectrum_grey.npy")
    np.testing.assert_array_equal(out, plain.power_equalisation(image, 1, None, {"amplitude": table}))


@pytest.mark.parametrize("name", sorted(set(PARAMETRIC) - EIDOLONS))
def test_every_level_against_the_definition(name, tables):
    """Bit by bit, at the published levels and one other; random ones from the same RandomState."""
    chosen = DISTORTIONS[name]
    own = {"contrast": 0.42, "high-pass": 2.2, "low-pass": 2.5, "phase-scrambling": 45, "uniform-noise": 0.15}
    kept = {key: tables[key] for key in chosen.tables}
    for seed, level in enumerate([*chosen.levels, *([own[name]] if name in own else [])]):
        image = photograph(seed)
        out = ssmclip.distort(image, name, level, seed=seed, **kept)
        wanted = plain.REFERENCE[name](image, parse_level(name, level), np.random.RandomState(seed), tables)
        np.testing.assert_array_equal(out, wanted, err_msg=f"{name} {level}")


def test_grey_is_that_of_every_colour(tables):
    """All 2**24 colours would do; a sixteenth, ties at .5 among them, and skimage's weights."""
    values = np.arange(256, dtype=np.uint8)
    image = np.stack(np.meshgrid(values[::4], values[1::2], values[::2], indexing="ij"), axis=-1).reshape(1024, 1024, 3)
    exact = 2125 * image[..., 0].astype(int) + 7154 * image[..., 1].astype(int) + 721 * image[..., 2].astype(int)
    out = ssmclip.distort(image, "colour")[..., 0].astype(int)
    assert np.abs(out * 10_000 - exact).max() <= 5000
    ties = exact % 10_000 == 5000
    assert ties.any()
    np.testing.assert_array_equal(out[~ties], (exact[~ties] + 5000) // 10_000)
    np.testing.assert_array_equal(out, plain.colour(image, 1, None, tables)[..., 0])


@pytest.mark.parametrize("name", PARAMETRIC)
def test_batches_seeds_and_input(name, tables):
    chosen = DISTORTIONS[name]
    kept = {key: tables[key] for key in chosen.tables}
    level = list(chosen.levels)[len(chosen.levels) // 2]
    batch = np.stack([photograph(5), photograph(6)])
    before = batch.copy()
    out = ssmclip.distort(batch, name, level, seed=[3, 9], **kept)
    np.testing.assert_array_equal(batch, before)
    for image, seed, wanted in zip(batch, (3, 9), out, strict=True):
        np.testing.assert_array_equal(ssmclip.distort(image, name, level, seed=seed, **kept), wanted)
    np.testing.assert_array_equal(
        ssmclip.distort(batch, name, level, seed=3, **kept)[1], ssmclip.distort(batch[1], name, level, seed=4, **kept)
    )
    other = ssmclip.distort(batch[0], name, level, seed=4, **kept)
    assert (other != out[0]).any() == (name in RANDOM | EIDOLONS)
    # What is fetched by a loader is often neither contiguous nor writable.
    view = np.asarray(Image.fromarray(batch[0][:, ::-1].copy()))[:, ::-1]
    np.testing.assert_array_equal(ssmclip.distort(view, name, level, seed=3, **kept), out[0])


@pytest.mark.parametrize("name", PARAMETRIC)
def test_the_undistorted_level(name, tables):
    """Coloured sets keep colours, noise starts at 30 % contrast, the others at grey (eidolons: grey in Pillow's)."""
    image = photograph(7)
    first = next(iter(DISTORTIONS[name].levels))
    out = ssmclip.distort(
        image, name, 0 if name in EIDOLONS else first, **{k: tables[k] for k in DISTORTIONS[name].tables}
    )
    if name in EIDOLONS:
        wanted = undisarrayed(7)
        assert np.abs(out.astype(int) - wanted).max() <= 1
        assert (out != wanted).mean() < 1e-3
    elif name in ("colour", "false-colour"):
        np.testing.assert_array_equal(out, image)
    elif name == "uniform-noise":
        np.testing.assert_array_equal(out, plain.contrast(image, 0.3, None, tables))
    else:
        np.testing.assert_array_equal(out, plain.colour(image, 1, None, tables))


@pytest.mark.parametrize(
    "name", sorted(EIDOLONS | {"contrast", "high-pass", "low-pass", "phase-scrambling", "uniform-noise"})
)
def test_more_is_more(name):
    """Likeness to the grey picture falls from level to level (for contrast: its spread does)."""
    image = photograph(8)
    grey = plain.grey(image)
    likeness = []
    for label, level in DISTORTIONS[name].levels.items():
        out = ssmclip.distort(image, name, label)[..., 0].astype(float)
        likeness.append(out.std() if name == "contrast" else np.corrcoef(out.ravel(), grey.ravel())[0, 1])
        assert level == parse_level(name, label)
    assert np.all(np.diff(likeness) < 0), likeness


# ---- eidolons --------------------------------------------------------------------------------------------------------


def test_bands_of_an_eidolon():
    grey = plain.picture(plain.grey(photograph(9, 256, 256)))[..., 0]
    padded = np.pad(grey, 128, mode="symmetric").astype(float)
    levels = [plain.blurred(padded, sigma)[128:384, 128:384] for sigma in plain.SIGMAS]
    bands = np.array([fine - coarse for fine, coarse in pairwise(levels)] + levels[-1:])
    np.testing.assert_allclose(fast.split(grey), bands, atol=5e-3)


def test_pixels_of_an_eidolon_are_fetched_as_published():
    """With the same displacements, also those that leave the picture, the same pixels."""
    rng = np.random.default_rng(0)
    bands = rng.standard_normal((12, 256, 256)).astype(np.float32) * 20 + 10
    rows, columns = (rng.standard_normal((12, 256, 256)).astype(np.float32) * 12 for _ in range(2))
    y, x = np.indices((256, 256)) + 128
    total = np.zeros((256, 256), np.float32)
    for band, row, column in zip(bands, rows, columns, strict=True):
        padded = np.pad(band, 128, mode="symmetric")
        i = np.clip(y + np.float32(16) * row, 0, 511).astype(int)
        j = np.clip(x + np.float32(16) * column, 0, 511).astype(int)
        total += padded[i, j]
    out = fast.gather(bands, rows, columns, np.float32(16), 128, 128)
    difference = np.abs(out.astype(int) - np.clip(total, 0, 255).astype(np.uint8))
    assert (difference > 0).mean() < 1e-4  # a place that float32 rounds to the next pixel


@pytest.mark.parametrize("sigma", [1 / math.sqrt(2), 2.0, 8.0])
def test_noise_of_an_eidolon(sigma):
    """Spread and correlation over sigma pixels, of our fields and of the published ones, within 4 standard errors."""

    def statistics(fields):
        lag = max(round(sigma), 1)
        x = fields - fields.mean(axis=(1, 2), keepdims=True)
        return np.array(
            [
                (x.std(axis=(1, 2))),
                (x[:, :, lag:] * x[:, :, :-lag]).mean(axis=(1, 2)) / x.var(axis=(1, 2)),
            ]
        )

    published_fields = [
        plain.blurred_noise((512, 512), sigma, np.random.RandomState(s))[128:384, 128:384] for s in range(6)
    ]
    theirs = statistics(np.array(published_fields))
    ours = statistics(fast.noise(24, (256, 256), sigma, np.random.default_rng(1)).astype(np.float64))
    error = np.sqrt(theirs.var(axis=1, ddof=1) / 6 + ours.var(axis=1, ddof=1) / 24)
    assert np.all(np.abs(theirs.mean(axis=1) - ours.mean(axis=1)) < 4 * error), (theirs.mean(axis=1), ours.mean(axis=1))


@pytest.mark.parametrize("name", sorted(EIDOLONS))
def test_eidolons_are_as_far_from_the_picture_as_published(name):
    image = photograph(10)
    grey = plain.grey(image).ravel()

    def likeness(pictures):
        return np.array([np.corrcoef(p[..., 0].ravel(), grey)[0, 1] for p in pictures])

    theirs = likeness([plain.REFERENCE[name](image, 8, np.random.RandomState(0), {})])
    ours = likeness(ssmclip.distort(np.repeat(image[None], 12, axis=0), name, 8))
    assert np.all(np.abs(theirs - ours.mean()) < 4.5 * ours.std(ddof=1)), (theirs, ours)


def test_eidolons_of_other_shapes():
    """A wide picture is disarrayed at 256 pixels' width, and comes back in its size."""
    image = photograph(11, 90, 150)
    out = ssmclip.distort(image, "eidolonI", 0)
    assert out.shape == image.shape
    grey = np.array(Image.fromarray(image).convert("L"), float)
    assert np.corrcoef(out[..., 0].ravel(), grey.ravel())[0, 1] > 0.95


# ---- other shapes and levels -----------------------------------------------------------------------------------------


def test_scrambled_phases_of_odd_sides_keep_the_mean():
    for height, width in ((31, 40), (40, 31), (31, 33)):
        image = photograph(12, height, width) // 2 + 64  # nothing to clip
        out = ssmclip.distort(image, "phase-scrambling", 180)[..., 0]
        assert abs(out.mean() - 255 * plain.grey(image).mean()) < 0.1
        assert (out != ssmclip.distort(image, "phase-scrambling", 0)[..., 0]).mean() > 0.9


def test_levels_in_between(tables):
    image = photograph(13)
    wide = photograph(13, 60, 80)
    np.testing.assert_array_equal(ssmclip.distort(wide, "rotation", 90).shape, (80, 60, 3))
    np.testing.assert_array_equal(ssmclip.distort(image, "rotation", -90), ssmclip.distort(image, "rotation", 270))
    nearly = ssmclip.distort(image, "rotation", 89.999)[5:-5, 5:-5].astype(int)
    assert np.abs(nearly - ssmclip.distort(image, "rotation", 90)[5:-5, 5:-5]).max() <= 2
    half = ssmclip.distort(image, "colour", 0.5).astype(int)
    assert np.abs(2 * half - image - ssmclip.distort(image, "colour", 1)).max() <= 2
    isoluminant = ssmclip.distort(image, "false-colour", 0.5, gamma=tables["gamma"]).astype(float)
    assert isoluminant.std(axis=2).mean() < 0.5 * image.std(axis=2).mean()


@pytest.mark.parametrize(
    ("name", "level", "complaint"),
    [
        ("contrast", 30, "from 0 to 1, or one of c100"),
        ("contrast", "c31", "one of c100"),
        ("contrast", None, "got None"),
        ("high-pass", -1, "standard deviation in pixels"),
        ("low-pass", math.nan, "got nan"),
        ("high-pass", 1e9, "from 0 to 10000"),
        ("eidolonI", 1e300, "the reach in pixels"),
        ("power-equalisation", 1, "needs amplitude: pass"),
        ("false-colour", 1, "needs gamma: pass"),
    ],
)
def test_levels_that_cannot_be(name, level, complaint):
    with pytest.raises(ValueError, match=complaint):
        ssmclip.distort(photograph(0), name, level)


def test_input_that_cannot_be(tables, tmp_path):
    with pytest.raises(UnknownName, match="did you mean 'high-pass'"):
        ssmclip.distort(photograph(0), "highpass", 3.0)
    with pytest.raises(ValueError, match=r"float32 \(8, 8, 3\)"):
        ssmclip.distort(np.zeros((8, 8, 3), np.float32), "colour")
    with pytest.raises(ValueError, match=r"uint8 \(8, 8\)"):
        ssmclip.distort(np.zeros((8, 8), np.uint8), "colour")
    with pytest.raises(ValueError, match=r"uint8 \(0, 8, 3\)"):
        ssmclip.distort(np.zeros((0, 8, 3), np.uint8), "high-pass", 3.0)
    with pytest.raises(ValueError, match="2 pictures need 2 seeds"):
        ssmclip.distort(np.zeros((2, 8, 8, 3), np.uint8), "uniform-noise", 0.1, seed=[1])
    with pytest.raises(ValueError, match=r"images' size \(8, 8\) \(got \(224, 224\)"):
        ssmclip.distort(np.zeros((8, 8, 3), np.uint8), "power-equalisation", amplitude=tables["amplitude"])
    np.save(tmp_path / "gamma.npy", np.ones(256))
    with pytest.raises(ValueError, match="256 rising values"):
        ssmclip.distort(photograph(0), "false-colour", gamma=tmp_path / "gamma.npy")


# ---- ImageNet-C ------------------------------------------------------------------------------------------------------


def test_corruptions_of_imagenet_c():
    """By name, seeded, and the caller's random numbers are left alone. Contrast and JPEG by their definitions."""
    pytest.importorskip("imagecorruptions")
    image = photograph(14, 96, 96)
    np.random.seed(0)
    wanted = np.random.random()
    np.random.seed(0)
    for name in ("gaussian_noise", "impulse_noise", "glass_blur", "fog", "snow", "elastic_transform"):
        batch = ssmclip.distort(np.stack([image, image]), f"imagenet-c/{name}", 3, seed=5)
        np.testing.assert_array_equal(batch[1], ssmclip.distort(image, f"imagenet-c/{name}", "3", seed=6))
        assert (batch[0] != batch[1]).mean() > 0.1, name
    assert np.random.random() == wanted
    x = image / 255
    mean = x.mean(axis=(0, 1))
    expected = np.uint8(np.clip((x - mean) * 0.2 + mean, 0, 1) * 255)
    assert np.abs(ssmclip.distort(image, "imagenet-c/contrast", 3).astype(int) - expected).max() <= 1
    jpeg = io.BytesIO()
    Image.fromarray(image).save(jpeg, "JPEG", quality=15)
    np.testing.assert_array_equal(ssmclip.distort(image, "imagenet-c/jpeg_compression", 3), np.array(Image.open(jpeg)))


def test_the_corruptions_are_those_of_the_package():
    package = pytest.importorskip("imagecorruptions")
    assert imagenet_c.CORRUPTIONS == [*package.get_corruption_names(), *package.get_corruption_names("validation")]


def test_a_picture_keeps_its_pixels_at_the_undistorted_level(corruptions):
    image = photograph(15, 40, 50)
    out = ssmclip.distort(image, "imagenet-c/fog", UNDISTORTED)
    np.testing.assert_array_equal(out, image)
    assert not np.shares_memory(out, image)
    assert DISTORTIONS["imagenet-c/fog"].labels == (UNDISTORTED, *"12345")
    assert kept("imagenet-c/fog") == [1, 2, 3, 4, 5]


def test_a_corruption_gets_the_severity_and_a_seeded_generator(corruptions):
    """With a package that stands in: the picture, moved by its severity and by the next number of NumPy's generator."""
    batch = np.stack([photograph(16, 40, 50) // 2, photograph(17, 40, 50) // 2])
    for level in (3, 3.0, "3", "3.0"):
        out = ssmclip.distort(batch, "imagenet-c/fog", level, seed=[7, 8])
        for image, seed, one in zip(batch, (7, 8), out, strict=True):
            np.testing.assert_array_equal(one, image + 3 + np.random.RandomState(seed).randint(100))


def test_corruptions_that_cannot_be(corruptions):
    with pytest.raises(UnknownName, match="did you mean 'imagenet-c/fog'"):
        ssmclip.distort(photograph(0), "imagenet-c/fogg", 3)
    for level in (6, 0, 2.5, None):
        with pytest.raises(ValueError, match="must be a severity, one of 1, 2, 3, 4, 5"):
            ssmclip.distort(photograph(0), "imagenet-c/fog", level)
    with pytest.raises(ValueError, match="at least 32 x 32"):
        ssmclip.distort(photograph(0, 20, 40), "imagenet-c/fog", 1)


def test_the_package_is_imported_with_the_first_corruption_and_named_where_it_is_missing(monkeypatch):
    monkeypatch.setattr(DISTORTIONS, "_items", {})
    monkeypatch.setitem(sys.modules, "imagecorruptions", None)  # an import fails
    importlib.reload(imagenet_c)
    with pytest.raises(ImportError, match=r"pip install 'ssmclip\[corruptions\]'"):
        ssmclip.distort(photograph(0), "imagenet-c/fog", 1)
    with pytest.raises(ImportError, match=r"pip install 'ssmclip\[corruptions\]'"):  # before there is a picture
        prepare("imagenet-c/fog", {})


# ---- the registry ----------------------------------------------------------------------------------------------------


def test_a_distortion_checks_its_labels():
    fields = dict(name="fog", function=np.copy, levels={"1": 1.0, "2": 2.0}, meaning="a thickness", allowed=None)
    with pytest.raises(ValueError, match=r"counted has 3, which are not among its levels \(1, 2\)"):
        Distortion(**fields, counted=("1", "3"))
    with pytest.raises(ValueError, match=r"first of its levels \(1, 2; got '2'\)"):
        Distortion(**fields, counted=("1",), undistorted="2")
