"""Lists of models, tasks and files on the command line: what a shell would have given as separate words."""

import os
import sys
from pathlib import Path

import pytest

from ssmclip.cli.options import default_cache, distortion_list, labelled, path_list, task_list

FOLDERS = ["lr=0.1", "a,b", "a=1,b=2", "x", "x,y=z", "runs/lr=0.1,wd=0/checkpoints", "=odd", ",odd", "mine=x"]


@pytest.fixture
def folders(tmp_path, monkeypatch):
    for name in FOLDERS:
        (tmp_path / name).mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", FOLDERS)
@pytest.mark.parametrize("absolute", [False, True])
def test_a_folder_that_exists_is_a_model_whatever_its_name(folders, name, absolute):
    path = str(folders / name) if absolute else name
    assert labelled(path) == {Path(name).name: path}
    assert labelled(f"other=CLIP-VMamba-S,{path}") == {"other": "CLIP-VMamba-S", Path(name).name: path}
    if name != "x":  # mine=x is a folder, too
        assert labelled(f"mine={path}") == {"mine": path}
        assert labelled(f"A,mine={path},B=CLIP-VMamba-S") == {"A": "A", "mine": path, "B": "CLIP-VMamba-S"}


def test_names_are_parted_as_ever(folders):
    assert labelled("A,B=open_clip:ViT-B-32/openai") == {"A": "A", "B": "open_clip:ViT-B-32/openai"}
    assert labelled("A=x,B=lr=0.1") == {"A": "x", "B": "lr=0.1"}
    assert labelled("first=x,second=a,b") == {"first": "x", "second": "a,b"}
    assert labelled("not here,x") == {"not here": "not here", "x": "x"}
    assert labelled(r"a\,b\=c=name") == {"a,b=c": "name"}
    assert labelled(r"l=no\,where\=") == {"l": "no,where="}
    with pytest.raises(ValueError, match="both called 'x'"):
        labelled("x,./x")
    with pytest.raises(ValueError, match="no model"):
        labelled(",")


def test_files_behind_a_name(folders):
    Path("w,1=2.pt").touch()
    assert labelled("open_clip:ViT-B-32/w,1=2.pt,x") == {"w,1=2.pt": "open_clip:ViT-B-32/w,1=2.pt", "x": "x"}


def test_tasks_with_paths(folders):
    tasks = ["digits", "folder:a,b", "distorted:folder:a=1,b=2", "card:c,d.toml", f"folder:{folders}/x,y=z", "table1"]
    Path("c,d.toml").touch()
    assert task_list(",".join(tasks)) == tasks
    assert task_list(r"folder:no\,where,digits,") == ["folder:no,where", "digits"]


def test_prompts_and_distortions_with_paths(folders):
    for name in ("p,1.json", "d,2.py"):
        Path(name).touch()
    assert path_list("p,1.json,x,q.json") == ["p,1.json", "x", "q.json"]
    assert distortion_list("contrast,d,2.py:fog,imagenet-c/fog") == ["contrast", "d,2.py:fog", "imagenet-c/fog"]


@pytest.mark.skipif(sys.platform == "win32", reason="there the home is found in another way")
def test_a_user_without_a_home_has_no_default_cache(monkeypatch):
    """As in a container that runs as a number its system does not know."""
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert default_cache() is None
    monkeypatch.setenv("XDG_CACHE_HOME", "/elsewhere")
    assert default_cache() == Path("/elsewhere/ssmclip/embeddings")
