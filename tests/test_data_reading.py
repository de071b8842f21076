"""Files of pairs, captions and names are read as strictly as their rules are clear, by one rule for all readers."""

import csv
import gzip
import io
import json
import os
import random
import tarfile
import zlib
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import webdataset
from PIL import Image, PngImagePlugin
from webdataset.tariterators import base_plus_ext

from ssmclip.analyze.curvature.batches import read_batches
from ssmclip.cli.captions import read_texts
from ssmclip.config import TrainConfig, apply_overrides
from ssmclip.data.delimited import Delimited, read_table
from ssmclip.data.images import BadImage, open_image
from ssmclip.data.lines import read_lines, split_lines
from ssmclip.data.pairs import shards as shards_module
from ssmclip.data.pairs.loader import open_pairs
from ssmclip.data.pairs.samples import generator_for
from ssmclip.data.pairs.shards import count_samples, find_shards, read_shard
from ssmclip.data.pairs.tables import TableFormat, table_source
from ssmclip.data.tars import index_samples, read_keys, split_name
from ssmclip.data.testsets.open import open_dataset
from ssmclip.humans.trials import read_trials
from ssmclip.rows import read_rows
from ssmclip.train.blueprint import blueprint
from ssmclip.train.build import open_stream
from ssmclip.train.progress import truncate_rows


def png(number: int = 0, **options) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (8, 8), (number, 0, 0)).save(out, "PNG", **options)
    return out.getvalue()


def write_tar(path: Path, files) -> Path:
    """files: (name, bytes) in the order in which they are packed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in files.items() if isinstance(files, dict) else files:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def pairs_of(*paths: Path, **table_format) -> list[tuple[str, list[str]]]:
    source = table_source(list(paths), TableFormat(**table_format), seed=0, resident_bytes=10**9)
    return [(sample.key, sample.captions) for sample in source.samples]


def blank(image, generator=None) -> torch.Tensor:
    return torch.zeros(3, 4, 4)


def numbers(texts: list[str]) -> torch.Tensor:
    return torch.tensor([[int(word) for word in text.split()] for text in texts])


# ---- quotes ----------------------------------------------------------------------------------------------------------

ROWS = [f"{i}.jpg,photograph number {i}" for i in range(40)]


def with_lines(lines: dict[int, str], header: str = "image,caption") -> str:
    """A csv whose rows are ROWS but for those given by their line numbers."""
    return "\n".join([header, *(lines.get(number, row) for number, row in enumerate(ROWS, start=2))]) + "\n"


BROKEN = {
    "open to the end": (with_lines({12: '10.jpg,"a quote at its start only'}), "line 12: .*never closed"),
    "open in the last line": (with_lines({41: '39.jpg,"a quote'}), "line 41: .*never closed"),
    "open in the first column": (with_lines({12: '"10.jpg,a quote'}), "line 12: .*never closed"),
    "ended by the quote of another row": (
        with_lines({12: '10.jpg,"a quote', 20: '18.jpg,"another" one'}),
        "line 12: .*text follows the quote that closes it in line 20",
    ),
    "text after the quote": (with_lines({12: '10.jpg,"Hello" he said'}), "line 12: .*text follows the quote"),
    "backslashes": (with_lines({12: r'10.jpg,"a \"big\" dog"'}), "line 12: .*text follows the quote"),
    "ended by a quote at the end of another row": (
        with_lines({12: '10.jpg,"a quote', 20: '18.jpg,at its end"'}),
        r"line 12: .*goes on over several lines, .*'11\.jpg,photograph number 11', looks like a row",
    ),
    "ended in the next row": (with_lines({12: '10.jpg,"a quote', 13: '11.jpg,at its end"'}), "line 12: .*like a row"),
    "empty values between": (
        with_lines({12: '10.jpg,"a quote', 13: '11.jpg,""', 20: '18.jpg,at its end"'}),
        "line 12: .*like a row",
    ),
}


@pytest.mark.parametrize("end", ["\n", "\r\n"], ids=["lf", "crlf"])
@pytest.mark.parametrize("separator", [",", ";", "\t"], ids=["comma", "semicolon", "tab"])
@pytest.mark.parametrize("text", BROKEN, ids=str)
def test_a_quote_that_swallows_rows_is_refused_with_its_line(tmp_path, text, separator, end):
    content, message = BROKEN[text]
    content = content.replace(",", separator).replace("\n", end)
    message = message.replace("jpg,", f"jpg{separator}".encode("unicode_escape").decode().replace("\\", "\\\\"))
    (tmp_path / "a.csv").write_bytes(content.encode())
    with pytest.raises(ValueError, match=rf"a\.csv, {message}"):
        pairs_of(tmp_path / "a.csv")
    (tmp_path / "a.csv.gz").write_bytes(gzip.compress(content.encode("utf-16")))
    with pytest.raises(ValueError, match=rf"a\.csv\.gz, {message}"):
        pairs_of(tmp_path / "a.csv.gz", encoding="utf-16")
    if "row" not in message:  # where rows are inside, the file is well-formed as far as Python can see
        with pytest.raises(csv.Error):
            list(csv.reader(io.StringIO(content, newline=""), delimiter=separator, strict=True))


def test_rows_that_go_before_their_pictures_are_found_by_the_files_that_are_there(tmp_path):
    (tmp_path / "0002").write_bytes(png())
    (tmp_path / "a.csv").write_text('caption,image\n"a quote,0001\nat last,0002\nand another",0003\n')
    with pytest.raises(ValueError, match=r"line 2: .*'at last,0002', looks like a row"):
        pairs_of(tmp_path / "a.csv")


WORDS = [
    "a dog",
    "a, b",
    '"quoted"',
    'a 5" pipe',
    "two\nlines",
    "two\r\nlines",
    "x;y",
    "tab\there",
    " a ",
    "u\u2028v",
    "é",
]
WORDS += ["form\x0cfeed", "next\x85line", "dog, one\ndog, two\n\nthree", "file\x1cseparator", '""']


@pytest.mark.parametrize("quoting", [csv.QUOTE_MINIMAL, csv.QUOTE_ALL, csv.QUOTE_NONNUMERIC])
@pytest.mark.parametrize("separator", [",", ";", "\t", "|"])
@pytest.mark.parametrize("columns", [("image", "caption"), ("caption", "id", "image")])
def test_what_is_well_formed_is_what_pythons_csv_reads(tmp_path, separator, quoting, columns):
    draw = random.Random(0)
    for trial in range(10):
        rows = [
            {
                "image": f"{i}.jpg",
                "caption": " ".join(draw.choices(WORDS, k=draw.randint(1, 4))),
                "id": draw.choice(WORDS),
            }
            for i in range(30)
        ]
        path = tmp_path / f"{trial}.csv"
        with path.open("w", newline="", encoding="utf-8") as file:
            end = draw.choice(["\n", "\r\n"])
            writer = csv.DictWriter(
                file, columns, delimiter=separator, quoting=quoting, lineterminator=end, extrasaction="ignore"
            )
            writer.writeheader()
            writer.writerows(rows)
        with path.open(newline="", encoding="utf-8") as file:
            expected = list(csv.DictReader(file, delimiter=separator, strict=True))
        assert [(row["image"], [row["caption"]]) for row in expected] == sorted_as_read(pairs_of(path))
        text = Delimited(path, path.read_bytes(), separator)
        assert text.count_rows() == len(expected)
        assert list(text.rows()) == expected


def sorted_as_read(pairs: list) -> list:
    """Without the order in which Arrow groups paths."""
    return sorted(pairs, key=lambda pair: int(pair[0].removesuffix(".jpg")))


def test_in_a_tsv_quotes_are_characters(tmp_path):
    (tmp_path / "a.tsv").write_text('image\tcaption\n1.jpg\t"a quote\n2.jpg\ta 5" pipe, or two\n3.jpg\t"whole"\n')
    assert pairs_of(tmp_path / "a.tsv") == [
        ("1.jpg", ['"a quote']),
        ("2.jpg", ['a 5" pipe, or two']),
        ("3.jpg", ['"whole"']),
    ]


@pytest.mark.parametrize("name", ["a.csv", "a.tsv"])
def test_a_carriage_return_that_ends_no_line_is_refused(tmp_path, name):
    separator = "," if name == "a.csv" else "\t"
    text = "image,caption\n1.jpg,a dog\r2.jpg,a cat\n".replace(",", separator)
    (tmp_path / name).write_bytes(text.encode())
    with pytest.raises(ValueError, match=rf"{name}, line 2: a carriage return in the middle of a line"):
        pairs_of(tmp_path / name)
    (tmp_path / name).write_bytes(text.replace("\n", "\r").encode())  # it ends every line
    assert [key for key, _ in pairs_of(tmp_path / name)] == ["1.jpg", "2.jpg"]


def test_a_row_of_another_length_is_named_by_its_line(tmp_path):
    (tmp_path / "a.csv").write_text('image,caption\n\n1.jpg,"two\nlines"\n2.jpg,a,b\n')
    with pytest.raises(ValueError, match=r"a\.csv is not a readable table: line 5: .*Expected 2 columns, got 3"):
        pairs_of(tmp_path / "a.csv")
    with pytest.raises(ValueError, match=r"a\.csv, line 5: must have 2 fields as the header \(got 3\)"):
        read_table(tmp_path / "a.csv")


def test_a_csv_of_trials_is_checked_as_well(tmp_path):
    header = "session,trial,subj,imagename,category,object_response"
    rows = [f"1,1,s1,a{i}.png,dog,dog" for i in range(3)]
    path = tmp_path / "edge_subject-01_session_1.csv"
    path.write_text("\n".join([header, *rows, '1,1,s1,"a.png,dog,dog', *rows]))
    with pytest.raises(ValueError, match=r"edge_subject-01_session_1\.csv, line 5: a quote opens .* never closed"):
        read_trials(path)


# ---- separators, encodings, marks ------------------------------------------------------------------------------------


@pytest.mark.parametrize("separator", [",", ";", "\t", "|"])
@pytest.mark.parametrize("name", ["a.csv", "a.tsv", "a.csv.gz"])
def test_the_header_shows_the_separator(tmp_path, separator, name):
    text = separator.join(["id", "FilePath", "title"]) + "\n" + separator.join(["1", "1.jpg", "cat. dog"]) + "\n"
    data = b"\xef\xbb\xbf" + text.encode()
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    assert pairs_of(tmp_path / name) == [("1.jpg", ["cat. dog"])]


def test_a_separator_is_a_setting_that_the_message_names(tmp_path):
    (tmp_path / "1.jpg").write_bytes(png())
    (tmp_path / "a.csv").write_text("image^caption\n1.jpg^a cat\n")
    config = apply_overrides(TrainConfig(), [f"source={tmp_path}/a.csv", "batch_size=1"])
    with pytest.raises(ValueError, match=r"its columns are image\^caption.*--set data\.separator="):
        open_stream(config, blueprint(config), 16, 0, 1)
    config = apply_overrides(config, ["data.separator=^"])
    assert next(open_stream(config, blueprint(config), 16, 0, 1)).keys == ["1.jpg"]
    (tmp_path / "a.csv").write_text("image,id\tcaption\n1.jpg,7\ta cat\n")
    for tab in ("tab", r"\t", "\t"):
        assert pairs_of(tmp_path / "a.csv", separator=tab, image_column="image,id") == [("1.jpg,7", ["a cat"])]
    with pytest.raises(ValueError, match=r"data\.separator must be one ASCII character or one of comma, tab.*got 'ab'"):
        TableFormat(separator="ab")


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-8-sig", "cp1252", "shift_jis"])
def test_text_of_other_encodings_is_checked_and_read(tmp_path, encoding):
    text = 'image;caption\n1.jpg;"a ""dog""\nruns"\n'
    (tmp_path / "a.csv").write_bytes(text.encode(encoding))
    assert pairs_of(tmp_path / "a.csv", encoding=encoding) == [("1.jpg", ['a "dog"\nruns'])]


def test_utf_16_without_its_name_is_recognised(tmp_path):
    (tmp_path / "a.csv").write_bytes("image,caption\n1.jpg,a\n".encode("utf-16"))
    with pytest.raises(ValueError, match=r"a\.csv is not utf-8: byte 0xff at position 0.*data\.encoding=utf-16"):
        pairs_of(tmp_path / "a.csv")


def test_a_byte_order_mark_is_no_part_of_a_shards_texts(tmp_path):
    mark = b"\xef\xbb\xbf"
    described = json.dumps({"caption": "a cat"}).encode()
    write_tar(
        tmp_path / "0.tar", {"a.png": png(), "a.json": mark + described, "b.png": png(), "b.txt": mark + b"a dog"}
    )
    assert [sample.captions for sample in read_shard(str(tmp_path / "0.tar"))] == [["a cat"], ["a dog"]]
    (tmp_path / "sizes.json").write_bytes(mark + b'{"0.tar": 7}')
    assert count_samples(str(tmp_path / "0.tar")) == 7


def test_json_that_is_nested_too_deep_is_counted(tmp_path):
    write_tar(tmp_path / "0.tar", {"a.png": png(), "a.json": b"[" * 100_000})
    assert [sample.problem for sample in read_shard(str(tmp_path / "0.tar"))] == ["broken json"]
    (tmp_path / "sizes.json").write_bytes(b"[" * 100_000)
    with pytest.raises(ValueError, match=r"sizes\.json is not JSON"):
        count_samples(str(tmp_path / "0.tar"))


# ---- lines -----------------------------------------------------------------------------------------------------------

# All that str.splitlines cuts at but for line feed and carriage return.
MARKS = [mark for mark in map(chr, range(0x110000)) if len(f"a{mark}b".splitlines()) > 1 and mark not in "\n\r"]


def claiming(size: int) -> bytes:
    """A tar of two whole samples, and a picture whose header claims `size` bytes, of which 2,048 follow."""
    content = io.BytesIO()
    with tarfile.TarFile(fileobj=content, mode="w", format=tarfile.GNU_FORMAT) as tar:
        for name in ("a.png", "a.txt", "aa.png", "aa.txt"):
            member = tarfile.TarInfo(name)
            member.size = 4
            tar.addfile(member, io.BytesIO(b"abcd"))
        end = tar.offset
    member = tarfile.TarInfo("b.png")
    member.size = size
    return content.getvalue()[:end] + member.tobuf(tarfile.GNU_FORMAT) + b"x" * 2048


@pytest.mark.parametrize("size", [2**40, 2**62, 2**63, 2**70])
@pytest.mark.parametrize("pack", [bytes, gzip.compress])
def test_a_size_that_a_tar_does_not_have_ends_its_reading(tmp_path, size, pack):
    """tarfile alone reads an ended stream 2^63 / 10,240 times."""
    shard = tmp_path / "0.tar"
    shard.write_bytes(pack(claiming(size)))
    first, last = read_shard(str(shard))
    assert (first.key, first.captions) == ("a", ["abcd"])
    assert last.problem == "truncated shard"
    assert f"{shard} after 1 samples" in last.detail
    assert list(read_keys(str(shard)))[:2] == ["a", "aa"]
    if pack is bytes:
        with pytest.raises(ValueError, match=f"the shard {shard} is damaged after 2 samples: unexpected end of data"):
            index_samples(shard)


def test_a_negative_number_of_samples_is_refused(tmp_path):
    (tmp_path / "sizes.json").write_text('{"0.tar": -5}')
    with pytest.raises(ValueError, match=r"sizes.json: 0.tar must have a number of samples \(got -5\)"):
        count_samples(str(tmp_path / "0.tar"))


def test_lines_end_as_io_ends_them():
    assert len(MARKS) == 8
    for text in ("", "a", "a\n", "\n", "a\n\nb\r\n", "a\r\n\r\n", *(f"a{mark}b\nc" for mark in MARKS)):
        expected = [line.removesuffix("\n").removesuffix("\r") for line in io.StringIO(text, newline="\n")]
        assert split_lines(text) == expected


def test_a_file_that_is_not_utf_8_is_named_with_the_line(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfa\nb\ncaf\xe9\n")
    with pytest.raises(ValueError, match=r"a\.txt, line 3: not UTF-8"):
        read_lines(tmp_path / "a.txt")
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfa\n")
    assert read_lines(tmp_path / "a.txt") == ["a"]


@pytest.mark.parametrize("mark", MARKS, ids=ascii)
def test_no_reader_cuts_a_caption(tmp_path, mark):
    caption = f"a dog{mark}runs"
    file = tmp_path / "texts.txt"
    file.write_bytes(f"{caption}\r\na cat\n".encode())
    assert read_texts(file) == [caption, "a cat"]
    record = {"split": "test", "image_file": "t.png", "file_name": "t.png", "description": caption}
    file = tmp_path / "docci" / "docci_descriptions.jsonlines"
    (file.parent / "images").mkdir(parents=True)
    (file.parent / "images" / "t.png").write_bytes(png())
    # Raw, as JSON allows from a space on; below that it must be escaped.
    line = json.dumps(record, ensure_ascii=ord(mark) < 32)
    file.write_text(line + "\n", encoding="utf-8", newline="\n")
    assert open_dataset("docci", tmp_path).captions == [[caption]]
    assert read_texts(file.rename(tmp_path / "c.jsonl")) == [caption]
    flickr = tmp_path / "flickr8k"
    flickr.mkdir()
    (flickr / "t.jpg").write_bytes(png())
    (flickr / "flickr8k_test_karpathy.txt").write_bytes(f"image,caption\nt.jpg,{caption}\nt.jpg,a cat\n".encode())
    assert open_dataset("flickr8k", tmp_path).captions == [[caption, "a cat"]]
    shards = tmp_path / "of_shards" / "wds_flickr8k" / "test"
    write_tar(shards / "0.tar", {"s.png": png(), "s.txt": f"{caption}\na cat".encode()})
    (shards.parent / "dataset_type.txt").write_text("retrieval")
    assert open_dataset("flickr8k", tmp_path / "of_shards").captions == [[caption, "a cat"]]
    for name, separator in (("a.csv", ","), ("a.tsv", "\t")):
        (tmp_path / name).write_bytes(f"image{separator}caption\n1.jpg{separator}{caption}\n".encode())
        assert pairs_of(tmp_path / name) == [("1.jpg", [caption])]
    rows = tmp_path / "rows.jsonl"
    kept = {"model": "m", "task": "t", "metric": "loss", "value": 1.0, "where": {"step": 3}, "extra": {"of": caption}}
    lines = ['{"run": {}}', json.dumps(kept, ensure_ascii=ord(mark) < 32), '{"cut']
    rows.write_text("\n".join(lines), encoding="utf-8", newline="\n")
    truncate_rows(rows, 5)
    assert [row.extra for row in read_rows(rows)[1]] == [{"of": caption}]


def test_records_that_are_none_are_named_with_file_and_line(tmp_path):
    path = tmp_path / "c.jsonl"
    path.write_text('{"caption": "a"}\n\n{"caption": "b\n')
    with pytest.raises(ValueError, match=r"c\.jsonl, line 3 is not valid JSON"):
        read_texts(path)
    path.write_text('{"caption": "a"}\n["b"]\n')
    with pytest.raises(ValueError, match=r"c\.jsonl, line 2 must be a JSON object"):
        read_texts(path)


@pytest.fixture
def flickr(tmp_path):
    """What is read of a list of captions for 1.jpg, 2.jpg, 3.jpg."""
    folder = tmp_path / "flickr8k"
    folder.mkdir()
    for number in (1, 2, 3):
        (folder / f"{number}.jpg").write_bytes(png(number))

    def captions(text: str) -> list[list[str]]:
        (folder / "flickr8k_test_karpathy.txt").write_bytes(text.encode())
        return open_dataset("flickr8k", tmp_path).captions

    return captions


def test_a_list_of_captions_has_one_on_a_line_whatever_its_quotes(flickr):
    rows = [["1.jpg", 'a "big" dog, running'], ["2.jpg", "a, b"], ["3.jpg", "plain"]]
    for quoting in (csv.QUOTE_MINIMAL, csv.QUOTE_ALL):
        out = io.StringIO()
        csv.writer(out, quoting=quoting).writerows([["image", "caption"], *rows])
        assert flickr(out.getvalue()) == [[caption] for _, caption in rows]
    # As CLIP_benchmark's lists are: nothing is quoted, and a caption may have commas and begin with a quote.
    raw = '1.jpg,"Hello," says a sign\n2.jpg,"a quote that is left open\n3.jpg,a 5" pipe, long\n'
    assert flickr(raw) == [['"Hello," says a sign'], ['"a quote that is left open'], ['a 5" pipe, long']]
    with pytest.raises(ValueError, match=r"karpathy\.txt, line 2: a quote opens a caption and is not closed on"):
        flickr('1.jpg,a\n2.jpg,"two\nlines, or so"\n3.jpg,b\n')
    with pytest.raises(ValueError, match=r"karpathy\.txt, line 2 must be picture,caption \(got 'a cat'\)"):
        flickr("1.jpg,a\na cat\n")


# ---- tars ------------------------------------------------------------------------------------------------------------

NAMES = [
    "a.png",
    "a.b.png",
    "A.PNG",
    "x/a.txt",
    "v1.0/a.seg.png",
    "x/y.z/a.json",
    "./a.png",
    "noext",
    "x/noext",
    "v1.0/n",
]
NAMES += ["x/a.", "__meta__", "__meta__/a.png", "x/__a__/b.png", "/abs/a.png", "a b/c d.e f"]
MAC = ["._a.png", "x/._a.png", "v1.0/._a.png", "./._a.png", ".DS_Store", "x/.DS_Store", "__MACOSX/x/a.png", "._x"]


def test_names_are_split_as_webdataset_splits_them():
    for name in NAMES:
        key, suffix = base_plus_ext(name)
        if name.startswith("__meta__"):  # which its reader of tars leaves out before
            key = suffix = None
        assert split_name(name) == (key, suffix and suffix.lower()), name
    assert {split_name(name) for name in MAC} == {(None, None)}


def of_mac(prefix: str) -> list[tuple[str, bytes]]:
    files = [
        (f"{prefix}{stem}.{suffix}", stem.encode() if suffix == "txt" else png())
        for stem in "ab"
        for suffix in ("png", "txt")
    ]
    folder, _, _ = prefix.rpartition("/")
    beside = [(f"{folder}/._{name.rpartition('/')[2]}".lstrip("/"), b"\0\5\x16\7") for name, _ in files]
    return [(f"{prefix}.DS_Store", b"x"), *(file for both in zip(beside, files, strict=True) for file in both)]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # webdataset leaves its file open
@pytest.mark.parametrize("prefix", ["", "train/", "./", "./train/", "v1.0/train.set/", "/home/x/"])
def test_a_tar_that_a_mac_packed_is_what_webdataset_reads_without_the_macs_files(tmp_path, prefix):
    path = write_tar(tmp_path / "wds_flickr8k/test/0.tar", of_mac(prefix))
    clean = [(name, data) for name, data in of_mac(prefix) if not name.rpartition("/")[2].startswith(".")]
    pipeline = webdataset.WebDataset(
        str(write_tar(tmp_path / "clean.tar", clean)), shardshuffle=False, empty_check=False
    )
    expected = [(sample["__key__"], sample["png"], sample["txt"].decode()) for sample in pipeline]
    assert [key for key, _, _ in expected] == [f"{prefix}a", f"{prefix}b"]
    assert [(s.key, s.image, s.captions[0]) for s in read_shard(str(path))] == expected
    assert count_samples(str(path)) == 2
    indexed = index_samples(path)
    assert [(key, files["png"].read(), files["txt"].read().decode()) for key, files in indexed.items()] == expected
    (path.parents[1] / "dataset_type.txt").write_text("retrieval")
    dataset = open_dataset("flickr8k", tmp_path)
    assert (dataset.keys, dataset.captions) == ([key for key, _, _ in expected], [["a"], ["b"]])


def test_a_folder_of_shards_from_a_mac(tmp_path):
    write_tar(tmp_path / "0.tar", {"a.png": png()})
    (tmp_path / "._0.tar").write_bytes(b"\0\5\x16\7")
    assert find_shards(tmp_path) == [str(tmp_path / "0.tar")]


def test_a_file_twice_in_a_test_sets_shard_is_refused(tmp_path):
    path = write_tar(tmp_path / "0.tar", [("a.png", png(1)), ("a.txt", b"x"), ("a.PNG", png(2))])
    with pytest.raises(ValueError, match=r"0\.tar contains a\.PNG twice"):
        index_samples(path)


# ---- keys that repeat ------------------------------------------------------------------------------------------------


def write_shards(folder: Path, keys: list[list[str]], names=None) -> str:
    """Shards whose samples have these keys, and captions that say shard and key."""
    paths = [folder / name for name in names or [f"{number}.tar" for number in range(len(keys))]]
    for number, (path, own) in enumerate(zip(paths, keys, strict=True)):
        texts = {key: {f"{key}.png": png(number), f"{key}.txt": f"{number} {key}".encode()} for key in own}
        write_tar(path, {name: data for files in texts.values() for name, data in files.items()})
    return "{" + ",".join(map(str, paths)) + "}"


def draws_of(source: str, batch_size: int, batches: int = 1, **settings) -> dict[str, tuple]:
    """Shard and key -> the numbers its transform drew, for `batches` of one pass."""

    def transform(image, generator):
        return torch.rand(4, generator=generator, dtype=torch.float64)

    loader = open_pairs(source, transform=transform, tokenize=numbers, batch_size=batch_size, seed=3, **settings)
    found = {}
    for _ in range(batches):
        batch = next(loader)
        for text, drawn, key in zip(batch.texts.tolist(), batch.images, batch.keys, strict=True):
            found[tuple(text)] = (tuple(drawn.tolist()), key)
    loader.close()
    return found


def drawn_for(key: str) -> tuple:
    """The draws of the first pass for a sample of this key with one caption: what they have always been."""
    generator = generator_for(3, 0, key)
    torch.randint(1, (), generator=generator)
    return tuple(torch.rand(4, generator=generator, dtype=torch.float64).tolist())


EIGHT = [f"{number:04d}" for number in range(8)]


@pytest.mark.parametrize("whole", [2**28, 0], ids=["all keys compared", "first keys compared"])
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("cache_mib", [0, 64])
def test_shards_that_begin_again_have_draws_of_their_own(tmp_path, monkeypatch, workers, cache_mib, whole):
    monkeypatch.setattr(shards_module, "COMPARED_WHOLE", whole)
    source = write_shards(tmp_path, [EIGHT] * 4)
    batches = 2 if workers else 1
    found = draws_of(source, 32 // batches, batches, workers=workers, cache_mib=cache_mib)
    assert len(found) == 32
    assert len({drawn for drawn, _ in found.values()}) == len({key for _, key in found.values()}) == 32
    assert all(found[0, int(key)] == (drawn_for(key), key) for key in EIGHT)  # the first shard's are as they were
    assert found[2, 5] == (drawn_for("2.tar/0005"), "2.tar/0005")


def test_equal_names_in_several_folders_are_told_apart(tmp_path):
    names = ["a/0.tar", "b/0.tar", "b/1.tar"]
    found = draws_of(write_shards(tmp_path, [EIGHT] * 3, names), 24)
    assert {key for _, key in found.values()} == {*EIGHT, *(f"b/{n}.tar/{key}" for n in (0, 1) for key in EIGHT)}
    first, second = (
        write_shards(tmp_path / side, [EIGHT[:4], EIGHT[4:]], ["a/0.tar", f"{side}/0.tar"]) for side in "xy"
    )
    settings = {"transform": blank, "tokenize": numbers, "batch_size": 2, "seed": 0}
    assert open_pairs(first, **settings).cursor["source"] != open_pairs(second, **settings).cursor["source"]


@pytest.mark.parametrize("keys", [[["0000", "0001"], ["0002", "0003"]], [["b", "a"], ["c"], ["d"]]])
@pytest.mark.parametrize("url", ["{}", "pipe:cat {}"])
def test_where_keys_differ_all_draws_are_by_the_key_alone(tmp_path, keys, url):
    write_shards(tmp_path, [[f"{int(key, 16):04d}" for key in shard] for shard in keys])
    source = url.format("{" + ",".join(str(tmp_path / f"{n}.tar") for n in range(len(keys))) + "}")
    found = draws_of(source, sum(map(len, keys)))
    assert all((drawn, key) == (drawn_for(key), key) for drawn, key in found.values())
    cursor = open_pairs(source, transform=blank, tokenize=numbers, batch_size=2, seed=0).cursor
    joined = " ".join(f"{n}.tar" for n in range(len(keys)))
    assert cursor["source"] == f"{len(keys)} shards {zlib.crc32(joined.encode()):08x}"  # as checkpoints have it


def test_single_keys_that_repeat_have_draws_of_their_own(tmp_path, monkeypatch):
    keys = [["0000", "0001", "0002"], ["0003", "0001", "0004"], ["0005", "0002", "0006"]]
    source = write_shards(tmp_path, keys)
    for whole in (2**28, 0):
        monkeypatch.setattr(shards_module, "COMPARED_WHOLE", whole)
        assert len(set(draws_of(source, 9).values())) == 9
    assert len(set(draws_of(f"pipe:cat {source}", 9).values())) == 9


@pytest.mark.parametrize("shuffle_buffer", [5, 100])
@pytest.mark.parametrize("url", ["{}", "pipe:cat {}"])
def test_the_cursor_goes_on_bit_for_bit_where_keys_repeat(tmp_path, shuffle_buffer, url):
    write_shards(tmp_path, [EIGHT] * 3)
    settings = {
        "transform": lambda image, generator: torch.rand(4, generator=generator),
        "tokenize": numbers,
        "batch_size": 5,
        "seed": 0,
        "shuffle_buffer": shuffle_buffer,
    }
    source = url.format(f"{tmp_path}/{{0..2}}.tar")
    loader = open_pairs(source, **settings)
    expected = [next(loader) for _ in range(12)]
    for stop in (1, 4, 7):
        loader = open_pairs(source, **settings)
        for _ in range(stop):
            next(loader)
        again = open_pairs(source, cursor=json.loads(json.dumps(loader.cursor)), **settings)
        for wanted in expected[stop:]:
            batch = next(again)
            assert batch.keys == wanted.keys
            assert torch.equal(batch.images, wanted.images)


@pytest.mark.parametrize("url", ["{}", "pipe:cat {}"])
def test_a_landscape_takes_shards_that_begin_again(tmp_path, url):
    write_shards(tmp_path, [EIGHT] * 3)
    source = url.format(f"{tmp_path}/{{0..2}}.tar")

    def batches(count, size):
        return list(read_batches(source, blank, numbers, batches=count, batch_size=size))

    texts = torch.cat([texts for _, texts in batches(3, 8)])
    assert sorted(map(tuple, texts.tolist())) == [(shard, key) for shard in range(3) for key in range(8)]
    broken = {f"{key}.{suffix}": data for key in EIGHT for suffix, data in (("png", b"broken"), ("txt", b"2 0"))}
    write_tar(tmp_path / "2.tar", broken)
    with pytest.raises(ValueError, match=r"fewer than 20 usable samples, but 20 are needed: use at most 3 batches"):
        batches(4, 5)


def test_a_test_sets_pictures_have_names_of_their_own(tmp_path):
    folder = tmp_path / "wds_flickr8k"
    write_shards(folder / "test", [["a", "b"], ["c", "b"]])
    (folder / "dataset_type.txt").write_text("retrieval")
    dataset = open_dataset("flickr8k", tmp_path)
    assert dataset.keys == ["a", "0/b", "c", "1/b"]
    assert dataset.captions == [["0 a"], ["0 b"], ["1 c"], ["1 b"]]


# ---- several tables, columns of every type ---------------------------------------------------------------------------


def write_parts(folder: Path, split: str = "train", parts: int = 3) -> list[Path]:
    folder.mkdir(exist_ok=True)
    for part in range(parts):
        rows = {"image": [f"{part}.jpg", "shared.jpg"], "caption": [f"only {split} {part}", f"shared {split} {part}"]}
        pq.write_table(pa.table(rows), folder / f"{split}-{part:05d}-of-{parts:05d}.parquet")
    return sorted(folder.glob(f"{split}-*.parquet"))


@pytest.mark.parametrize("form", ["{}/train-*.parquet", "{}/train-{{00000..00002}}-of-00003.parquet", "{}"])
def test_several_parquet_files_are_one_table(tmp_path, form):
    folder = tmp_path / "data"
    paths = write_parts(folder)
    pq.write_table(pa.concat_tables([pq.read_table(path) for path in paths]), tmp_path / "whole.parquet")
    for name in ("0", "1", "2", "shared"):
        for place in (folder, tmp_path):
            (place / f"{name}.jpg").write_bytes(png())
    settings = {"transform": blank, "batch_size": 4, "seed": 0}
    settings["tokenize"] = lambda texts: torch.tensor([list(text.ljust(20).encode()) for text in texts])
    several, whole = (open_pairs(source, **settings) for source in (form.format(folder), tmp_path / "whole.parquet"))
    assert several.num_samples == whole.num_samples == 4
    for _ in range(5):
        a, b = next(several), next(whole)
        assert a.keys == b.keys
        assert torch.equal(a.texts, b.texts)
    assert several.cursor["source"].startswith("3 tables ")


def test_tables_in_several_folders_name_their_pictures_by_folder(tmp_path):
    for side in "ab":
        (tmp_path / side).mkdir()
        (tmp_path / side / "t.csv").write_text(f"image,caption\n1.jpg,{side}\n/abs/1.jpg,both\n,none\n")
    source = table_source([tmp_path / "a/t.csv", tmp_path / "b/t.csv"], TableFormat(), seed=0, resident_bytes=0)
    found = {sample.key: (sample.image, sample.captions) for sample in source.samples}
    assert found["a/1.jpg"] == (tmp_path / "a/1.jpg", ["a"])
    assert found["b/1.jpg"] == (tmp_path / "b/1.jpg", ["b"])
    assert found["/abs/1.jpg"] == (Path("/abs/1.jpg"), ["both", "both"])
    assert len(found) == 5


def test_files_that_may_be_several_splits_are_not_taken_together(tmp_path):
    write_parts(tmp_path / "data")
    write_parts(tmp_path / "data", "test", 1)
    with pytest.raises(ValueError, match=r"may belong to different sets: test-00000-of-00001\.parquet, train-"):
        open_pairs(tmp_path / "data", transform=blank, tokenize=numbers, batch_size=1, seed=0)
    write_tar(tmp_path / "data" / "0.tar", {"a.png": png()})
    with pytest.raises(ValueError, match=r"must be tables or shards, not both: it has .*test-.*\.parquet and .*0\.tar"):
        open_pairs(f"{tmp_path}/data/*", transform=blank, tokenize=numbers, batch_size=1, seed=0)


def test_tables_of_different_types_are_named(tmp_path):
    pq.write_table(pa.table({"image": ["1.jpg"], "caption": ["a"]}), tmp_path / "0.parquet")
    pq.write_table(pa.table({"image": [b"x"], "caption": ["a"]}), tmp_path / "1.parquet")
    with pytest.raises(ValueError, match=r"1\.parquet has binary, .*0\.parquet large_str"):
        pairs_of(tmp_path / "0.parquet", tmp_path / "1.parquet")


@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.string_view()], ids=str)
def test_text_of_every_type_is_read(tmp_path, kind, several):
    lists = [pa.list_(kind), pa.large_list(kind), pa.list_view(kind), pa.large_list_view(kind)] if several else [kind]
    for number, type_of_captions in enumerate(lists):
        captions = pa.array([["a", "b"], ["c", None]] if several else ["a", "c"], type_of_captions)
        path = tmp_path / f"{number}.parquet"
        pq.write_table(pa.table({"image": pa.array(["1.jpg", "2.jpg"], kind), "caption": captions}), path)
        expected = {"1.jpg": ["a", "b"], "2.jpg": ["c"]} if several else {"1.jpg": ["a"], "2.jpg": ["c"]}
        assert dict(pairs_of(path)) == expected


def test_pictures_of_every_type_are_read(tmp_path):
    data = png(7)
    record = pa.struct([("bytes", pa.binary_view()), ("path", pa.string_view())])
    for kind in (pa.binary(), pa.large_binary(), pa.binary_view(), record):
        value = {"bytes": data, "path": None} if kind is record else data
        pq.write_table(pa.table({"image": pa.array([value], kind), "caption": ["a"]}), tmp_path / "a.parquet")
        source = table_source(tmp_path / "a.parquet", TableFormat(), seed=0, resident_bytes=0)
        assert source.samples[0].image == data


# ---- pictures --------------------------------------------------------------------------------------------------------


def chunk(kind: bytes, data: bytes) -> bytes:
    return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")


TEXT = b"x\0\0" + zlib.compress(b"y" * 2**21)


@pytest.mark.parametrize(
    "extra",
    [
        chunk(b"zTXt", TEXT),
        chunk(b"iTXt", b"x\0\1\0\0\0" + zlib.compress(b"y" * 2**21)),
        chunk(b"tEXt", b"x\0" + b"y" * 70_000_000),
        chunk(b"iCCP", b"x\0\0" + zlib.compress(bytes(2**21))),
        chunk(b"zTXt", TEXT) * 3,
    ],
    ids=["zTXt", "iTXt", "tEXt", "iCCP", "several"],
)
@pytest.mark.parametrize("place", ["before", "after"])
def test_pixels_of_a_png_are_read_whatever_text_is_with_them(tmp_path, extra, place):
    plain = io.BytesIO()
    Image.linear_gradient("L").convert("RGB").save(plain, "PNG")
    plain = plain.getvalue()
    at = 33 if place == "before" else len(plain) - 12  # after the header, before the end
    (tmp_path / "a.png").write_bytes(plain[:at] + extra + plain[at:])
    with pytest.raises(ValueError, match="MAX_TEXT_"), Image.open(tmp_path / "a.png") as image:
        image.load()
    for source in (tmp_path / "a.png", (tmp_path / "a.png").read_bytes()):
        assert open_image(source).tobytes() == Image.open(io.BytesIO(plain)).tobytes()


def test_a_png_with_text_that_is_cut_short_is_broken():
    info = PngImagePlugin.PngInfo()
    info.add_text("x", "y" * 2**21, zip=True)
    with pytest.raises(BadImage, match="broken image"):
        open_image(png(pnginfo=info)[:-30])


def test_names_that_are_no_pictures_do_not_end_a_run(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    for name in ("pipe.png", "a\0b.png", "x" * 300 + ".png"):
        with pytest.raises(BadImage, match="missing image file"):
            open_image(tmp_path / name)
