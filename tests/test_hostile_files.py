"""Files that somebody damaged or made up, through the readers of every format: an error of ours that names the file."""

import copy
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ssmclip.data.pairs.tables import TableFormat, table_source
from ssmclip.evaluate.search.index import read_index
from ssmclip.files import parse_json
from ssmclip.humans.decide import _open_decisions
from ssmclip.models import CheckpointError, create_clip, load, load_state, load_tokenizer, save_model
from ssmclip.models.files.weights import CONFIG_NAME
from ssmclip.models.names import own_size
from ssmclip.rows import read_rows
from ssmclip.train.checkpoint import config_of_run

DEEP = "[" * 100_000


@pytest.fixture
def folder(tiny_config, tmp_path):
    save_model(create_clip(tiny_config), tiny_config, tmp_path / "model")
    return tmp_path / "model"


def changed(config, path, value):
    """Return a copy of a configuration with another value; None removes the key."""
    config = copy.deepcopy(config)
    *groups, key = path.split(".")
    node = config
    for group in groups:
        node = node[group]
    node[key] = value
    if value is None:
        del node[key]
    return config


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("preprocess_cfg", []),
        ("preprocess_cfg.stl", 1),
        ("preprocess_cfg.interpolation", 5),
        ("model_cfg", []),
        ("model_cfg.zzz", 1),
        ("model_cfg.embed_dim", 10**12),
        ("model_cfg.embed_dim", -1),
        ("model_cfg.embed_dim", 1.5),
        ("model_cfg.vision_cfg", None),
        ("model_cfg.vision_cfg", []),
        ("model_cfg.vision_cfg.image_size", 10**9),
        ("model_cfg.vision_cfg.timm_model_name", "nope"),
        ("model_cfg.vision_cfg.timm_model_name", [1]),
        ("model_cfg.text_cfg", None),
        ("model_cfg.text_cfg.layers", 10**7),  # hours of building
        ("model_cfg.text_cfg.heads", 3),
        ("model_cfg.text_cfg.vocab_size", 10**12),
        ("model_cfg.text_cfg.kind", [1]),
        ("model_cfg.text_cfg.hf_tokenizer_name", [1]),
    ],
)
def test_a_models_configuration_is_named(folder, tiny_config, path, value):
    file = folder / CONFIG_NAME
    file.write_text(json.dumps(changed(tiny_config, path, value)))
    with pytest.raises(CheckpointError) as caught:
        load(folder)
    assert str(file) in str(caught.value)


def test_a_mistake_in_the_call_is_not_blamed_on_the_file(folder):
    with pytest.raises(ValueError, match="the image size must be pixels") as caught:
        load(folder, image_size=-1)
    assert not isinstance(caught.value, CheckpointError)


def test_what_asks_a_configuration_alone_names_it_too(folder, tiny_config):
    (folder / CONFIG_NAME).write_text(json.dumps(changed(tiny_config, "model_cfg.vision_cfg.image_size", "x")))
    with pytest.raises(CheckpointError, match=CONFIG_NAME):
        own_size(folder)
    (folder / CONFIG_NAME).write_text(json.dumps(changed(tiny_config, "model_cfg.text_cfg.kind", "nope")))
    with pytest.raises(CheckpointError, match=CONFIG_NAME):
        load_tokenizer(folder)


def test_json_that_is_nested_too_deep_is_a_value_error(folder, tmp_path):
    with pytest.raises(ValueError, match="nested too deep"):
        parse_json(DEEP)
    (folder / CONFIG_NAME).write_text(DEEP)
    with pytest.raises(CheckpointError, match="nested too deep"):
        load(folder)


@pytest.mark.parametrize(
    "name",
    ["model.safetensors.index.json", 5, [1], "../../etc/passwd", "/etc/passwd", "deep/model.safetensors"],
)
def test_an_index_of_shards_names_files_of_its_folder_alone(tmp_path, name):
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": name, "b": "model-00001.safetensors"}}))
    with pytest.raises(CheckpointError, match=r"index\.json must name files of weights in its own folder"):
        load_state(index)


def test_a_text_file_in_place_of_weights_is_named(tmp_path):
    file = tmp_path / "weights.pt"
    file.write_text("root:x:0:0:root:/root:/bin/bash\n")
    with pytest.raises(CheckpointError, match=r"weights\.pt"):
        load_state(file)


@pytest.mark.parametrize(
    "content",
    [
        DEEP,
        "",
        "[1]",
        "\xff",
        '{"zzz": 1}',
        '{"steps": "x"}',
        '{"steps": -1}',
    ],
    ids=["deep", "empty", "list", "not-utf8", "unknown", "type", "range"],
)
def test_a_runs_settings_are_named(tmp_path, content):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "config.json").write_text(content, encoding="latin-1")
    with pytest.raises(ValueError, match=r"config\.json is not a run's settings .*: restore it, or choose another"):
        config_of_run(tmp_path)


ROW = '{"model": "a", "task": "b", "metric": "c", "value": %s}'


@pytest.mark.parametrize(
    "line",
    [DEEP, ROW % ("1" + "0" * 400), ROW % ('1, "where": {"step": 1' + "0" * 400 + "}"), ROW % ('1, "extra": ' + DEEP)],
    ids=["deep", "number", "step", "extra"],
)
def test_a_line_that_is_no_row_is_named(tmp_path, line):
    file = tmp_path / "rows.jsonl"
    file.write_text(ROW % 1 + "\n" + line + "\n")
    with pytest.raises(ValueError, match=r"rows\.jsonl, line 2: not a result row"):
        read_rows(file)


def flipped(path):
    content = bytearray(path.read_bytes())
    content[10:60] = b"\xff" * 50
    path.write_bytes(content)


def test_a_damaged_table_of_pairs_is_named(tmp_path):
    file = tmp_path / "pairs.parquet"
    pq.write_table(pa.table({"path": ["a.png"], "caption": ["a dog"]}), file)
    flipped(file)
    with pytest.raises(ValueError, match=r"pairs\.parquet is not a readable parquet file"):
        table_source(file, TableFormat("path", "caption"), seed=0, resident_bytes=0)


@pytest.mark.parametrize(("read", "says"), [(read_index, "not an index"), (_open_decisions, "not a file of decisions")])
@pytest.mark.parametrize("damage", ["flipped", "deep"])
def test_damaged_parquet_is_named(tmp_path, read, says, damage):
    """pyarrow raises OSError for pages that it cannot decode."""
    file = tmp_path / "table.parquet"
    marks = DEEP if damage == "deep" else "{}"
    table = pa.table({"path": ["a"], "embedding": [[1.0, 2.0]]})
    pq.write_table(table.replace_schema_metadata({"ssmclip": marks, "made_by": marks}), file)
    if damage == "flipped":
        flipped(file)
    with pytest.raises(ValueError, match=rf"table\.parquet is {says}"):
        read(file)
