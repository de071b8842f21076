"""A-CLIP: windows around views, what the averaged model attends to, masked views, the losses, and a run of it."""

import copy
import math
import shutil

import numpy as np
import pytest
import timm.layers
import torch
from accelerate import Accelerator
from timm.utils import AttentionExtract
from torch.nn.functional import interpolate, normalize

from small_clips import SMALL, VIT, a_clip
from ssmclip.config import (
    CheckpointConfig,
    DataConfig,
    EmaConfig,
    LoggingConfig,
    LossConfig,
    MaskConfig,
    ModelConfig,
    OptimiserConfig,
    ScheduleConfig,
    SslConfig,
    TrainConfig,
    apply_overrides,
)
from ssmclip.data.pairs.augment import TrainTransform, crop_box, window_around
from ssmclip.models import load_state
from ssmclip.models.features import features_and_saliency, image_features, masked_features
from ssmclip.models.files.weights import WEIGHTS_NAME
from ssmclip.rows import read_rows
from ssmclip.train import train
from ssmclip.train.blueprint import blueprint
from ssmclip.train.build import build_objective, build_trainee, open_stream
from ssmclip.train.checkpoint import checkpoints, load_training_state
from ssmclip.train.ema import Ema, ema_decay
from ssmclip.train.gradient import backward, more_of
from ssmclip.train.objective import OBJECTIVES
from ssmclip.train.self_supervised.a_clip import best, block_scores
from test_slip import formula, rows

TIMM_VIT = {"timm_model_name": "vit_nano_patch16", "timm_pool": "", "timm_proj": "linear", "image_size": 32}
TOWERS = {
    "vmamba": SMALL,
    "vit": {**SMALL, "vision_cfg": VIT},
    "timm": {**SMALL, "vision_cfg": TIMM_VIT},
}


# ---- windows


def test_windows_contain_every_view_and_reach_everywhere_between_them_and_the_picture():
    generator, reached = torch.Generator().manual_seed(0), set()
    for _ in range(10_000):
        draws = torch.rand(3, 30, generator=generator).tolist()
        boxes = [crop_box(50, 40, (0.5, 1.0), (3 / 4, 4 / 3), each) for each in draws[:2]]
        left, top, right, bottom = window_around(boxes, 50, 40, draws[2][:4])
        assert 0 <= left <= min(b[0] for b in boxes)
        assert 0 <= top <= min(b[1] for b in boxes)
        assert max(b[2] for b in boxes) <= right <= 50
        assert max(b[3] for b in boxes) <= bottom <= 40
        reached |= {("left", left), ("top", top), ("right", right), ("bottom", bottom)}
    assert {("left", 0), ("top", 0), ("right", 50), ("bottom", 40), ("left", 5), ("bottom", 35)} <= reached


@pytest.mark.parametrize("flip", [False, True])
def test_places_say_where_views_are_in_the_window(flip):
    """In a picture whose colours are coordinates, the edges of a view are where its place in the window says."""
    x, y = np.meshgrid(np.arange(200), np.arange(160))
    picture = np.stack([x, y, 0 * x], -1).astype(np.uint8)
    transform = TrainTransform(64, (0.5,) * 3, (0.5,) * 3, flip=flip, interpolation="bilinear", window=True)
    mirrored = 0
    for seed in range(12):
        views, places = transform.views(picture, torch.Generator().manual_seed(seed), 2)
        *views, window = (view.double() for view in views)
        sides = []
        for channel, axis in ((0, 2), (1, 1)):  # of a ramp from a to b that is resized to 64 cells
            first, last = window[channel].select(axis - 1, 0).mean(), window[channel].select(axis - 1, -1).mean()
            step = (last - first) / 63
            sides.append((first - step / 2, 64 * step))
        for view, (left, top, right, bottom, turned) in zip(views, places, strict=True):
            view = view.flip(-1) if turned else view
            mirrored += int(turned)
            for channel, low, high in ((0, left, right), (1, top, bottom)):
                start, size = sides[channel]
                middle = view[channel].mean()
                assert start + size * (low + high) / 2 == pytest.approx(middle.item(), abs=1.5)
                spread = view[channel].amax() - view[channel].amin()
                assert size * (high - low) == pytest.approx(spread.item() * 64 / 63, abs=4)
    assert (0 < mirrored < 24) if flip else mirrored == 0


def test_a_batch_has_a_window_and_places_for_each_image_and_the_views_of_clip():
    config = settings()
    clip = apply_overrides(config, ["loss.kind=clip"])
    ours, plain = (next(open_stream(c, blueprint(c), 32, 0, 1)) for c in (config, clip))
    assert torch.equal(ours.images.unflatten(0, (6, 3))[:, :2].flatten(0, 1), plain.images)
    assert ours.boxes.shape == (12, 5)
    assert plain.boxes is None
    assert more_of(plain) == {}


# ---- what matters


@pytest.mark.parametrize("readout", ["mean", "first"])
def test_a_vit_of_timms_attends_as_timm_says(readout):
    """timm's own maps, mean over layers and heads, from the class token or from all patches."""
    name = f'vit_nano_patch16.readout="{readout}"'
    fused = timm.layers.use_fused_attn()
    timm.layers.set_fused_attn(False)
    try:
        model = a_clip({**SMALL, "vision_cfg": {**TIMM_VIT, "timm_model_name": name}})
    finally:
        timm.layers.set_fused_attn(fused)
    images = rows(2, 3, 48, 32, seed=0, dtype=torch.float32)
    maps = torch.stack(list(AttentionExtract(model.visual.trunk, method="hook")(images).values()))
    queries = slice(1, None) if readout == "mean" else slice(0, 1)
    expected = maps[:, :, :, queries, 1:].mean((0, 2, 3)).unflatten(1, (3, 2))
    with torch.no_grad():
        features, saliency = features_and_saliency(model, images)
        torch.testing.assert_close(saliency, expected, rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(features, image_features(model, images)[0])


def test_open_clips_vit_attends_as_torch_says(monkeypatch):
    model, images = a_clip(TOWERS["vit"]), rows(2, 3, 32, 32, seed=0, dtype=torch.float32)
    with torch.no_grad():
        features, saliency = features_and_saliency(model, images)
        torch.testing.assert_close(features, image_features(model, images)[0])
    maps = []
    plain = torch.nn.MultiheadAttention.forward

    def told(self, *given, need_weights=False, **how):
        out = plain(self, *given, need_weights=True, **how)
        maps.append(out[1])
        return out

    monkeypatch.setattr(torch.nn.MultiheadAttention, "forward", told)
    with torch.no_grad():
        image_features(model, images)
    assert len(maps) == VIT["layers"]
    expected = torch.stack(maps).mean(0)[:, 0, 1:].unflatten(1, (4, 4))
    torch.testing.assert_close(saliency, expected, rtol=1e-5, atol=1e-7)


def test_of_a_scan_each_position_has_its_share_of_the_pooled_features():
    """The mean of a position's product with the pooled mean; together they make up the mean's squared length."""
    model, images = a_clip(SMALL), rows(2, 3, 96, 64, seed=0, dtype=torch.float32)
    with torch.no_grad():
        features, saliency = features_and_saliency(model, images)
        last = model.visual.trunk.forward_features(images)
        torch.testing.assert_close(features, image_features(model, images)[0])
    assert saliency.shape == last.shape[:3]
    mean = last.mean((1, 2))
    torch.testing.assert_close(saliency.sum((1, 2)), mean.square().sum(1), rtol=1e-4, atol=1e-6)
    one = (last[1, 0, 1] @ mean[1]) / (last.shape[1] * last.shape[2])
    torch.testing.assert_close(saliency[1, 0, 1], one, rtol=1e-4, atol=1e-6)


def by_points(saliency, box, rows_, columns):
    """The mean of four bilinear samples in each block, cell by cell; centres of cells are at 0.5, 1.5 ..."""
    height, width = saliency.shape
    left, top, right, bottom, mirrored = box.tolist()

    def sample(x, y):
        x, y = (min(max(v - 0.5, 0), n - 1) for v, n in ((x, width), (y, height)))
        x0, y0 = min(int(x), width - 2), min(int(y), height - 2)
        a, b = x - x0, y - y0
        top_, low = ((1 - a) * saliency[r, x0] + a * saliency[r, x0 + 1] for r in (y0, y0 + 1))
        return (1 - b) * top_ + b * low

    out = torch.zeros(rows_, columns, dtype=torch.float64)
    for i in range(2 * rows_):
        for j in range(2 * columns):
            x = width * (left + (right - left) * (j + 0.5) / (2 * columns))
            y = height * (top + (bottom - top) * (i + 0.5) / (2 * rows_))
            out[i // 2, j // 2] += sample(x, y) / 4
    return out.flip(1) if mirrored else out


def test_scores_of_blocks_are_the_map_under_them():
    saliency = rows(2, 6, 8, seed=0).abs()
    boxes = torch.tensor([[0, 0, 1, 1, 0], [0.1, 0.2, 0.8, 0.9, 0], [0.3, 0.0, 0.9, 0.5, 1], [0, 0, 1, 1, 1]]).double()
    made = block_scores(saliency, boxes, 3, 4)
    for i, box in enumerate(boxes):
        torch.testing.assert_close(made[i], by_points(saliency[i // 2], box, 3, 4), rtol=1e-9, atol=1e-12)
    whole = saliency[0].unflatten(0, (3, 2)).unflatten(2, (4, 2)).mean((1, 3))
    torch.testing.assert_close(made[0], whole)


def test_the_published_share_of_blocks_stays():
    """25 of 49, as the published code keeps of 224 pixels; 5 of 9; all, and never none."""
    scores = rows(3, 7, 7, seed=0)
    kept = best(scores, MaskConfig().keep_rate)
    assert kept.sum((1, 2)).tolist() == [25] * 3
    assert scores[kept].view(3, -1).amin(1).gt(scores[~kept].view(3, -1).amax(1)).all()
    assert [int(best(rows(1, 3, 3, seed=1), share).sum()) for share in (0.5, 1.0, 1e-6, 1 / 3)] == [5, 9, 1, 3]


# ---- masked views


@pytest.mark.parametrize("tower", TOWERS)
def test_what_is_masked_is_not_seen_and_the_rest_is(tower):
    size, block = (32, 16) if tower != "timm" else (64, 16)
    changes = {**TOWERS[tower], "vision_cfg": {**TOWERS[tower]["vision_cfg"], "image_size": size}}
    model = a_clip(changes)
    images = rows(2, 3, size, size, seed=0, dtype=torch.float32).requires_grad_()
    blocks = size // block
    keep = torch.zeros(2, blocks, blocks, dtype=torch.bool)
    keep[0, 0, 1] = keep[0, 1, 1] = keep[1, 1, 0] = keep[1, 0, 0] = True
    features, embedded = masked_features(model, images, keep)
    (features.sum() + embedded.sum()).backward()
    seen = interpolate(keep.float()[:, None], scale_factor=block)[:, 0] > 0
    touched = images.grad.abs().sum(1)
    assert (touched[~seen] == 0).all()
    assert (touched[seen] > 0).float().mean() > 0.9
    whole = masked_features(model, images, torch.ones_like(keep))
    for one, two, three in zip(whole, masked_features(model, images, None), image_features(model, images), strict=True):
        torch.testing.assert_close(one, three)
        torch.testing.assert_close(two, three)


def test_a_vit_computes_the_kept_tokens_alone_at_their_own_positions():
    """timm's blocks, run by hand on these tokens."""
    model = a_clip({**SMALL, "vision_cfg": {**TIMM_VIT, "image_size": 64}})
    images, trunk = rows(1, 3, 64, 64, seed=0, dtype=torch.float32), model.visual.trunk
    keep = torch.zeros(1, 2, 2, dtype=torch.bool)
    keep[0, 1, 0] = True
    with torch.no_grad():
        tokens = trunk._pos_embed(trunk.patch_embed(images))
        chosen = trunk.norm(trunk.blocks(tokens[:, [0, 9, 10, 13, 14]]))  # the class token, rows 2 and 3, columns 0, 1
        expected = trunk.fc_norm(chosen[:, 1:].mean(1))
        features, _ = masked_features(model, images, keep)
    torch.testing.assert_close(features, expected, rtol=1e-5, atol=1e-6)


# ---- the objective


def settings(*overrides, tower="vmamba", **loss):
    config = TrainConfig(
        steps=4,
        batch_size=6,
        device="cpu",
        model=ModelConfig(changes=TOWERS[tower]),
        data=DataConfig(image_sizes=((0.0, 32),), views_per_image=2),
        optimiser=OptimiserConfig(lr=1e-2),
        schedule=ScheduleConfig(warmup_steps=1),
        loss=LossConfig(kind="a-clip", ssl=SslConfig(head_width=8, head_features=6), mask=MaskConfig(block=8), **loss),
        ema=EmaConfig(0.9, "cosine"),
        checkpoint=CheckpointConfig(every=2, keep=9),
        logging=LoggingConfig(every=1, tensorboard=False, progress=False),
    )
    return apply_overrides(config, overrides)


def test_the_loss_is_the_weighted_sum_of_the_three():
    image, text = (normalize(rows(*shape, seed=i), dim=-1) for i, shape in enumerate([(8, 5), (4, 5)]))
    heads, predictions, aims = rows(8, 6, seed=2), rows(8, 6, seed=3), rows(4, 6, seed=4)
    given = dict(image_features=image, text_features=text, logit_scale=torch.tensor(9.0, dtype=torch.float64))
    given |= dict(ssl=heads, predictions=predictions, projections=aims)
    for value in given.values():
        value.requires_grad_()

    def clip(a, b):
        logits = 9 * a @ b.T
        return -(logits.softmax(1).diag().log() + logits.softmax(0).diag().log()).mean() / 2

    def distance(p, q):
        return sum(2 - 2 * (a @ b) / (a.norm() * b.norm()) for a, b in zip(p, q, strict=True)) / len(p)

    objective = OBJECTIVES["a-clip"](LossConfig(ssl=SslConfig(weight=0.5)), views=2)
    value = objective(**given)
    expected = (clip(image[::2], text) + clip(image[1::2], text)) / 2
    expected = expected + 0.5 * formula(heads[::2], heads[1::2], 0.1)
    expected = expected + 2 * (distance(predictions[::2], aims) + distance(predictions[1::2], aims)) / 2
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=0)
    value.backward()
    assert aims.grad is None
    assert predictions.grad.abs().sum() > 0

    published = OBJECTIVES["a-clip"](LossConfig(ssl=SslConfig(as_published=True)), views=2)
    published(**given)
    torch.testing.assert_close(
        published.parts["loss_ssl"], formula(heads[::2], heads[::2], 0.1).detach(), rtol=1e-12, atol=0
    )


def prepared(config, seed=1):
    """The objective, what is trained, and another average."""
    objective, model = build_objective(config), a_clip(config.model.changes, seed)
    trainee = build_trainee(model, objective).double()
    average = copy.deepcopy(trainee).eval().requires_grad_(False)
    with torch.no_grad():
        for p in average.parameters():
            p.mul_(1.1).add_(0.01)
    objective.follow(average)
    return objective, trainee, average


@pytest.mark.parametrize("choice", ["attentive", "inverse", "random", "all"])
@pytest.mark.parametrize("tower", ["vmamba", "vit"])
def test_the_average_chooses_what_each_view_shows(tower, choice):
    objective, trainee, average = prepared(settings(f"mask.choice={choice}", tower=tower))
    images, texts = rows(3 * 3, 3, 32, 32, seed=2), torch.arange(1, 49).view(3, 16)
    boxes = torch.tensor([[0, 0, 1, 1, 0], [0.25, 0.25, 1, 1, 0]] * 3).double()
    views, targets = objective.inputs(images, texts, boxes=boxes)
    assert torch.equal(views, images.unflatten(0, (3, 3))[:, :2].flatten(0, 1))
    with torch.no_grad():
        features, saliency = features_and_saliency(average.model, images[2::3])
        torch.testing.assert_close(targets["projections"], average.heads["projector"](features))
    if choice == "all":
        assert targets["keep"] is None
    else:
        assert targets["keep"].shape == (6, 4, 4)
        assert (targets["keep"].sum((1, 2)) == 8).all()
        if choice in ("attentive", "inverse") and tower == "vit":  # of one cell, all blocks matter alike
            scores = torch.stack([by_points(saliency[i // 2].double(), box, 4, 4) for i, box in enumerate(boxes)])
            kept, left = (scores[mask].view(6, 8) for mask in (targets["keep"], ~targets["keep"]))
            low, high = (left, kept) if choice == "attentive" else (kept, left)
            assert (low.amax(1) <= high.amin(1) + 1e-9).all()
    value = objective.of_batch(trainee, views, targets)
    value.backward()
    assert all(p.grad is not None for p in trainee.heads.parameters())
    assert all(p.grad is None for p in average.parameters())


def test_micro_batches_give_the_gradient_of_heads_that_see_one_each():
    config = settings("mask.choice=random")
    objective, trainee, _ = prepared(config)
    images, texts = rows(6 * 3, 3, 32, 32, seed=2), torch.arange(1, 97).view(6, 16)
    boxes = torch.tensor([[0, 0, 1, 1, 0.0]] * 12).double()
    torch.manual_seed(0)
    value = backward(Accelerator(cpu=True), trainee, objective, images, texts, 4, {"boxes": boxes})
    other_objective, other, _ = prepared(config)
    torch.manual_seed(0)
    given = [((0, 4), (0, 12), (0, 8)), ((4, 6), (12, 18), (8, 12))]
    inputs = [other_objective.inputs(images[slice(*i)], texts[slice(*t)], boxes=boxes[slice(*b)]) for t, i, b in given]
    parts = [other_objective.outputs(other, *each) for each in inputs]
    joined = {name: torch.cat([part[name] for part in parts]) for name in objective.rows}
    whole = other_objective(**joined, logit_scale=parts[0]["logit_scale"])
    whole.backward()
    assert value.item() == pytest.approx(whole.item(), rel=1e-12)
    for (name, one), two in zip(trainee.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(one.grad, two.grad, rtol=1e-8, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")


def test_heads_are_the_published_ones_and_only_those_with_a_weight():
    config = settings("head_width=4096", "head_features=256", tower="vit")
    heads = build_objective(config).heads(a_clip(TOWERS["vit"]))
    shapes = {name: [tuple(p.shape) for p in head.parameters() if p.ndim > 1] for name, head in heads.items()}
    assert shapes == {
        "ssl": [(4096, 32), (4096, 4096), (256, 4096)],
        "projector": [(4096, 32), (256, 4096)],
        "predictor": [(4096, 256), (256, 4096)],
    }
    assert not any("0.bias" in name or "3.bias" in name for name in heads["projector"].state_dict())
    config = settings("ema_weight=0", "loss.ssl.weight=0", "views_per_image=1")
    assert len(build_objective(config).heads(a_clip())) == 0


def test_the_teachers_momentum_is_the_published_one():
    quarters = [ema_decay(step, 4, 0.996, "cosine") for step in range(5)]
    assert quarters == pytest.approx([0.996, 0.99659, 0.998, 0.99941, 1.0], abs=5e-6)


# ---- a run


def learnt(run):
    names = ("loss", "loss_clip", "loss_ssl", "loss_ema", "grad_norm", "logit_scale")
    return {(r.where["step"], r.metric): r.value for r in read_rows(run / "rows.jsonl")[1] if r.metric in names}


@pytest.mark.parametrize(
    ("tower", "overrides"),
    [("timm", ["micro_batch=4", "block=16"]), ("vmamba", ["mask.choice=random", "flip=true"])],
    ids=["vit", "scan"],
)
def test_a_run_goes_on_exactly_with_its_teacher(tmp_path, tower, overrides):
    config = settings(*overrides, tower=tower)
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    train(config, whole)
    numbers = learnt(whole)
    assert len(numbers) == 4 * 6
    assert all(math.isfinite(value) for value in numbers.values())
    shutil.copytree(whole, resumed)
    for later in checkpoints(resumed)[1:]:
        shutil.rmtree(later)
    train(config, resumed, resume=True)
    assert learnt(resumed) == numbers
    ends = [load_state(checkpoints(run)[-1] / WEIGHTS_NAME) for run in (whole, resumed)]
    assert ends[0].keys() == a_clip(config.model.changes).state_dict().keys()
    states = [load_training_state(checkpoints(run)[-1]) for run in (whole, resumed)]
    for one, two in (ends, [state["heads"] for state in states], [state["online"] for state in states]):
        assert one.keys() == two.keys()
        assert all(torch.equal(value, two[name]) for name, value in one.items())
    assert any(not torch.equal(states[0]["heads"][n], states[0]["online"][f"heads.{n}"]) for n in states[0]["heads"])


def test_the_teacher_is_the_moving_average_of_what_is_trained():
    config = settings()
    objective, model = build_objective(config), a_clip()
    trainee = build_trainee(model, objective)
    ema = Ema(trainee)
    objective.follow(ema.model)
    before = copy.deepcopy(ema.model.state_dict())
    with torch.no_grad():
        for p in trainee.parameters():
            p.add_(1.0)
    ema.update(trainee, 0.75)
    (average,) = objective._average
    for name, p in average.named_parameters():
        torch.testing.assert_close(p, before[name] + 0.25, msg=name)


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["ema.decay=none"], r"ema.decay must be set for loss.kind=a-clip, whose teacher is .* \(got none\)"),
        (["views_per_image=1"], r"data.views_per_image must be at least 2 for loss.kind=a-clip \(got 1\)"),
        (["patch_drop_rate=0.5"], r"model.patch_drop_rate must be none .* \(got 0.5\): set loss.mask.keep_rate"),
        (["mask.block=24"], r"loss.mask.block must divide images of 32 pixels \(got 24\)"),
        (["multi_sizes=[[32, 36], [32, 32]]"], r"loss.mask.block must divide images of 36 pixels \(got 8\)"),
        (["data.augment.library=timm"], r"data.augment.library must be own for loss.kind=a-clip"),
        (["compile=true"], r"model.compile must be false for loss.kind=a-clip"),
        (['ssl.augment={"flip": false}'], r"loss.ssl.augment must be {} for loss.kind=a-clip .*: set data.augment"),
    ],
)
def test_settings_that_it_cannot_do_with_are_refused_before_there_is_a_folder(tmp_path, overrides, told):
    with pytest.raises(ValueError, match=told):
        train(settings(*overrides), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_blocks_that_cut_patches_are_refused():
    objective = build_objective(settings("mask.block=4", tower="vit"))
    with pytest.raises(ValueError, match=r"loss.mask.block must be a multiple of patches of 8 \(got 4\)"):
        objective.heads(a_clip(TOWERS["vit"]))
