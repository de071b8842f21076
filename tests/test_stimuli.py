"""Names and folders of the published stimuli, against the names and fields in the human data."""

import hashlib
import io
import tarfile
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from ssmclip.__main__ import main
from ssmclip.humans.download import download_stimuli
from ssmclip.humans.stimuli import CATEGORIES, STIMULUS_SETS, BadName, find_stimuli, parse_stimulus_name


def test_every_name_in_the_human_data(shared):
    """The table's own columns are what the names should parse into; image ids are those of the compact table."""
    columns = ["dataset", "imagename", "condition", "category", "trial", "subject"]
    table = pq.read_table(shared / "data/ood/human.parquet", columns=columns)
    compact = pq.read_table(shared / "data/ood/human_compact.parquet", columns=["dataset", "image_id", "condition"])
    wanted = {tuple(row.values()) for row in compact.to_pylist()}
    found = {}
    for row in table.to_pylist():
        stimulus = parse_stimulus_name(row["imagename"], row["dataset"])
        assert (stimulus.condition, stimulus.category) == (row["condition"], row["category"])
        assert stimulus.subject == f"s{row['subject']:02}"
        found.setdefault(row["dataset"], set()).add((row["dataset"], stimulus.image_id, stimulus.condition))
    assert set.union(*found.values()) == wanted
    assert {name: len(keys) for name, keys in found.items()} == {s.name: s.count for _, s in STIMULUS_SETS.items()}
    for name, keys in found.items():
        assert {condition for _, _, condition in keys} == set(STIMULUS_SETS[name].conditions)


@pytest.mark.parametrize(
    ("name", "dataset", "complaint"),
    [
        ("0001_hp_dnn_0.7_boat_10.png", "high-pass", "6 fields"),
        ("0001_lp_dnn_0.7_boat_10_n03662601_12531.png", "high-pass", "got 'lp'"),
        (
            "0001_hp_dnn_0.8_boat_10_n03662601_12531.png",
            "high-pass",
            "'0.8' is not a condition of high-pass; known: inf",
        ),
        ("0001_hp_dnn_0.7_ship_10_n03662601_12531.png", "high-pass", "'ship'"),
        ("000x_hp_dnn_0.7_boat_10_n03662601_12531.png", "high-pass", "'000x' must be a number"),
        ("0001_hp_dnn_0.7_boat_10_n03662601.png", "high-pass", "not an image id"),
        ("0001_hp_dnn_0.7_boat_10_n03662601_12531.jpg", "high-pass", "not an image id"),
        ("0001_edg_s01_0_oven_00_boat10.png", "edge", "'oven' is not its category"),
        ("spoon1.png", "edge", "'spoon' is not one of"),
        ("boat1-.png", "cue-conflict", "not an image id"),
    ],
)
def test_names_that_do_not_parse(name, dataset, complaint):
    with pytest.raises(BadName, match=complaint.replace(".", r"\.")):
        parse_stimulus_name(name, dataset)


def test_real_stimuli(shared, tmp_path):
    with tarfile.open(shared / "data/ood/stimuli.tar.gz") as tar:
        tar.extractall(tmp_path, filter="data")
    counts = {name: len(find_stimuli(tmp_path / "stimuli", name)) for name in ("edge", "silhouette", "cue-conflict")}
    assert counts == {"edge": 160, "silhouette": 160, "cue-conflict": 320}
    edges = find_stimuli(tmp_path / "stimuli/edges", "edge")
    assert [e.category for e in edges] == [e.path.parent.name for e in edges]
    assert {e.category for e in edges} == set(CATEGORIES)


def test_session_folders(tmp_path):
    session = tmp_path / "datasets/high-pass/dnn/session-1"
    session.mkdir(parents=True)
    names = ["0001_hp_dnn_3_boat_10_n03662601_12531.png", "0002_hp_dnn_inf_boat_10_n03662601_12531.png", "notes.txt"]
    for name in (*names, "._0001_hp_dnn_3_boat_10_n03662601_12531.png"):
        (session / name).touch()
    for root in (tmp_path, tmp_path / "datasets", tmp_path / "datasets/high-pass"):
        found = find_stimuli(root, "high-pass")
        assert [(s.number, s.subject, s.condition, s.path) for s in found] == [
            (1, "dnn", "3.0", session / names[0]),
            (2, "dnn", "inf", session / names[1]),
        ]

    for i in range(7):
        (session / f"bad{i}.png").touch()
    with pytest.raises(BadName, match=r"7 of 9 files .* and 2 more"):
        find_stimuli(tmp_path, "high-pass")
    rejected: list[str] = []
    assert len(find_stimuli(tmp_path, "high-pass", rejected=rejected)) == 2
    assert len(rejected) == 7
    assert "bad0.png" in rejected[0]

    (session / "0003_hp_dnn_3.0_boat_10_n03662601_12531.png").touch()
    with pytest.raises(ValueError, match="same image in the same condition"):
        find_stimuli(tmp_path, "high-pass", rejected=[])


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="filled-silhouettes"):
        find_stimuli(tmp_path, "silhouette")
    (Path(tmp_path) / "edge").mkdir()
    with pytest.raises(FileNotFoundError, match="0 PNG files"):
        find_stimuli(tmp_path, "edge")


# ---- downloads -------------------------------------------------------------------------------------------------------


@pytest.fixture
def release(tmp_path) -> str:
    """A folder that stands for the release: 160 silhouettes, empty files under the published names."""
    names = [f"silhouette/{category}/{category}{i}.png" for category in CATEGORIES for i in range(1, 11)]
    (tmp_path / "release").mkdir()
    with tarfile.open(tmp_path / "release/silhouette.tar.gz", "w:gz") as tar:
        for name in names:
            tar.addfile(tarfile.TarInfo(name), io.BytesIO(b""))
    return f"file://{tmp_path}/release/{{name}}.tar.gz"


def test_a_download(release, tmp_path):
    """The checksum is that of sha256sum, it is recorded, and what is there is not fetched again."""
    root = tmp_path / "datasets"
    assert len(download_stimuli("silhouette", root, url=release)) == 160
    archive = tmp_path / "release/silhouette.tar.gz"
    digest = hashlib.sha256(archive.read_bytes()).hexdigest()
    assert (root / "SHA256SUMS").read_text() == f"{digest}  silhouette.tar.gz\n"
    assert sorted(path.name for path in root.iterdir()) == ["SHA256SUMS", "silhouette"]
    (root / "silhouette/bird/bird3.png").unlink()
    assert len(download_stimuli("silhouette", root, url=release)) == 160
    archive.unlink()
    assert len(download_stimuli("silhouette", root, url=release)) == 160


def test_downloads_that_cannot_be(release, tmp_path):
    root = tmp_path / "datasets"
    with pytest.raises(ValueError, match="should have the SHA-256 0000"):
        download_stimuli("silhouette", root, url=release, sha256="0000")
    assert not (root / "SHA256SUMS").exists()
    with pytest.raises(OSError, match=r"edge.tar.gz cannot be downloaded: .* unpack it in"):
        download_stimuli("edge", root, url=release)
    archive = tmp_path / "release/silhouette.tar.gz"
    whole = archive.read_bytes()
    archive.write_bytes(b"an error page")
    with pytest.raises(ValueError, match="is not an archive of silhouette"):
        download_stimuli("silhouette", root, url=release)
    archive.write_bytes(whole)
    assert len(download_stimuli("silhouette", root, url=release)) == 160
    (root / "silhouette/bird/bird1.png").unlink()
    archive.write_bytes(b"an error page")
    with pytest.raises(ValueError, match=r"should have the SHA-256"):
        download_stimuli("silhouette", root, url=release)
    (root / "SHA256SUMS").unlink()
    with tarfile.open(archive, "w:gz") as tar:
        tar.addfile(tarfile.TarInfo("silhouette/bird/bird1.png"), io.BytesIO(b""))
    with pytest.raises(ValueError, match=r"should contain 160 stimuli of silhouette \(got 1\)"):
        download_stimuli("silhouette", root, url=release)


def test_the_command_downloads_from_a_server(release, tmp_path, capsys, caplog):
    """Over HTTP; a copy that differs from what SHA256SUMS says, a wrong --sha256 and an unknown set are refused."""
    handler = partial(QuietHandler, directory=str(tmp_path / "release"))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/{{name}}.tar.gz"
        words = ["ood", "download", "silhouette", "--url", url, "--out"]
        assert main([*words, str(tmp_path / "datasets")]) == 0
        assert "silhouette: 160 stimuli in" in capsys.readouterr().out
        digest = hashlib.sha256((tmp_path / "release/silhouette.tar.gz").read_bytes()).hexdigest()
        assert main([*words, str(tmp_path / "again"), "--sha256", digest]) == 0
        assert main([*words, str(tmp_path / "wrong"), "--sha256", digest[::-1]]) == 1
        assert f"should have the SHA-256 {digest[::-1]} (got {digest})" in capsys.readouterr().err
        (tmp_path / "later").mkdir()
        (tmp_path / "later/SHA256SUMS").write_text(f"{digest[::-1]}  silhouette.tar.gz\n")
        assert main([*words, str(tmp_path / "later")]) == 1
        assert main(["ood", "download", "silhouette,edge", "--url", url, "--out", str(tmp_path / "datasets")]) == 1
        assert "edge.tar.gz cannot be downloaded: HTTP Error 404" in capsys.readouterr().err
        server.shutdown()
    assert main(["ood", "download", "edges", "--out", str(tmp_path / "x")]) == 1
    assert "unknown stimulus set 'edges'" in capsys.readouterr().err
    assert main(["ood", "download", "all", "--sha256", digest, "--out", str(tmp_path / "x")]) == 1
    assert "--sha256 applies to a single data set (got 17)" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


class QuietHandler(SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass
