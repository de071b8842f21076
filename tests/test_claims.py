"""The claims page: generated from rows, its verdicts from intervals."""

import re
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from ssmclip.__main__ import main
from ssmclip.report.claims import FORMS, T_975, Claim, findings, read_claims, verdict, write_claims
from ssmclip.rows import Result, write_rows
from ssmclip.rows.paper_tables import TABLE1

ROOT = Path(__file__).parents[1]


def rows_files() -> list[Path]:
    names = re.search(r"CLAIMS_ROWS := .*?,\$\(addsuffix \.jsonl,(.*?)\)\)", (ROOT / "Makefile").read_text(), re.DOTALL)
    return [ROOT / f"results/{name}.jsonl" for name in names[1].replace("\\", " ").split()]


def test_the_page_is_what_its_rows_say(tmp_path):
    assert len(rows_files()) > 5
    assert write_claims(tmp_path / "claims.md", rows_files()) == (ROOT / "docs/claims.md").read_text(
        encoding="utf-8"
    ), "run `make results`"


def test_every_claim_has_its_row_and_all_evidence_is_found():
    page = (ROOT / "docs/claims.md").read_text(encoding="utf-8")
    from ssmclip.rows import read_rows

    rows = [row for file in rows_files() for row in read_rows(file)[1]]
    assert len(read_claims()) > 20
    assert len({claim.paper for claim in read_claims()}) == 3
    for claim in read_claims():
        assert f"| {claim.claim} |" in page
        assert len(findings(claim, rows)) == len(claim.evidence), claim.claim
        assert all([claim.where, claim.shows, claim.missing])


def of(*evidence) -> Claim:
    return Claim("paper", "claim", "where", "shows", "", "", "missing", evidence)


def test_a_verdict_needs_an_interval_that_leaves_no_other_answer():
    item = {"form": "difference", "task": "t", "metric": "top1_difference", "model": "A", "against": "B"}
    for low, high, said in ((0.01, 0.1, "yes"), (-0.1, -0.01, "no"), (-0.01, 0.1, "not shown")):
        rows = [Result("A", "t", "top1_difference", (low + high) / 2, low, high, 100, against="B")]
        (found,) = findings(of(item), rows)
        assert (found.verdict, "n = 100" in found.text) == (said, True)
        (other,) = findings(of(item | {"expected": "below"}), rows)
        assert other.verdict == {"yes": "no", "no": "yes"}.get(said, said)
    assert findings(of(item), [Result("A", "t", "top1", 0.5)]) == []
    assert verdict([]) == "not tested"
    pair = {"form": "models", "task": "t", "metric": "top1", "model": "A", "other": "B"}
    for a, b, said in (
        ((0.5, 0.6), (0.3, 0.4), "yes"),
        ((0.3, 0.4), (0.5, 0.6), "no"),
        ((0.3, 0.5), (0.4, 0.6), "not shown"),
    ):
        rows = [Result(name, "t", "top1", sum(ci) / 2, *ci, 10) for name, ci in (("A", a), ("B", b))]
        assert findings(of(pair), rows)[0].verdict == said
    ratio = {"form": "ratio", "task": "t", "metric": "macs", "model": "A", "other": "B", "times": 1.8}
    for value, said in ((179.0, "yes"), (174.0, "no")):
        rows = [Result("A", "t", "macs", value), Result("B", "t", "macs", 100.0)]
        assert findings(of(ratio), rows)[0].verdict == said


def test_published_numbers_are_compared_as_scipy_compares_them():
    values = {row.model: np.array(row.values) for row in TABLE1.rows}
    gains = values["CLIP-SiMBA-L"] - values["CLIP-ViT-L"]
    assert len(gains) == 26
    assert T_975[25] == pytest.approx(stats.t.ppf(0.975, 25), abs=1e-4)
    low, high = stats.t.interval(0.95, 25, gains.mean(), stats.sem(gains))
    (found,) = findings(of({"form": "published", "model": "CLIP-SiMBA-L", "other": "CLIP-ViT-L", "margin": 2.0}), [])
    assert f"({low:+.1f} to {high:+.1f})" in found.text
    assert (
        found.verdict,
        FORMS["published"]({"model": "CLIP-SiMBA-L", "other": "CLIP-ViT-L", "margin": 3.0}, []).verdict,
    ) == (
        "not shown",
        "yes",
    )


def test_the_command_writes_the_page(tmp_path, capsys):
    write_rows(tmp_path / "rows.jsonl", [Result("A", "t", "top1", 0.5, 0.4, 0.6, 10)])
    assert main(["report", str(tmp_path / "rows.jsonl"), "--claims", str(tmp_path / "claims.md")]) == 0
    page = (tmp_path / "claims.md").read_text(encoding="utf-8")
    assert "`rows.jsonl`" in page
    assert "not tested" in page
    assert main(["report", str(tmp_path / "none.jsonl"), "--claims", str(tmp_path / "claims.md")]) != 0
    assert main(["report", str(tmp_path / "rows.jsonl")]) != 0
    assert "--claims FILE.md" in capsys.readouterr().err
