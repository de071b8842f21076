"""Settings: typed changes, JSON there and back, errors that say what would do."""

import dataclasses
import json
import math
import re
import typing

import pytest

from ssmclip.config import (
    DataConfig,
    ModelConfig,
    OptimiserConfig,
    ScheduleConfig,
    TrainConfig,
    apply_overrides,
    changed_fields,
    from_dict,
    load_recipe,
    to_dict,
)
from ssmclip.registry import UnknownName


@pytest.mark.parametrize(
    ("override", "read", "expected"),
    [
        ("lr=3e-4", lambda c: c.optimiser.lr, 3e-4),
        ("lr=.001", lambda c: c.optimiser.lr, 0.001),
        ("optimiser.lr=1", lambda c: c.optimiser.lr, 1.0),
        ("steps=2000", lambda c: c.steps, 2000),
        ("model.drop_path_rate=0.1", lambda c: c.model.drop_path_rate, 0.1),
        ("drop_path_rate=none", lambda c: c.model.drop_path_rate, None),
        ("compile=True", lambda c: c.model.compile, True),
        ("progress=false", lambda c: c.logging.progress, False),
        ("decay_rule=original", lambda c: c.optimiser.decay_rule, "original"),
        ("source=dir/{0..3}.tar", lambda c: c.data.source, "dir/{0..3}.tar"),
        ("color_jitter=0.4", lambda c: c.data.augment.color_jitter, 0.4),
        ("color_jitter=[0.4, 0.4, 0.2, 0]", lambda c: c.data.augment.color_jitter, (0.4, 0.4, 0.2, 0.0)),
        ("source=a=b", lambda c: c.data.source, "a=b"),
        ("betas=[0.8, 0.9]", lambda c: c.optimiser.betas, (0.8, 0.9)),
        ("image_sizes=[[0, 32], [0.5, 48]]", lambda c: c.data.image_sizes, ((0.0, 32), (0.5, 48))),
        ("image_sizes=[[0, 32], [0.5, 48, 64]]", lambda c: c.data.image_sizes, ((0.0, 32), (0.5, 48, 64))),
        ("multi_sizes=[[32, 48], [40, 40]]", lambda c: c.data.multi_sizes, ((32, 48), (40, 40))),
        ('sources=[["a.tar", 3], ["b.tar", 0.5]]', lambda c: c.data.sources, (("a.tar", 3.0), ("b.tar", 0.5))),
        ('captions={"title": 0.5, "txt": 1}', lambda c: c.data.captions, {"title": 0.5, "txt": 1}),
        ('tasks=["digits"]', lambda c: c.validation.tasks, ("digits",)),
        ('changes={"embed_dim": 8}', lambda c: c.model.changes, {"embed_dim": 8}),
    ],
)
def test_override_has_the_fields_type(override, read, expected):
    value = read(apply_overrides(TrainConfig(), [override]))
    assert value == expected
    assert type(value) is type(expected)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("steps=many", r"steps must be a whole number \(got many\)"),
        ("steps=2.5", r"steps must be a whole number \(got 2.5\)"),
        ("steps=true", r"steps must be a whole number \(got True\)"),
        ("lr=nan", r"optimiser.lr must be a number \(got nan\)"),
        ("scale=[2, 3]", r"data.augment.scale must be two shares above 0, the smaller one first \(got \(2.0, 3.0\)\)"),
        ("scale=[0.9, 0.1]", r"data.augment.scale must be two shares above 0.*got \(0.9, 0.1\)"),
        ("lr=fast", r"optimiser.lr must be a number \(got fast\)"),
        ("compile=1", r"model.compile must be true or false \(got 1\)"),
        ("precision=fp8", r"precision must be one of no, bf16, fp16 \(got 'fp8'\)"),
        ("betas=[0.9]", r"optimiser.betas must be tuple\[float, float\] as JSON \(got \[0.9\]\)"),
        ("drop_path_rate=x", r"model.drop_path_rate must be a number or none \(got x\)"),
        ("every=3", r"setting 'every' is ambiguous: write one of validation.every, checkpoint.every, logging.every"),
        ("lr", r"a change to a setting must be KEY=VALUE \(got 'lr'\)"),
        ("warmup_steps=1000", r"schedule.warmup_steps must be less than steps=1000 \(got 1000\)"),
        ("view_weight=0.5", r"loss.view_weight must be 0 when data.views_per_image is 1 \(got 0.5\)"),
        ("image_sizes=[[0.5, 32]]", r"data.image_sizes must be pairs .*shares start at 0.0"),
        ("image_sizes=[[0, 0]]", r"data.image_sizes must have sizes of at least 1 pixel"),
        ("image_sizes=[[0, 32, 0]]", r"data.image_sizes must have sizes of at least 1 pixel"),
        ("multi_sizes=[[32, 0]]", r"data.multi_sizes must have sizes of at least 1 pixel"),
        ("multi_sizes=[32]", r"data.multi_sizes must be tuple.* as JSON \(got \[32\]\)"),
        ('sources=[["a.tar", -1]]', r"data.sources must have weights of at least 0 \(got \(\('a.tar', -1.0\),\)\)"),
        ('sources=[["a.tar", 0], ["b.tar", 0]]', r"data.sources must have a weight above 0"),
        ('sources=[["a.tar", 1], ["a.tar", 2]]', r"data.sources must name each source once"),
        ('sources=["a.tar"]', r"data.sources must be tuple.* as JSON"),
        ('captions={"title": 0}', r"data.captions must have a probability above 0 for 'title'"),
        ('captions={"title": "x"}', r"data.captions must be dict\[str, float\] as JSON"),
        ("cache_gib=2", r"data.cache_gib must be none without data.cache_dir \(got 2.0\)"),
        (
            "color_jitter=[0.4, 0.4, 0.2, 0.6]",
            r"color_jitter must be at least 0, and of the hue at most 0.5 \(got \(0.4, 0.4, 0.2, 0.6\)\)",
        ),
    ],
)
def test_wrong_value_is_told(override, said):
    with pytest.raises(ValueError, match=said):
        apply_overrides(TrainConfig(), [override])


# Each range: the field's full name, what it must be, values just outside it, values just inside.
RANGES = [
    ("steps", "at least 1", [0], [1]),
    ("batch_size", "at least 1", [0], [1]),
    ("seed", "at least 0", [-1], [0]),
    ("seed", "less than 9223372036854775808", [2**63], [2**63 - 1]),
    ("model.drop_path_rate", "at least 0", [-0.1], [0.0, None]),
    ("model.drop_path_rate", "less than 1", [1.0], [0.99]),
    ("model.unlocked_image_groups", "at least 0", [-1], [0]),
    ("model.unlocked_text_groups", "at least 0", [-1], [1]),
    ("model.head_init_scale", "more than 0", [0.0], [1e-3]),
    ("data.augment.color_jitter_prob", "at least 0", [-0.1], [0.0]),
    ("data.augment.color_jitter_prob", "at most 1", [1.1], [1.0]),
    ("model.patch_drop_rate", "at least 0", [-0.1], [0.0, None]),
    ("model.patch_drop_rate", "less than 1", [1.0], [0.99]),
    ("data.augment.gray_scale_prob", "at least 0", [-0.1], [0.0]),
    ("data.augment.gray_scale_prob", "at most 1", [1.1], [1.0]),
    ("data.augment.gaussian_blur_prob", "at least 0", [-0.1], [0.0]),
    ("data.augment.gaussian_blur_prob", "at most 1", [10.0], [1.0]),
    ("data.augment.solarize_prob", "at least 0", [-0.1], [0.0]),
    ("data.augment.solarize_prob", "at most 1", [1.1], [1.0]),
    ("data.augment.erase_prob", "at least 0", [-0.1], [0.0]),
    ("data.augment.erase_prob", "at most 1", [1.1], []),
    ("data.augment.erase_count", "at least 1", [0], [1]),
    ("data.workers", "at least 0", [-1], [0]),
    ("data.shuffle_buffer", "at least 1", [0], [1]),
    ("data.captions_per_image", "at least 1", [0], [1]),
    ("data.length_buckets", "at least 0", [-1], [0]),
    ("data.cache_gib", "more than 0", [0.0, -1.0], [1e-3, None]),
    ("data.retries", "at least 0", [-1], [0]),
    ("data.views_per_image", "at least 1", [0], [1]),
    ("optimiser.lr", "more than 0", [0.0, -1.0, math.nan], [1e-9]),
    ("optimiser.block_lr_scale", "at least 0", [-0.1], [0.0]),
    ("optimiser.image_lr_scale", "at least 0", [-0.1], [0.0]),
    ("optimiser.text_lr_scale", "at least 0", [-0.1], [0.0]),
    ("optimiser.layer_decay", "more than 0", [0.0], [0.1, None]),
    ("optimiser.layer_decay", "at most 1", [1.1], [1.0]),
    ("optimiser.text_layer_decay", "more than 0", [0.0], [0.1, None]),
    ("optimiser.text_layer_decay", "at most 1", [1.1], [1.0]),
    ("optimiser.betas", "at least 0", [(-0.1, 0.9), (0.9, -0.1)], [(0.0, 0.0)]),
    ("optimiser.betas", "less than 1", [(0.9, 1.0), (1.0, 0.9)], [(0.99, 0.99)]),
    ("optimiser.eps", "more than 0", [0.0], [1e-12]),
    ("optimiser.weight_decay", "at least 0", [-0.1], [0.0]),
    ("optimiser.clip_norm", "more than 0", [0.0, -1.0], [1e-9, None]),
    ("schedule.warmup_steps", "at least 0", [-5], [0]),
    ("schedule.start_lr", "at least 0", [-1e-6], [0.0]),
    ("schedule.end_lr", "at least 0", [-1e-6], [0.0]),
    ("schedule.hold_steps", "at least 1", [0], [1]),
    ("schedule.cooldown_steps", "at least 0", [-1], [0]),
    ("loss.label_smoothing", "at least 0", [-0.1], [0.0]),
    ("loss.label_smoothing", "less than 1", [1.0], [0.9]),
    ("loss.mix.mixup", "at least 0", [-0.1], [0.0]),
    ("loss.mix.cutmix", "at least 0", [-0.1], [0.0]),
    ("loss.mix.prob", "at least 0", [-0.1], [0.0]),
    ("loss.mix.prob", "at most 1", [1.1], [1.0]),
    ("loss.mix.switch_prob", "at least 0", [-0.1], [0.0]),
    ("loss.mix.switch_prob", "at most 1", [1.1], [1.0]),
    ("loss.distill.teacher_scale", "more than 0", [0.0], [1.0]),
    ("loss.distill.weight", "at least 0", [-0.1], [0.0]),
    ("loss.distill.contrastive_weight", "at least 0", [-0.1], [0.0]),
    ("loss.ssl.weight", "at least 0", [-0.1], [0.0]),
    ("loss.ssl.temperature", "more than 0", [0.0], [0.01]),
    ("loss.ssl.head_width", "at least 1", [0], [1]),
    ("loss.ssl.head_features", "at least 1", [0], [1]),
    ("loss.ssl.ema_weight", "at least 0", [-0.1], [0.0]),
    ("loss.mask.keep_rate", "more than 0", [0.0], [0.01]),
    ("loss.mask.keep_rate", "at most 1", [1.1], [1.0]),
    ("loss.mask.block", "at least 1", [0], [1]),
    ("loss.micro_batch", "at least 1", [0], [1, None]),
    ("loss.view_weight", "at least 0", [-0.1], [0.0]),
    ("loss.max_logit_scale", "more than 1", [1.0], [1.1]),
    ("ema.decay", "at least 0", [-0.1], [0.0, None]),
    ("ema.decay", "less than 1", [1.0], [0.999]),
    ("validation.every", "at least 0", [-1], [0]),
    ("checkpoint.every", "at least 1", [0], [1]),
    ("checkpoint.keep", "at least 1", [0], [1]),
    ("logging.every", "at least 1", [0], [1]),
]


def group_of(name):
    """The dataclass that holds a setting, by the setting's full name."""
    kind = TrainConfig
    for part in name.split(".")[:-1]:
        kind = typing.get_type_hints(kind)[part]
    return kind


@pytest.mark.parametrize(("name", "rule", "outside", "inside"), RANGES, ids=lambda part: str(part).replace(" ", "_"))
def test_a_group_alone_refuses_what_is_out_of_range(name, rule, outside, inside):
    group, field = group_of(name), name.rpartition(".")[2]
    for value in outside:
        with pytest.raises(ValueError, match=re.escape(f"{name} must be {rule} (got {value})")):
            group(**{field: value})
    for value in inside:
        more = {"schedule": ScheduleConfig(warmup_steps=0)} if name == "steps" else {}
        assert getattr(group(**{field: value}, **more), field) == value


def test_every_range_is_in_the_table():
    def ranges(kind, prefix=""):
        hints = typing.get_type_hints(kind)
        for field in dataclasses.fields(kind):
            if dataclasses.is_dataclass(hints[field.name]):
                yield from ranges(hints[field.name], f"{prefix}{field.name}.")
            yield from [prefix + field.name] * len(field.metadata.get("bounds", {}))

    assert sorted(ranges(TrainConfig)) == sorted(name for name, *_ in RANGES)


def test_unknown_setting_lists_the_known_ones():
    with pytest.raises(UnknownName) as error:
        apply_overrides(TrainConfig(), ["weight_decoy=1"])
    for known in ("optimiser.weight_decay", "data.source", "steps", "model.name"):
        assert known in str(error.value)
    with pytest.raises(UnknownName, match=r"did you mean 'optimiser.lr'"):
        apply_overrides(TrainConfig(), ["optimizer.lr=1"])


def test_json_round_trip_of_every_field():
    config = TrainConfig(
        steps=77,
        model=ModelConfig(changes={"vision_cfg": {"a": [1, 2]}}, drop_path_rate=0.25),
        data=DataConfig(image_sizes=((0.0, 48), (0.6, 64), (0.9, 96))),
        optimiser=OptimiserConfig(betas=(0.1, 0.2), clip_norm=None),
        schedule=ScheduleConfig(warmup_steps=3),
    )
    assert from_dict(json.loads(json.dumps(to_dict(config)))) == config
    assert set(to_dict(config)) == set(typing.get_type_hints(TrainConfig))


def test_unknown_and_wrong_json_are_errors():
    with pytest.raises(UnknownName, match=r"unknown setting 'data.sauce'.*data.source"):
        from_dict({"data": {"sauce": "x"}})
    with pytest.raises(ValueError, match=r"optimiser must be a group of settings \(got 3\)"):
        from_dict({"optimiser": 3})
    with pytest.raises(ValueError, match=r"seed must be a whole number \(got '0'\)"):
        from_dict({"seed": "0"})


def test_changed_fields_are_named_in_full():
    new = apply_overrides(TrainConfig(), ["lr=1", "steps=5000"])
    assert changed_fields(TrainConfig(), new) == {"steps": (1000, 5000), "optimiser.lr": (1e-3, 1.0)}


@pytest.mark.parametrize("field", ["image_column", "caption_column", "encoding", "separator"])
def test_a_field_that_an_older_run_lacks_has_its_default(field):
    old = to_dict(TrainConfig())
    del old["data"][field]
    assert changed_fields(from_dict(old), TrainConfig()) == {}  # so it can be resumed


def test_image_size_follows_the_schedule():
    config = TrainConfig(steps=200, data=DataConfig(image_sizes=((0.0, 48), (0.6, 64), (0.9, 96))))
    sizes = [config.image_size(step) for step in range(200)]
    assert [sizes.count(s) for s in (48, 64, 96)] == [120, 60, 20]
    assert sizes == sorted(sizes)


def test_recipe_is_one_function_that_returns_a_config(tmp_path):
    head = "from ssmclip.config import TrainConfig, apply_overrides\n"
    good = tmp_path / "good.py"
    good.write_text(head + "def _steps(): return 3000\ndef good(): return TrainConfig(steps=_steps())\n")
    assert load_recipe(good) == TrainConfig(steps=3000)

    for text, said in {
        "def a(): return TrainConfig()\ndef b(): return 1\n": r"must define exactly one public function .*\(got a, b\)",
        "x = 1\n": r"must define exactly one public function .*\(got none\)",
        "def a(): return {}\n": r"must return a TrainConfig \(got dict\)",
    }.items():
        bad = tmp_path / "bad.py"
        bad.write_text(head + text)
        with pytest.raises(ValueError, match=said):
            load_recipe(bad)
    with pytest.raises(FileNotFoundError, match=r"recipe .*gone.py not found; recipes in .*: bad.py, good.py"):
        load_recipe(tmp_path / "gone.py")


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("notes.md", "# Notes\n", r"a recipe must be a Python file, NAME.py \(got .*notes.md\)"),
        ("r.py", "import json\n\ndef a(:\n", r"r.py, line 3: invalid syntax"),
        ("r.py", "import json\nimport nobody_has_this\n", "r.py, line 2: No module named 'nobody_has_this'"),
        (
            "r.py",
            "from ssmclip.config import NoSuchConfig\n",
            "r.py, line 1: cannot import name 'NoSuchConfig'",
        ),
        ("r.py", "\nimport broken_helper\n", r"r.py, line 2: invalid syntax \(broken_helper.py, line 1\)"),
    ],
)
def test_a_recipe_that_cannot_be_read_is_told_with_its_line(tmp_path, monkeypatch, name, text, said):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "broken_helper.py").write_text("def (\n")
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=said):
        load_recipe(tmp_path / name)
