"""Settings: typed changes, JSON there and back, errors that say what would do."""

import json
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
        ("steps=many", r"steps=many: wanted a whole number"),
        ("steps=2.5", r"steps=2.5: wanted a whole number"),
        ("steps=true", r"steps=True: wanted a whole number"),
        ("lr=nan", r"optimiser.lr=nan: wanted a number"),
        ("lr=0", r"optimiser.lr=0.0: wanted more than 0"),
        ("clip_norm=-1", r"optimiser.clip_norm=-1.0: wanted more than 0"),
        ("max_logit_scale=1", r"loss.max_logit_scale=1.0: wanted more than 1"),
        ("micro_batch=0", r"loss.micro_batch=0: wanted at least 1"),
        ("shuffle_buffer=0", r"data.shuffle_buffer=0: wanted at least 1"),
        ("workers=-1", r"data.workers=-1: wanted at least 0"),
        ("seed=-1", r"seed=-1: wanted at least 0"),
        ("seed=99999999999999999999", r"seed=99999999999999999999: wanted less than 9223372036854775808"),
        ("ema.decay=1", r"ema.decay=1.0: wanted less than 1"),
        ("drop_path_rate=1.5", r"model.drop_path_rate=1.5: wanted less than 1"),
        ("betas=[0.9, 1]", r"optimiser.betas=\(0.9, 1.0\): wanted at least 0, less than 1"),
        ("scale=[2, 3]", r"data.augment.scale=\(2.0, 3.0\): wanted two shares"),
        ("scale=[0.9, 0.1]", r"data.augment.scale=\(0.9, 0.1\): wanted two shares"),
        ("lr=fast", r"optimiser.lr=fast: wanted a number"),
        ("compile=1", r"model.compile=1: wanted true or false"),
        ("precision=fp8", r"precision='fp8': wanted one of no, bf16, fp16"),
        ("betas=[0.9]", r"optimiser.betas=\[0.9\]: wanted tuple\[float, float\]"),
        ("drop_path_rate=x", r"model.drop_path_rate=x: wanted a number or none"),
        ("every=3", r"setting 'every' could be any of validation.every, checkpoint.every, logging.every"),
        ("lr", r"override 'lr': wanted KEY=VALUE"),
        ("steps=0", r"steps=0: wanted at least 1"),
        ("warmup_steps=1000", r"schedule.warmup_steps=1000: wanted fewer than steps=1000"),
        ("image_sizes=[[0.5, 32]]", r"shares start at 0.0"),
        ("gaussian_blur_prob=10", r"data.augment.gaussian_blur_prob=10.0: wanted a share, 0 to 1"),
        (
            "color_jitter=[0.4, 0.4, 0.2, 0.6]",
            r"color_jitter=\(0.4, 0.4, 0.2, 0.6\): wanted at least 0, of hue at most",
        ),
    ],
)
def test_wrong_value_is_told(override, said):
    with pytest.raises(ValueError, match=said):
        apply_overrides(TrainConfig(), [override])


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
    with pytest.raises(ValueError, match="optimiser=3: wanted a group"):
        from_dict({"optimiser": 3})
    with pytest.raises(ValueError, match="seed='0': wanted a whole number"):
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
        "def a(): return TrainConfig()\ndef b(): return 1\n": "found a, b",
        "x = 1\n": "found none",
        "def a(): return {}\n": "returned dict",
    }.items():
        bad = tmp_path / "bad.py"
        bad.write_text(head + text)
        with pytest.raises(ValueError, match=said):
            load_recipe(bad)
    with pytest.raises(FileNotFoundError, match=r"no recipe .*gone.py; recipes in .*: bad.py, good.py"):
        load_recipe(tmp_path / "gone.py")


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("notes.md", "# Notes\n", "notes.md is no Python file: a recipe is one, NAME.py"),
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
