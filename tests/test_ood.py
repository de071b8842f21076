"""Out-of-distribution scores against the published numbers, scikit-learn, SciPy and plain loops; bad input is named."""

import argparse
import csv
import json
import logging
from dataclasses import replace
from itertools import combinations

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from scipy.stats import rankdata
from sklearn.metrics import cohen_kappa_score

from ssmclip.cli import ood as ood_command
from ssmclip.data.distortions import DISTORTIONS, distortion
from ssmclip.humans.scores import score_decisions
from ssmclip.humans.stimuli import CATEGORIES, STIMULUS_SETS, StimulusSet
from ssmclip.humans.trials import read_trials
from ssmclip.rows import read_rows

AVERAGES = {
    "average_17_datasets": "17 data sets",
    "average_16_without_cue_conflict": "16 data sets, without cue conflict",
    "average_12_parametric": "12 parametric data sets",
}
MEASURES = ["ood_accuracy", "accuracy_difference", "observed_consistency", "error_consistency"]
COLUMNS = ["dataset", "subject", "image_id", "condition", "category", "object_response"]


# A small world: 48 stimuli of contrast in three conditions of unequal size, of which one does not count, 32 cue
# conflicts and 16 edges.


def stimuli() -> list[dict]:
    found = []
    for i in range(48):
        condition, category = ("c100", "c50", "c10", "c10")[i % 4], CATEGORIES[i // 3]
        found.append(
            {"dataset": "contrast", "image_id": f"n02690373_{i}", "condition": condition, "category": category}
        )
    for i, shape in enumerate(CATEGORIES):
        for texture in (CATEGORIES[(i + 5) % 16], CATEGORIES[(i + 9) % 16] if i % 4 else shape):
            name = f"{shape}{i + 1}-{texture}{i + 2}"
            found.append({"dataset": "cue-conflict", "image_id": name, "condition": "0", "category": shape})
        found.append({"dataset": "edge", "image_id": f"{shape}{i + 1}", "condition": "0", "category": shape})
    return found


def trials(subjects: dict[str, float], seed: int) -> list[dict]:
    """Answers right with the given chance, else the texture's category (where there is one) or any."""
    rng = np.random.default_rng(seed)
    rows = []
    for subject, chance in subjects.items():
        for stimulus in stimuli():
            texture = stimulus["image_id"].rpartition("-")[2].rstrip("0123456789")
            wrong = texture if texture in CATEGORIES and rng.random() < 0.6 else CATEGORIES[rng.integers(16)]
            said = stimulus["category"] if rng.random() < chance else wrong
            rows.append(stimulus | {"subject": subject, "object_response": said if rng.random() < 0.95 else "na"})
    return rows


PEOPLE = trials({"subject-01": 0.9, "subject-02": 0.7, "subject-03": 0.8}, seed=1)
MODELS = trials({"good": 0.8, "bad": 0.3, "like_good": 0.8}, seed=2)


def table(folder, name: str, rows: list[dict]):
    path = folder / f"{name}.parquet"
    pq.write_table(pa.Table.from_pylist(rows, schema=pa.schema([(c, pa.string()) for c in COLUMNS])), path)
    return path


def score(folder, people, models, **settings):
    return score_decisions(
        read_trials(table(folder, "people", people)), read_trials(table(folder, "models", models)), **settings
    )


def find(rows, model, task, metric, condition=""):
    found = [r for r in rows if (r.model, r.task, r.metric, r.condition) == (model, task, metric, condition)]
    assert len(found) == 1, (model, task, metric, condition, len(found))
    return found[0]


def right(rows, subject, dataset, condition) -> list[bool]:
    return [
        row["object_response"] == row["category"]
        for row in rows
        if (row["subject"], row["dataset"], row["condition"]) == (subject, dataset, condition)
    ]


@pytest.mark.parametrize("people", ["human", "human_compact"])
def test_every_published_number_is_met(shared, people):
    folder = shared / "data" / "ood"
    reference = json.loads((folder / "reference.json").read_text())
    rows = score_decisions(read_trials(folder / f"{people}.parquet"), read_trials(folder / "models.parquet"))
    subjects = ["resnet50", "bagnet33", "simclr_resnet50x1", "swag_vit_l16_in1k", "humans"]
    for subject in subjects:
        for measure in MEASURES:
            for key, label in AVERAGES.items():
                expected = reference[key][subject][measure]
                assert find(rows, subject, "ood", measure, label).value == pytest.approx(expected, rel=0, abs=1e-12)
            for dataset, expected in reference["per_dataset"].items():
                value = find(rows, subject, f"ood/{dataset}", measure).value
                assert value == pytest.approx(expected[subject][measure], rel=0, abs=1e-12)
        expected = reference["shape_bias"]["humans_pooled" if subject == "humans" else subject]
        row = find(rows, subject, "ood/cue-conflict", "shape_bias")
        assert row.value == pytest.approx(expected["shape_bias"], rel=0, abs=1e-12)
        assert row.extra["per_category"] == pytest.approx(expected["per_category"], rel=0, abs=1e-12)
    single = find(rows, "humans", "ood/cue-conflict", "shape_bias").extra["per_human"]
    expected = [reference["shape_bias"][f"subject-{i:02}"]["shape_bias"] for i in range(1, 11)]
    assert list(single.values()) == pytest.approx(expected, rel=0, abs=1e-12)
    # Of the toolbox as well, but of models whose reference numbers are in no file: the table of its authors' fork.
    assert find(rows, "clip", "ood", "error_consistency", "17 data sets").value == pytest.approx(0.280407, abs=5e-7)
    assert find(rows, "clip_14", "ood/cue-conflict", "shape_bias").value == pytest.approx(0.595264, abs=5e-7)


def test_consistency_is_cohens_kappa_per_condition_and_person(tmp_path):
    rows = score(tmp_path, PEOPLE, MODELS)
    people = ["subject-01", "subject-02", "subject-03"]
    for dataset, conditions in {"contrast": ["c50", "c10"], "edge": ["0"], "cue-conflict": ["0"]}.items():
        for model in ("good", "bad"):
            kappa, difference, observed = [], [], []
            for person in people:
                pairs = [(right(MODELS, model, dataset, c), right(PEOPLE, person, dataset, c)) for c in conditions]
                kappa.append(np.mean([cohen_kappa_score(a, b) for a, b in pairs]))
                difference.append(np.mean([(np.mean(a) - np.mean(b)) ** 2 for a, b in pairs]))
                observed.append(np.mean([np.mean(np.equal(a, b)) for a, b in pairs]))
            row = find(rows, model, f"ood/{dataset}", "error_consistency")
            assert row.value == pytest.approx(np.mean(kappa), abs=1e-12)
            assert list(row.extra["per_human"].values()) == pytest.approx(kappa, abs=1e-12)
            row = find(rows, model, f"ood/{dataset}", "accuracy_difference")
            assert row.value == pytest.approx(np.mean(difference), abs=1e-12)
            row = find(rows, model, f"ood/{dataset}", "observed_consistency")
            assert row.value == pytest.approx(np.mean(observed), abs=1e-12)
            hits = [hit for c in conditions for hit in right(MODELS, model, dataset, c)]
            assert find(rows, model, f"ood/{dataset}", "ood_accuracy").value == pytest.approx(np.mean(hits), abs=1e-12)
        among = [
            np.mean([cohen_kappa_score(right(PEOPLE, a, dataset, c), right(PEOPLE, b, dataset, c)) for c in conditions])
            for a, b in combinations(people, 2)
        ]
        assert find(rows, "humans", f"ood/{dataset}", "error_consistency").value == pytest.approx(np.mean(among))
        others = find(rows, "good", f"ood/{dataset}", "error_consistency").extra["with"]
        expected = np.mean(
            [cohen_kappa_score(right(MODELS, "good", dataset, c), right(MODELS, "bad", dataset, c)) for c in conditions]
        )
        assert others["bad"] == pytest.approx(expected, abs=1e-12)
    # The undistorted condition counts in none of these, and has a row of its own.
    row = find(rows, "good", "ood/contrast", "error_consistency", "level=c100")
    expected = [
        cohen_kappa_score(right(MODELS, "good", "contrast", "c100"), right(PEOPLE, p, "contrast", "c100"))
        for p in people
    ]
    assert row.value == pytest.approx(np.mean(expected), abs=1e-12)
    assert row.extra["counted"] is False


def test_shape_bias_counts_conflicts_only(tmp_path):
    rows = score(tmp_path, PEOPLE, MODELS)
    for model, mine in (("good", MODELS), ("humans", PEOPLE)):
        shape = texture = 0
        for row in mine:
            kind = row["image_id"].rpartition("-")[2].rstrip("0123456789")
            counts = row["dataset"] == "cue-conflict" and kind != row["category"]
            if counts and (model == "humans" or row["subject"] == model):
                shape += row["object_response"] == row["category"]
                texture += row["object_response"] == kind
        assert texture > 1
        assert find(rows, model, "ood/cue-conflict", "shape_bias").value == pytest.approx(shape / (shape + texture))


def test_who_agrees_in_everything_has_kappa_one(tmp_path):
    """o = 1 gives 1 by definition, even where both are always right and kappa is 0 / 0."""
    same = [{**row, "subject": "twin"} for row in PEOPLE if row["subject"] == "subject-01"]
    perfect = [{**row, "object_response": row["category"]} for row in PEOPLE]
    alone = [row for row in PEOPLE if row["subject"] == "subject-01"]
    for people, models in ((alone, same), (perfect, [{**r, "subject": "twin"} for r in perfect[: len(stimuli())]])):
        rows = score(tmp_path, people, models) if people is perfect else score(tmp_path, two(people), models)
        for dataset in ("contrast", "edge"):
            values = [find(rows, "twin", f"ood/{dataset}", measure).value for measure in MEASURES[1:]]
            assert values == [0, 1, 1]


def two(rows):
    return rows + [{**row, "subject": "subject-02"} for row in rows]


def test_all_wrong_against_all_right_has_kappa_zero(tmp_path):
    wrong = {name: CATEGORIES[i - 1] for i, name in enumerate(CATEGORIES)}
    perfect = [{**row, "object_response": row["category"]} for row in PEOPLE]
    fool = [{**s, "subject": "fool", "object_response": wrong[s["category"]]} for s in stimuli()]
    rows = score(tmp_path, perfect, fool)
    assert [find(rows, "fool", "ood/edge", measure).value for measure in MEASURES] == [0, 1, 0, 0]


def complete(subjects: dict[str, float], seed: int) -> list[dict]:
    """Two stimuli in every condition of all 17 data sets."""
    rng, rows = np.random.default_rng(seed), []
    for name, known in STIMULUS_SETS.items():
        for condition in known.conditions:
            for i in range(4):
                category = CATEGORIES[i * 3]
                image = f"{category}{i}-{CATEGORIES[i]}{i}" if name == "cue-conflict" else f"{category}{i}x{condition}"
                for subject, chance in subjects.items():
                    said = category if rng.random() < chance else CATEGORIES[rng.integers(16)]
                    values = (name, subject, image, condition, category, said)
                    rows.append(dict(zip(COLUMNS, values, strict=True)))
    return rows


def test_ranks_are_means_of_scipys(tmp_path):
    people = complete({"1": 0.9, "2": 0.8}, 0)
    models = complete({"a": 0.9, "b": 0.5, "c": 0.7}, 1)
    models += [{**row, "subject": "tied"} for row in models if row["subject"] == "b"]
    rows = score(tmp_path, people, models)
    for label in AVERAGES.values():
        values = np.array(
            [[find(rows, m, "ood", k, label).value for m in ("a", "b", "c", "tied")] for k in MEASURES[1:]]
        )
        expected = rankdata(values * [[1], [-1], [-1]], axis=1).mean(axis=0)
        assert [find(rows, m, "ood", "mean_rank", label).value for m in ("a", "b", "c", "tied")] == expected.tolist()
    everything = [r.value for r in rows if r.model == "a" and r.condition == "" and r.metric == "ood_accuracy"]
    assert len(everything) == 17
    assert find(rows, "a", "ood", "ood_accuracy", "17 data sets").value == pytest.approx(np.mean(everything))


def test_intervals_are_those_of_the_mean(tmp_path):
    """Of an accuracy, the interval over stimuli is the binomial one; over people alone a model's accuracy is fixed."""
    n, stimulus = 400, {"dataset": "edge", "condition": "0", "category": "cat"}
    people, models = [], []
    for i in range(n):
        image = stimulus | {"image_id": f"cat{i}"}
        models.append(image | {"subject": "m", "object_response": "cat" if i % 10 < 7 else "dog"})
        people += [
            image | {"subject": f"s{k:02}", "object_response": "cat" if i % 10 < 5 + k % 3 else "dog"}
            for k in range(30)
        ]
    row = find(score(tmp_path, people, models, resamples=4000), "m", "ood/edge", "ood_accuracy")
    spread = 1.96 * np.sqrt(0.7 * 0.3 / n)
    assert [row.ci_low, row.ci_high] == pytest.approx([0.7 - spread, 0.7 + spread], abs=0.003)
    assert row.extra["over_images"] == [row.ci_low, row.ci_high]
    assert row.extra["over_humans"] == pytest.approx([0.7, 0.7])
    rows = score(tmp_path, people, models, resamples=4000)
    human = find(rows, "humans", "ood/edge", "ood_accuracy")
    spread = 1.96 * np.std([0.5, 0.6, 0.7]) / np.sqrt(30)
    assert human.extra["over_humans"] == pytest.approx([0.6 - spread, 0.6 + spread], abs=0.003)
    agreed = find(rows, "m", "ood/edge", "observed_consistency")
    spread = 1.96 * np.std([0.8, 0.9, 1.0]) / np.sqrt(30)
    assert agreed.extra["over_humans"] == pytest.approx([0.9 - spread, 0.9 + spread], abs=0.003)
    assert agreed.ci_low < agreed.extra["over_images"][0]
    assert agreed == find(score(tmp_path, people, models, resamples=4000), "m", "ood/edge", "observed_consistency")


@pytest.fixture
def raw_data(tmp_path):
    """People and models as model-vs-human keeps them: a csv for each subject and data set, labels as on disk."""
    spelt = {"c50": "C50", "0.9": "0.90", "3.0": "3", "False": "false", "0": "n/a"}
    sets = {
        "contrast": ["c50"],
        "uniform-noise": ["0.9", "0.1"],
        "high-pass": ["3.0"],
        "false-colour": ["False"],
        "edge": ["0"],
    }
    for dataset, conditions in sets.items():
        folder = tmp_path / "raw-data" / dataset
        folder.mkdir(parents=True)
        for who, session in (("subject-01", "Session"), ("subject-02", "Session"), ("My-Model", "session")):
            with (folder / f"{dataset}_{who}_session_1.csv").open("w", newline="") as file:
                writer = csv.writer(file)
                person = who.startswith("subject")
                writer.writerow(
                    ["trial", "subj", session, "rt", "Category", "object_response", "condition", "imagename"]
                )
                for i in range(8):
                    condition, category = conditions[i % len(conditions)], CATEGORIES[i]
                    said = category if (i + person * int(who[-1] == "1")) % 3 else ("na" if person else "Dog")
                    image = f"{category}{i}.png" if dataset == "edge" else f"n02690373_{i}.png"
                    name = f"{i:04}_x_{who[-2:]}_{condition}_{category}_10_{image}"
                    label = spelt.get(condition, condition) if not (person and dataset == "edge") else "0"
                    subject = who if person else ("my_model" if i % 2 else "My-Model")
                    writer.writerow([i + 1, subject, 1, "", category, said, label, name])
    return tmp_path / "raw-data"


def test_csv_files_are_read_as_they_are(raw_data, tmp_path, caplog):
    rows = score_decisions(read_trials(raw_data), read_trials(raw_data))
    assert {row.model for row in rows} == {"humans", "My-Model"}
    assert find(rows, "My-Model", "ood/uniform-noise", "accuracy", "level=0.9").value == 2 / 4
    assert find(rows, "My-Model", "ood/high-pass", "ood_accuracy").value == 5 / 8
    assert find(rows, "My-Model", "ood/false-colour", "ood_accuracy").n == 8
    one = read_trials(raw_data / "edge" / "edge_My-Model_session_1.csv")
    assert one.subjects == ("My-Model",)
    assert find(score_decisions(read_trials(raw_data), one), "My-Model", "ood/edge", "ood_accuracy").value == 5 / 8


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda rows: rows[:-5], "edge: person subject-03 saw 14 of the 16 stimuli"),
        (lambda rows: [*rows, rows[0]], "contrast: 1 stimuli have more than one trial.*subject-01, n02690373_0"),
        (lambda rows: [rows[0] | {"category": "car"}, *rows[1:]], "another category.*n02690373_0"),
        (lambda rows: [rows[0] | {"category": "table"}, *rows[1:]], r"unknown categories \['table'\]"),
        (lambda rows: [rows[0] | {"condition": "c51"}, *rows[1:]], "contrast has no condition 'c51'; known: c100"),
        (lambda rows: [rows[0] | {"dataset": "contrasts"}, *rows[1:]], r"unknown data sets \['contrasts'\]"),
        (lambda rows: [rows[0] | {"condition": None}, *rows[1:]], "1 trials of people have no condition"),
        (
            lambda rows: [rows[0] | {"image_id": "0001_x_"}, *rows[1:]],
            "1 trials have no image id; the first: '0001_x_'",
        ),
    ],
)
def test_a_table_of_people_that_makes_no_sense_is_refused(tmp_path, change, says):
    with pytest.raises(ValueError, match=says):
        score(tmp_path, change(PEOPLE), MODELS)


def test_decisions_that_make_no_sense_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"contrast: 48 stimuli have more than one trial.*: good, n02690373_0"):
        score(tmp_path, PEOPLE, [*MODELS, *MODELS[:48]])
    with pytest.raises(ValueError, match=r"contrast: 1 trials have another category.*'car' or 'airplane'"):
        score(tmp_path, PEOPLE, [MODELS[0] | {"category": "car"}, *MODELS[1:]])
    with pytest.raises(ValueError, match=r"none of the decisions is on a stimulus that people saw.*48 of 48"):
        score(tmp_path, PEOPLE, [row | {"image_id": "n01_1"} for row in MODELS[:48]])
    pq.write_table(pa.table({"subject": ["m"], "answer": ["cat"], "dataset": ["edge"]}), tmp_path / "x.parquet")
    with pytest.raises(
        ValueError, match="lacks the columns image_id, object_response; it has subject, answer, dataset"
    ):
        read_trials(tmp_path / "x.parquet")
    (tmp_path / "answers.csv").write_text("subj,imagename,object_response\nm,cat1.png,cat\n")
    with pytest.raises(ValueError, match=r"answers.csv does not name its data set"):
        read_trials(tmp_path / "answers.csv")
    (tmp_path / "broken.parquet").write_text("PAR1")
    with pytest.raises(ValueError, match=r"broken.parquet is not a valid table"):
        read_trials(tmp_path / "broken.parquet")
    with pytest.raises(FileNotFoundError, match="file of trials not found"):
        read_trials(tmp_path / "none.csv")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="contains no csv"):
        read_trials(tmp_path / "empty")


def test_what_cannot_be_used_is_named_and_counted(tmp_path, caplog):
    people = [row for row in PEOPLE if row["dataset"] != "edge"]
    models = [
        row
        for row in MODELS
        if not (row["subject"] == "bad" and row["dataset"] == "contrast" and row["image_id"][-1] == "7")
    ]
    models = [row | {"image_id": "n01_1"} if row["image_id"] == "n02690373_3" else row for row in models]
    models[8] = models[8] | {"object_response": "Sofa"}
    caplog.set_level(logging.WARNING)
    rows = score(tmp_path, people, models)
    said = caplog.text
    assert "edge: ignored, as its 48 decisions have no trials of people" in said
    assert "contrast: 3 of 139 decisions are on stimuli no person saw, such as n01_1" in said
    assert "contrast: bad has 42 of 48 stimuli" in said
    assert "1 responses are not categories ('Sofa') and count as errors" in said
    assert "bad: no average over 17 data sets; missing or incomplete: colour, contrast" in said
    row = find(rows, "bad", "ood/contrast", "ood_accuracy")
    assert row.extra["partial"] == {"used": 42, "of": 48}
    lacking = {"n02690373_7", "n02690373_17", "n02690373_27", "n02690373_37", "n02690373_47", "n02690373_3"}
    used = [r for r in MODELS if r["subject"] == "bad" and r["dataset"] == "contrast" and r["image_id"] not in lacking]
    expected = np.mean([r["object_response"] == r["category"] for r in used if r["condition"] != "c100"])
    assert row.value == pytest.approx(expected, abs=1e-12)
    assert not [row for row in rows if row.task == "ood"]


def test_equal_names_of_two_sources_are_two_models(tmp_path):
    one = [row | {"source": "ours"} for row in MODELS]
    other = [
        row | {"source": "theirs", "object_response": row["category"]} for row in MODELS if row["subject"] == "bad"
    ]
    pq.write_table(pa.Table.from_pylist(one + other), tmp_path / "both.parquet")
    rows = score_decisions(read_trials(table(tmp_path, "people", PEOPLE)), read_trials(tmp_path / "both.parquet"))
    assert {row.model for row in rows} == {"humans", "good", "like_good", "bad (ours)", "bad (theirs)"}
    assert find(rows, "bad (theirs)", "ood/edge", "ood_accuracy").value == 1
    alone = score(tmp_path, PEOPLE, MODELS)
    ours = find(rows, "bad (ours)", "ood/contrast", "error_consistency").value
    assert ours == find(alone, "bad", "ood/contrast", "error_consistency").value


def test_a_further_data_set_is_scored_and_changes_no_average(tmp_path, monkeypatch):
    """An eighteenth set of two conditions, which the models were asked and were not asked."""
    people, models = complete({"1": 0.9, "2": 0.8, "3": 0.7, "4": 0.9}, 0), complete({"a": 0.9, "b": 0.5}, 1)
    before = score(tmp_path, people, models, resamples=10)
    monkeypatch.setattr(STIMULUS_SETS, "_items", dict(STIMULUS_SETS._items))
    monkeypatch.setattr(DISTORTIONS, "_items", dict(DISTORTIONS._items))
    STIMULUS_SETS.register("fog")(StimulusSet("fog", "fog", ("thin", "thick"), 4))
    distortion("edge", levels={"0": 0, "1": 1}, meaning="a name that is a set of stimuli, too")(np.copy)
    assert score(tmp_path, people, models, resamples=10) == before
    assert len([row for row in before if row.task == "ood" and row.model == "a"]) == 3 * 5
    more = [
        {**stimulus, "subject": who, "object_response": "cat" if who in "1a" else "dog"}
        for who in "12a"
        for stimulus in (
            dict(zip(COLUMNS, ("fog", "", f"n1_{c}", c, "cat", ""), strict=True)) for c in ("thin", "thick")
        )
    ]
    after = score(tmp_path, people + more[:4], models + more[4:], resamples=10)
    assert [row for row in after if row.task != "ood/fog"] == before
    assert find(after, "a", "ood/fog", "ood_accuracy").value == 1
    assert find(after, "humans", "ood/fog", "accuracy", "level=thick").value == 0.5


def test_conditions_that_are_not_the_levels_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(DISTORTIONS, "_items", dict(DISTORTIONS._items))
    contrast = DISTORTIONS["contrast"]
    turned = {label: contrast.levels[label] for label in ("c100", "c10", "c50", *list(contrast.levels)[5:])}
    DISTORTIONS._items["contrast"] = replace(contrast, levels=turned, counted=("c10", "c50"))
    with pytest.raises(ValueError, match=r"contrast: people's conditions are c100, c50.*the levels c100, c10, c50"):
        score(tmp_path, PEOPLE, MODELS)


def test_command_scores_files(tmp_path, capsys):
    people, models = table(tmp_path, "people", PEOPLE), table(tmp_path, "models", MODELS)
    out = tmp_path / "rows.jsonl"
    words = ["score", "--decisions", str(models), "--humans", str(people), "--resamples", "50", "--seed", "4"]
    assert command(*words, "--out", str(out)) == 0
    run, rows = read_rows(out)
    assert (run["seed"], run["resamples"]) == (4, 50)
    assert rows == score_decisions(read_trials(people), read_trials(models), resamples=50, seed=4)
    assert f"{len(rows)} rows in {out}" in capsys.readouterr().out
    with pytest.raises(IsADirectoryError, match="takes a file"):
        command(*words, "--out", str(tmp_path))


def command(*words: str) -> int:
    parser = argparse.ArgumentParser()
    ood_command.add_arguments(parser)
    return ood_command.run(parser.parse_args(words))
