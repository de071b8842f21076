"""Every registered encoder keeps timm's contract, every CLIP open_clip's; files that are no checkpoints are refused."""

import os
import pickle

import open_clip
import pytest
import timm
import tokenizers
import torch
from einops import rearrange
from timm.models._manipulate import group_parameters
from torch import nn

import ssmclip
from ssmclip import ops
from ssmclip.models import (
    CheckpointError,
    build_tokenizer,
    clip_config,
    create_clip,
    load_config,
    load_state,
    load_tokenizer,
    save_tokenizer,
)
from ssmclip.models.files.weights import WEIGHTS_NAME, load_into
from ssmclip.models.networks import vmamba
from ssmclip.registry import UnknownName

# Counted by running the original code, 1000-class head included.
PUBLISHED_PARAMETERS = {
    "vmamba_tiny_s1l8": 30_249_064,
    "vmamba_tiny_s2l5": 30_705_832,
    "vmamba_tiny_gated": 32_484_904,
    "vmamba_small_s1l20": 49_012_840,
    "vmamba_small_s2l15": 50_147_752,
    "vmamba_base_s1l20": 86_614_504,
    "vmamba_base_s2l15": 88_557_800,
    "vmamba_tiny_v0": 22_893_448,
    "vmamba_small_v0": 44_417_416,
    "vmamba_base_v0": 76_254_056,
}
PUBLISHED_CLIP_PARAMETERS = {
    "CLIP-VMamba-T220": 95_537_217,
    "CLIP-VMamba-S": 113_200_065,
    "CLIP-VMamba-B": 151_485_185,
}
SMALL = ["test_vmamba", "test_simba", "vit_nano_patch16"]
TINY_FIELDS = dict(dims=(8, 16, 24, 32), depths=(1, 2, 1, 1), num_classes=5)


def parameters(model):
    return sum(p.numel() for p in model.parameters())


def test_every_published_vmamba_is_registered():
    ours = {"vmamba", "vmamba_tiny_gated_conv", "vmamba_nano", "test_vmamba"}
    assert set(PUBLISHED_PARAMETERS) | ours == set(vmamba.VARIANTS) <= set(timm.list_models())


@pytest.mark.parametrize("name", PUBLISHED_PARAMETERS)
def test_parameter_count_is_the_published_one(name):
    with torch.device("meta"):
        assert parameters(timm.create_model(name)) == PUBLISHED_PARAMETERS[name]


@pytest.mark.parametrize("name", PUBLISHED_CLIP_PARAMETERS)
def test_clip_parameter_count_is_the_published_one(name):
    with torch.device("meta"):
        assert parameters(create_clip(name)) == PUBLISHED_CLIP_PARAMETERS[name]


def test_nano_towers_have_the_same_budget():
    with torch.device("meta"):
        mamba, vit = (parameters(timm.create_model(n, num_classes=0)) for n in ("vmamba_nano", "vit_nano_patch16"))
    assert abs(mamba - vit) / mamba < 0.1
    assert 2.5e6 < mamba < 3.5e6


@pytest.mark.parametrize("name", SMALL)
@torch.no_grad()
def test_reset_classifier_gives_pooled_features_then_a_new_head(name):
    model = timm.create_model(name, num_classes=7).eval()
    image = torch.randn(2, 3, 64, 64)
    features = model.forward_head(model.forward_features(image), pre_logits=True)
    head = model.get_classifier()
    torch.testing.assert_close(model(image), features @ head.weight.T + head.bias)
    model.reset_classifier(0)
    torch.testing.assert_close(model(image), features)
    assert features.shape[1] == model.num_features
    model.reset_classifier(3)
    assert model(image).shape == (2, 3)


@pytest.mark.parametrize("name", ["test_vmamba", "test_simba"])
@torch.no_grad()
def test_drop_rate_is_a_dropout_before_the_head(name):
    model = timm.create_model(name, num_classes=7, drop_rate=0.4)
    model.get_classifier().bias.normal_()
    image = torch.randn(2, 3, 32, 32)
    features = model.forward_head(model.forward_features(image), pre_logits=True)
    torch.manual_seed(5)
    truth = model.get_classifier()(nn.Dropout(0.4)(features))
    assert not torch.equal(truth, model.get_classifier()(features))
    torch.manual_seed(5)
    torch.testing.assert_close(model.forward_head(model.forward_features(image)), truth)
    model.eval()  # from here on without it
    features = model.forward_head(model.forward_features(image), pre_logits=True)
    torch.testing.assert_close(model(image), model.get_classifier()(features))


@torch.no_grad()
def test_features_only_gives_what_the_blocks_gave():
    model = timm.create_model("test_vmamba").eval()
    extractor = timm.create_model("test_vmamba", features_only=True).eval()
    missing, unexpected = extractor.model.load_state_dict(model.state_dict(), strict=False)
    assert not missing
    assert all(key.startswith("classifier.") for key in unexpected)
    seen = []
    for stage in model.layers:
        stage.blocks[-1].register_forward_hook(lambda module, inputs, output: seen.append(output))
    image = torch.randn(1, 3, 52, 37)
    model(image)
    maps = extractor(image)
    assert extractor.feature_info.channels() == [m.shape[1] for m in maps]
    for ours, truth in zip(maps, seen, strict=True):
        torch.testing.assert_close(ours, rearrange(truth, "b h w c -> b c h w"))


@pytest.mark.parametrize("name", SMALL)
def test_group_matcher_places_every_parameter(name):
    model = timm.create_model(name)
    grouped = [p for group in group_parameters(model, model.group_matcher()).values() for p in group]
    assert sorted(grouped) == sorted(name for name, _ in model.named_parameters())


@pytest.mark.parametrize("name", SMALL)
def test_grad_checkpointing_changes_no_gradient(name):
    model = timm.create_model(name, num_classes=3).double()
    image = torch.randn(2, 3, 32, 32, dtype=torch.float64)

    def gradients(enable):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        model(image).square().sum().backward()
        return [p.grad.clone() for p in model.parameters()]

    for plain, checkpointed in zip(gradients(False), gradients(True), strict=True):
        torch.testing.assert_close(plain, checkpointed, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("size", [(32, 32), (50, 31)])
@torch.no_grad()
def test_back_ends_agree_in_float64(gated, size):
    model = vmamba.VMamba(**TINY_FIELDS, gated=gated, d_state=2).double().eval()
    image = torch.randn(2, 3, *size, dtype=torch.float64)
    fast = model(image)
    with ops.using("reference"):
        torch.testing.assert_close(fast, model(image), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("size", [(32, 64), (45, 27), (4, 4), (1, 9)])
@torch.no_grad()
def test_a_transposed_image_with_transposed_weights_gives_the_same_features(size):
    """Rows and columns play the same part: holds only if every map shape and every scan order is right."""
    torch.manual_seed(1)
    model = vmamba.VMamba(**TINY_FIELDS).double().eval()
    for p in model.parameters():  # away from the initial values, where directions are alike
        p.add_(0.1 * torch.randn_like(p))
    image = torch.randn(2, 3, *size, dtype=torch.float64)
    upright = model(image)
    swap = torch.tensor([1, 0, 3, 2])
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.weight.copy_(module.weight.transpose(2, 3).clone())
        if isinstance(module, vmamba.SS2D):
            for p in (module.x_proj_weight, module.dt_projs_weight, module.dt_projs_bias):
                p.copy_(p[swap].clone())
            for p in (module.A_logs, module.Ds):
                p.copy_(p.unflatten(0, (4, -1))[swap].flatten(0, 1).clone())
    torch.testing.assert_close(model(image.transpose(2, 3)), upright, rtol=1e-9, atol=1e-11)


def test_fields_are_overridden_as_timm_does():
    model = timm.create_model("vmamba_nano", dims=(8, 16, 24, 32), depths=(1, 1, 1, 1), num_classes=5)
    assert model.num_features == 32
    assert model.get_classifier().out_features == 5
    with pytest.raises(TypeError, match="colour"):
        timm.create_model("vmamba_nano", colour="red")
    with pytest.raises(ValueError, match="same number of stages"):
        timm.create_model("vmamba_nano", depths=(1, 1))


def test_bfloat16_and_autocast_stay_near_float32():
    model = timm.create_model("test_vmamba", num_classes=0).eval()
    image = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        truth = model(image)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert (model(image).float() - truth).norm() / truth.norm() < 3e-2
        assert (model.bfloat16()(image.bfloat16()).float() - truth).norm() / truth.norm() < 6e-2


def test_torch_compile_has_no_graph_break_and_gives_the_same_numbers(untyped):
    model = timm.create_model("test_vmamba", num_classes=4)
    image = torch.randn(2, 3, 32, 32)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    truth = model(image)
    grads = torch.autograd.grad(truth.square().sum(), list(model.parameters()))
    output = compiled(image)
    torch.testing.assert_close(output, truth)
    for a, b in zip(torch.autograd.grad(output.square().sum(), list(model.parameters())), grads, strict=True):
        torch.testing.assert_close(a, b)


@torch.no_grad()
def test_open_clip_and_timm_make_our_models():
    torch.manual_seed(0)
    model, _, _ = open_clip.create_model_and_transforms("CLIP-VMamba-Nano")
    ours = create_clip("CLIP-VMamba-Nano")
    load_into(ours, model.state_dict(), "open_clip")
    image, text = torch.randn(2, 3, 64, 64), open_clip.get_tokenizer("CLIP-VMamba-Nano")(["a dog", "two cats"])
    image_features, text_features, _ = model.eval()(image, text)
    out = ours.eval()(image, text)
    torch.testing.assert_close(out["image_features"], image_features)
    torch.testing.assert_close(out["text_features"], text_features)


@torch.no_grad()
def test_clip_projects_pooled_features_without_bias_or_norm(tiny_clip):
    model, _, _ = tiny_clip
    image = torch.randn(2, 3, 32, 32)
    truth = model.visual.trunk(image) @ model.visual.head.proj.weight.T
    torch.testing.assert_close(model.encode_image(image), truth)


def test_long_captions_keep_their_end_token():
    tokenizer = build_tokenizer(clip_config("CLIP-VMamba-Nano"))
    short, long = tokenizer(["a dog", "dog " * 10_000])
    assert long[-1] == short.max() == 49407
    assert long[1] == long[2] == short[2]


WORDS = ["[PAD]", "[END]", "[UNK]", "a", "dog", "two", "cats"]
CAPTIONS = ["A dog!", "two cats", "a " * 20, ""]
IDS = [[3, 4, 1, 0, 0], [5, 6, 1, 0, 0], [3, 3, 3, 3, 1], [1, 0, 0, 0, 0]]


@pytest.fixture
def own_tokenizer(tmp_path, tiny_config):
    """The folder of a tokenizer of seven words, which `tiny_config` names."""
    transformers = pytest.importorskip("transformers")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel({w: i for i, w in enumerate(WORDS)}, "[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing("$A [END]", special_tokens=[("[END]", 1)])
    folder = tmp_path / "tokenizer"
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", eos_token="[END]", unk_token="[UNK]"
    ).save_pretrained(folder)
    how = dict(hf_tokenizer_name=str(folder), tokenizer_kwargs={"clean": "canonicalize"})
    tiny_config["model_cfg"]["text_cfg"] |= dict(context_length=5, vocab_size=len(WORDS), **how)
    return folder


def test_a_model_that_names_its_own_tokenizer_has_it_and_takes_it_along(tmp_path, tiny_config, own_tokenizer):
    model = create_clip(tiny_config)
    for name in ("saved", "again"):
        if name == "saved":
            ssmclip.save_model(model, tiny_config, tmp_path / name)
            save_tokenizer(tiny_config, tmp_path / name)
            assert build_tokenizer(tiny_config)(CAPTIONS).tolist() == IDS
            own_tokenizer.rename(tmp_path / "elsewhere")
        else:
            ssmclip.convert(tmp_path / "saved", tmp_path / name)
        for read in (ssmclip.load(tmp_path / name).tokenizer, load_tokenizer(tmp_path / name)):
            assert read(CAPTIONS).tolist() == IDS
        assert open_clip.get_tokenizer(f"local-dir:{tmp_path / name}")(CAPTIONS).tolist() == IDS
    with pytest.raises(FileNotFoundError, match=r"could not be downloaded.*hf_tokenizer_name to the path of a folder"):
        build_tokenizer(tiny_config)


def test_a_model_of_open_clip_by_its_name_has_its_own_tokenizer(tiny_config, own_tokenizer, monkeypatch):
    monkeypatch.setattr(open_clip, "get_model_config", lambda name: tiny_config["model_cfg"])
    assert load_tokenizer("open_clip:mine/pretrained")(CAPTIONS).tolist() == IDS
    assert build_tokenizer(clip_config("open_clip:mine"))(CAPTIONS).tolist() == IDS


def test_every_open_clip_model_with_clips_own_tokenizer_has_open_clips():
    for name in ("ViT-B-32", "ViT-S-32-alt", "coca_ViT-B-32"):
        ours, theirs = load_tokenizer(f"open_clip:{name}"), open_clip.get_tokenizer(name)
        assert torch.equal(ours(["two cats", "dog " * 100]), theirs(["two cats", "dog " * 100]))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"text_cf": {"width": 16}}, "unknown key of model_cfg 'text_cf'; did you mean 'text_cfg'.*vision_cfg"),
        ({"vision_cfg": {"foo": 1}}, "unknown key of vision_cfg 'foo'; known: .*image_size"),
        ({"text_cfg": {"widht": 16}}, "unknown key of text_cfg 'widht'; did you mean 'width'"),
        ({"text_cfg": {"mamba": {}, "width": 16}}, "unknown key of text_cfg 'width'; known: .*pad_id"),
    ],
)
def test_an_unknown_key_of_a_configuration_lists_the_known(tiny_config, change, says):
    with pytest.raises(UnknownName, match=says):
        create_clip({"model_cfg": tiny_config["model_cfg"] | change})


def test_a_model_that_writes_captions_is_refused():
    with pytest.raises(ValueError, match=r"multimodal_cfg.*open_clip\.create_model"):
        create_clip("open_clip:coca_ViT-B-32")


def test_saved_model_loads_here_and_in_open_clip(tmp_path, tiny_clip, tiny_config):
    model, preprocess, tokenizer = tiny_clip
    ssmclip.save_model(model, tiny_config, tmp_path / "tiny")
    loaded = ssmclip.load(tmp_path / "tiny")
    theirs, _, their_preprocess = open_clip.create_model_and_transforms(f"local-dir:{tmp_path / 'tiny'}")
    image, text = torch.randn(2, 3, 32, 32), tokenizer(["a dog", "two cats"])
    with torch.no_grad():
        for other in (loaded.model, theirs.eval()):
            torch.testing.assert_close(other.encode_image(image), model.encode_image(image))
            torch.testing.assert_close(other.encode_text(text), model.encode_text(text))
    from PIL import Image

    picture = Image.effect_noise((50, 40), 60).convert("RGB")
    torch.testing.assert_close(loaded.preprocess(picture), preprocess(picture))
    torch.testing.assert_close(their_preprocess(picture), preprocess(picture))


def test_run_folder_loads_its_best_else_its_last_checkpoint(tmp_path, tiny_clip, tiny_config):
    model = tiny_clip[0]
    checkpoints = tmp_path / "checkpoints"
    for step in ("step_1", "step_2"):
        model.logit_scale.data.fill_(float(step[-1]))
        ssmclip.save_model(model, tiny_config, checkpoints / step)
    (checkpoints / "last").write_text("step_2\n")
    assert ssmclip.load(tmp_path).model.logit_scale.item() == 2
    (checkpoints / "best").write_text("step_1\n")
    assert ssmclip.load(tmp_path).model.logit_scale.item() == 1


@torch.no_grad()
def test_load_of_an_open_clip_model_gives_its_own_preprocessing():
    model, preprocess, tokenizer = ssmclip.load("open_clip:ViT-S-32-alt")
    assert preprocess.transforms[-1].mean == open_clip.OPENAI_DATASET_MEAN
    assert model.encode_text(tokenizer(["a dog"])).shape == (1, 256)


def test_image_size_is_an_argument_of_load():
    image = torch.randn(1, 3, 96, 96)
    for name in ("CLIP-VMamba-Nano", "CLIP-ViT-Nano"):
        model, preprocess, _ = ssmclip.load(name, image_size=96)
        assert preprocess.transforms[0].size == 96
        with torch.no_grad():
            assert model.encode_image(image).isfinite().all()


def test_unknown_names_list_the_known():
    with pytest.raises(UnknownName, match=r"CLIP-VMamba-Nano.*CLIP-ViT-B-16|CLIP-ViT-B-16.*CLIP-VMamba-Nano"):
        ssmclip.load("CLIP-VMamba-Nanno")
    with pytest.raises(UnknownName, match="ViT-B-32"):
        ssmclip.load("open_clip:ViT-B-33")
    with pytest.raises(FileNotFoundError, match="no such file or folder"):
        ssmclip.load("runs/never_made")


class Hostile:
    def __reduce__(self):
        return os.system, ("touch HOSTILE_RAN",)


def test_a_pickle_that_runs_code_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": Hostile()}, "hostile.pt")
    with open("plain.pt", "wb") as file:
        pickle.dump(Hostile(), file, protocol=2)
    for path in ("hostile.pt", "plain.pt"):
        with pytest.raises(CheckpointError, match="refused"):
            load_state(path)
    assert not os.path.exists("HOSTILE_RAN")


@pytest.mark.parametrize("name", [WEIGHTS_NAME, "model.pt"])
@pytest.mark.parametrize("share", [0.5, 0])
def test_a_checkpoint_cut_short_is_refused(tmp_path, tiny_clip, tiny_config, name, share):
    ssmclip.save_model(tiny_clip[0], tiny_config, tmp_path)
    torch.save(tiny_clip[0].state_dict(), tmp_path / "model.pt")
    whole = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(CheckpointError, match="truncated"):
        load_state(tmp_path / name)


def test_a_checkpoint_of_another_model_is_refused_and_nothing_is_loaded(tiny_clip):
    model = tiny_clip[0]
    state = model.state_dict()
    wrong = {key: value + 1 for key, value in state.items() if key != "ln_final.bias"}
    wrong["visual.extra"] = torch.zeros(1)
    wrong["text_projection"] = torch.zeros(2, 2)
    before = model.logit_scale.item()
    with pytest.raises(
        CheckpointError, match=r"1 missing: ln_final.bias; 1 not in the model: visual.extra; 1 of another shape"
    ):
        load_into(model, wrong, "wrong.pt")
    assert model.logit_scale.item() == before


def test_a_folder_that_is_no_model_says_what_is_missing(tmp_path):
    with pytest.raises(CheckpointError, match="contains neither"):
        ssmclip.load(tmp_path)
    (tmp_path / "open_clip_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="no 'model_cfg'"):
        load_config(tmp_path)
