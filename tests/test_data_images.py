"""Pictures of every kind: what Pillow encodes, open_image opens; what is no picture is refused with a reason."""

import io
import math
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps, features
from scipy import ndimage
from torchvision import transforms
from torchvision.transforms.v2 import functional as tv

from ssmclip.data.images import BadImage, open_image
from ssmclip.data.pairs.augment import (
    NUM_DRAWS,
    NUM_SHARE_DRAWS,
    TimmTransform,
    TrainTransform,
    crop_box,
    gaussian_blur,
    jitter_colors,
    posterize,
    train_transform,
)


def encode(image: Image.Image, kind: str, **options) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


@pytest.fixture
def rgb() -> np.ndarray:
    """A smooth picture, 20 x 30, so that lossy formats come close."""
    y, x = np.mgrid[0:20, 0:30]
    return np.stack([x * 8, y * 12, 255 - x * 4 - y * 4], -1).clip(0, 255).astype(np.uint8)


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "PPM", "GIF", "WEBP", "JPEG", "MPO", "AVIF"])
def test_rgb_in_every_format(rgb, kind, tmp_path):
    if kind == "AVIF" and not features.check("avif"):
        pytest.skip("this Pillow has no AVIF")
    best = {"quality": 100, "subsampling": 0}
    options = {
        "WEBP": {"lossless": True},
        "JPEG": best,
        "MPO": best,
        "AVIF": {"quality": 100, "subsampling": "4:4:4"},
    }.get(kind, {})
    data = encode(Image.fromarray(rgb), kind, **options)
    tolerance = {"GIF": 60, "JPEG": 4, "MPO": 4, "AVIF": 4}.get(kind, 0)  # 256 colours; rounding
    image = open_image(data)
    assert image.mode == "RGB"
    assert np.abs(np.asarray(image).astype(int) - rgb).max() <= tolerance
    (tmp_path / "file").write_bytes(data)
    assert open_image(tmp_path / "file").tobytes() == open_image(str(tmp_path / "file")).tobytes() == image.tobytes()


def test_greyscale_repeats_over_channels(rgb):
    grey = rgb[..., 0]
    out = np.asarray(open_image(encode(Image.fromarray(grey), "PNG")))
    assert (out == grey[..., None]).all()


def test_sixteen_bit_keeps_the_upper_eight():
    values = np.linspace(0, 65535, 600).reshape(20, 30).astype(np.uint16)
    for kind in ("PNG", "TIFF"):
        out = np.asarray(open_image(encode(Image.fromarray(values), kind)))
        assert (out == (values // 256)[..., None]).all(), kind


def test_cmyk_is_close_to_the_colours_it_encodes(rgb):
    data = encode(Image.fromarray(rgb).convert("CMYK"), "JPEG", quality=100, subsampling=0)
    assert Image.open(io.BytesIO(data)).mode == "CMYK"
    assert np.abs(np.asarray(open_image(data)).astype(int) - rgb).max() <= 6


def test_transparency_lies_on_white(rgb):
    alpha = np.tile(np.linspace(0, 255, 30), (20, 1)).astype(np.uint8)
    data = encode(Image.fromarray(np.dstack([rgb, alpha])), "PNG")
    share = alpha[..., None] / 255
    expected = rgb * share + 255 * (1 - share)
    assert np.abs(np.asarray(open_image(data)) - expected).max() <= 1
    grey = encode(Image.fromarray(np.dstack([rgb[..., 0], alpha])), "PNG")
    assert np.abs(np.asarray(open_image(grey))[..., 0] - expected[..., 0]).max() <= 1


def test_transparent_palette_entry_is_white():
    image = Image.new("P", (4, 4), 1)
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.putpixel((0, 0), 0)
    out = np.asarray(open_image(encode(image, "PNG", transparency=0)))
    assert out[0, 0].tolist() == [255, 255, 255]
    assert out[1, 1].tolist() == [0, 0, 255]


def test_bilevel():
    image = Image.new("1", (4, 4), 1)
    image.putpixel((1, 2), 0)
    out = np.asarray(open_image(encode(image, "PNG")))
    assert out[2, 1].tolist() == [0, 0, 0]
    assert (out == 255).sum() == 45


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_first_frame_of_an_animation(kind):
    red, blue = (Image.new("RGB", (8, 8), colour) for colour in ("red", "blue"))
    options = {"lossless": True} if kind == "WEBP" else {}
    data = encode(red, kind, save_all=True, append_images=[blue], duration=100, **options)
    assert np.asarray(open_image(data)).reshape(-1, 3).tolist() == [[255, 0, 0]] * 64


def huge_png(width: int, height: int) -> bytes:
    """A PNG of a few hundred bytes that claims to be as large as asked."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = chunk(b"IDAT", zlib.compress(b"\0" * 1000))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + data + chunk(b"IEND", b"")


@pytest.mark.parametrize("side", [9_000, 10_000, 20_000])  # over our limit, in Pillow's warning range, over its limit
def test_too_large_is_refused_before_decoding(side):
    with pytest.raises(BadImage, match="image too large") as caught:
        open_image(huge_png(side, side))
    assert caught.value.reason == "image too large"


@pytest.mark.parametrize("size", [(1, 70_000_000), (70_000_000, 1), (1001, 1), (2, 2001)])
def test_too_thin_is_refused_before_decoding(size):
    with pytest.raises(BadImage, match=rf"times the other's pixels \(got {size[0]} x {size[1]}\)") as caught:
        open_image(huge_png(*size))
    assert caught.value.reason == "image too thin"


def test_a_thousand_to_one_is_a_picture():
    assert open_image(encode(Image.new("RGB", (2000, 2)), "PNG")).size == (2000, 2)


def test_one_pixel_is_a_picture_unless_a_side_is_asked_for():
    dot = encode(Image.new("RGB", (1, 1), "red"), "PNG")
    assert open_image(dot).getpixel((0, 0)) == (255, 0, 0)
    with pytest.raises(BadImage, match=r"image too small: each side must have at least 2 pixels \(got 1 x 1"):
        open_image(dot, min_side=2)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"not a picture",
        b"<html></html>",
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n",
        encode(Image.new("RGB", (64, 64), "red"), "PNG")[:100],
        encode(Image.effect_noise((64, 64), 50), "JPEG")[:1000],
        encode(Image.fromarray(np.ones((4, 4), np.float32)), "TIFF"),
    ],
    ids=["empty", "text", "html", "eps", "cut png", "cut jpeg", "float"],
)
def test_what_is_no_picture_is_broken(data):
    with pytest.raises(BadImage) as caught:
        open_image(data)
    assert caught.value.reason == "broken image"
    assert "KeyError" not in str(caught.value)


def test_missing_file(tmp_path):
    with pytest.raises(BadImage, match=r"missing image file: .*nowhere\.jpg: No such file"):
        open_image(tmp_path / "nowhere.jpg")


# ---- the training transform ------------------------------------------------------------------------------------------

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.3, 0.25)


@pytest.fixture
def photograph() -> Image.Image:
    """Smooth with some noise, 90 x 70."""
    draws = np.random.default_rng(0)
    y, x = np.mgrid[0:70, 0:90]
    smooth = np.stack([x * 2, y * 3, x + y], -1)
    return Image.fromarray((smooth + draws.integers(0, 40, smooth.shape)).clip(0, 255).astype(np.uint8))


def test_transform_is_pillows_crop_and_resize_normalised(photograph):
    transform = train_transform(32, MEAN, STD, scale=(0.3, 0.9))
    for seed in range(20):
        out = transform(photograph, torch.Generator().manual_seed(seed))
        draws = torch.rand(NUM_DRAWS, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).tolist()
        box = crop_box(90, 70, (0.3, 0.9), (3 / 4, 4 / 3), draws)
        reference = photograph.crop(box).resize((32, 32), Image.Resampling.BICUBIC)
        expected = (np.asarray(reference) / 255 - MEAN) / STD
        difference = np.abs(out.permute(1, 2, 0).numpy() - expected) * STD * 255
        assert difference.max() < 1.01


def test_transform_draws_from_its_generator_only(photograph):
    transform = train_transform(16, MEAN, STD, flip=True, color_jitter=0.4)
    torch.manual_seed(0)
    first = transform(photograph, torch.Generator().manual_seed(5))
    torch.manual_seed(1)
    state = torch.get_rng_state()
    assert torch.equal(first, transform(photograph, torch.Generator().manual_seed(5)))
    assert torch.equal(state, torch.get_rng_state())
    assert not torch.equal(first, transform(photograph, torch.Generator().manual_seed(6)))


def test_flip_mirrors_half_of_the_pictures(photograph):
    plain = TrainTransform(16, MEAN, STD)
    flipping = TrainTransform(16, MEAN, STD, flip=True)
    mirrored = 0
    for seed in range(200):
        a, b = (t(photograph, torch.Generator().manual_seed(seed)) for t in (plain, flipping))
        assert torch.equal(a, b) or torch.equal(a.flip(-1), b)
        mirrored += not torch.equal(a, b)
    assert 70 < mirrored < 130  # 4 standard deviations


def test_colour_jitter_is_torchvisions(photograph):
    transform = TrainTransform(16, (0.0,) * 3, (1.0,) * 3, scale=(1.0, 1.0), ratio=(1.28, 1.29), color_jitter=0.4)
    draws = torch.rand(NUM_DRAWS, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    b, c, s = (1 + 0.4 * (2 * draws[-3:] - 1)).tolist()
    plain = TrainTransform(16, (0.0,) * 3, (1.0,) * 3, scale=(1.0, 1.0), ratio=(1.28, 1.29))
    base = (plain(photograph, torch.Generator().manual_seed(3)) * 255).round().to(torch.uint8)
    expected = tv.adjust_saturation(tv.adjust_contrast(tv.adjust_brightness(base, b), c), s)
    out = transform(photograph, torch.Generator().manual_seed(3)) * 255
    assert (out - expected).abs().max() < 1.01


def test_colours_change_in_the_order_that_torchvision_draws(photograph, monkeypatch):
    """Its ColorJitter, given our draws, on the same crop; every order occurs."""
    geometry, strengths = dict(scale=(1.0, 1.0), ratio=(1.28, 1.29)), (0.4, 0.4, 0.2, 0.1)
    ours = TrainTransform(16, MEAN, STD, color_jitter=strengths, color_order="random", **geometry)
    plain, orders = TrainTransform(16, MEAN, STD, **geometry), set()
    for seed in range(150):
        base = plain.pixels(np.array(photograph), torch.Generator().manual_seed(seed))
        generator = torch.Generator().manual_seed(seed)
        draws = torch.rand(NUM_DRAWS, generator=generator, dtype=torch.float64)[-3:].tolist()
        draws += torch.rand(NUM_SHARE_DRAWS, generator=generator, dtype=torch.float64)[1:2].tolist()
        order = torch.randperm(4, generator=generator)
        orders.add(tuple(order.tolist()))
        factors = [m + s * (2 * d - 1) for m, s, d in zip((1, 1, 1, 0), strengths, draws, strict=True)]
        monkeypatch.setattr(transforms.ColorJitter, "get_params", lambda *_, o=order, f=factors: (o, *f))
        out = ours.pixels(np.array(photograph), torch.Generator().manual_seed(seed))
        differs = (out.int() - transforms.ColorJitter(*strengths)(base).int()).abs()
        assert differs.max() <= 2  # torchvision rounds hue differently in its two versions
    assert len(orders) == 24


def test_bilinear_crops_are_pillows(photograph):
    pixels = TrainTransform(32, MEAN, STD, interpolation="bilinear").pixels(
        np.array(photograph), torch.Generator().manual_seed(2)
    )
    draws = torch.rand(NUM_DRAWS, generator=torch.Generator().manual_seed(2), dtype=torch.float64).tolist()
    crop = photograph.crop(crop_box(90, 70, (0.5, 1.0), (3 / 4, 4 / 3), draws))
    for how, close in ((Image.Resampling.BILINEAR, True), (Image.Resampling.BICUBIC, False)):
        expected = np.asarray(crop.resize((32, 32), how)).astype(int)
        assert (np.abs(pixels.permute(1, 2, 0).numpy() - expected).max() <= 1) == close


def test_hue_is_turned_as_on_pillows_circle(photograph):
    image = torch.from_numpy(np.array(photograph)).permute(2, 0, 1)
    out = jitter_colors(image, (0.0, 0.0, 0.0, 0.1), [0.5, 0.5, 0.5, 0.95])
    hue, saturation, value = photograph.convert("HSV").split()
    turned = hue.point(lambda h: (h + round(0.09 * 255)) % 256)
    expected = np.asarray(Image.merge("HSV", (turned, saturation, value)).convert("RGB")).astype(int)
    assert np.abs(out.permute(1, 2, 0).numpy() - expected).mean() < 1.5  # Pillow keeps hue in eight bits
    assert np.abs(np.asarray(photograph) - expected).mean() > 10


@pytest.mark.parametrize("sigma", [0.1, 0.7, 2.0])
def test_blur_is_scipys(photograph, sigma):
    image = np.array(photograph)
    expected = ndimage.gaussian_filter(
        image.astype(float), (sigma, sigma, 0), mode="mirror", radius=(*[math.ceil(3 * sigma)] * 2, 0)
    )
    out = gaussian_blur(torch.from_numpy(image).permute(2, 0, 1), sigma).permute(1, 2, 0).numpy()
    assert np.abs(out - expected).max() < 0.51
    assert gaussian_blur(torch.full((3, 1, 1), 7, dtype=torch.uint8), sigma).eq(7).all()


PILLOWS = {
    "gray_scale_prob": lambda x: ImageOps.grayscale(x).convert("RGB"),
    "solarize_prob": lambda x: ImageOps.solarize(x, 128),
}


@pytest.mark.parametrize("name", ["color_jitter_prob", "gaussian_blur_prob", *PILLOWS])
def test_a_share_of_the_pictures_is_treated(photograph, name):
    image = np.array(photograph)
    plain = TrainTransform(16, MEAN, STD)
    treating = TrainTransform(16, MEAN, STD, color_jitter=0.4 if name == "color_jitter_prob" else 0.0, **{name: 0.2})
    treated = 0
    for seed in range(300):
        a, b = (t.pixels(image, torch.Generator().manual_seed(seed)) for t in (plain, treating))
        treated += not torch.equal(a, b)
        if name in PILLOWS and not torch.equal(a, b):
            expected = np.asarray(PILLOWS[name](Image.fromarray(a.permute(1, 2, 0).numpy()))).astype(int)
            assert np.abs(b.permute(1, 2, 0).numpy() - expected).max() <= 1
    assert 60 - 28 < treated < 60 + 28  # 4 standard deviations


def test_grey_then_blurred_then_solarised(photograph):
    image, every = np.array(photograph), dict(gray_scale_prob=1.0, gaussian_blur_prob=1.0, solarize_prob=1.0)
    base = TrainTransform(32, MEAN, STD).pixels(image, torch.Generator().manual_seed(1))
    out = TrainTransform(32, MEAN, STD, **every).pixels(image, torch.Generator().manual_seed(1))
    generator = torch.Generator().manual_seed(1)
    torch.rand(NUM_DRAWS, generator=generator, dtype=torch.float64)
    sigma = 0.1 + 1.9 * torch.rand(NUM_SHARE_DRAWS, generator=generator, dtype=torch.float64)[4].item()
    grey = base.double().permute(1, 2, 0).numpy() @ [0.299, 0.587, 0.114]
    blurred = ndimage.gaussian_filter(grey, sigma, mode="mirror", radius=math.ceil(3 * sigma))
    expected = np.where(blurred >= 128, 255 - blurred, blurred)
    clear = np.abs(blurred - 127.5) > 2  # where rounding can not turn it over
    assert clear.mean() > 0.8
    assert np.abs(out.numpy() - expected)[:, clear].max() < 2


def test_crops_have_the_asked_share_and_ratio():
    draws = np.random.default_rng(0).random((500, NUM_DRAWS)).tolist()
    boxes = np.array([crop_box(200, 160, (0.4, 0.8), (3 / 4, 4 / 3), row) for row in draws])
    width, height = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    assert (boxes >= 0).all()
    assert (boxes[:, 2] <= 200).all()
    assert (boxes[:, 3] <= 160).all()
    share, ratio = width * height / 32000, width / height
    assert 0.39 < share.min() < 0.42
    assert 0.78 < share.max() < 0.81
    assert 0.74 < ratio.min() < 0.8
    assert 1.25 < ratio.max() < 1.35
    assert abs(np.log(ratio).mean()) < 0.05


@pytest.mark.parametrize("size", [(400, 10), (10, 400), (1, 1), (3, 2)])
def test_odd_pictures_are_cropped_in_the_middle(size):
    left, top, right, bottom = crop_box(*size, (0.9, 1.0), (3 / 4, 4 / 3), [0.5] * NUM_DRAWS)
    assert 0 <= left < right <= size[0]
    assert 0 <= top < bottom <= size[1]
    assert abs((left + right) - size[0]) <= 1
    assert abs((top + bottom) - size[1]) <= 1


@pytest.mark.parametrize("policy", ["rand-m10-inc1", "augmix-m10", "original-mstd0.5", "3a"])
def test_timms_policies_take_any_magnitude(rgb, policy):
    """At the highest, RandAugment's posterize keeps no bit, which newer versions of Pillow refuse."""
    transform = TimmTransform({"input_size": 16, "auto_augment": policy})
    generator = torch.Generator().manual_seed(0)
    for _ in range(60):
        assert transform(Image.fromarray(rgb), generator).isfinite().all()


@pytest.mark.parametrize("bits", range(9))
def test_posterize_keeps_the_highest_bits(rgb, bits):
    kept = np.asarray(posterize(Image.fromarray(rgb), bits))
    np.testing.assert_array_equal(kept, rgb.astype(int) // 2 ** (8 - bits) * 2 ** (8 - bits))
