"""The papers' claims, and what rows say of each: a page of tables, generated from rows.

A claim's evidence is a list of comparisons, in `claims.json`. Each is of one form:

    difference   one row that is a difference already (`against`)
    models       two models' rows of one metric, or a model's and a person's
    ratio        how many times larger one number is than another, where both are exact or measured once
    below        one number against a threshold
    published    two models over all data sets of a published table, whose numbers are the observations
    said         one row that has its own verdict, made with a margin
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from ssmclip.files import whole
from ssmclip.report.words import interval, metric_name, number, title_of
from ssmclip.rows import Result, read_rows
from ssmclip.rows.paper_tables import TABLE1
from ssmclip.rows.resume import latest

YES, NO, MIXED, OPEN, UNTESTED = "yes", "no", "mixed", "not shown", "not tested"
T_975 = {25: 2.0595}  # Student's t, two-sided 95 %, by degrees of freedom: that of 26 data sets
COLUMNS = ("claim", "where", "what would show it", "found here", "what was found, and at what scale", "missing")


@dataclass(frozen=True)
class Finding:
    """What one comparison gave: a verdict, and the numbers in words."""

    verdict: str
    text: str


@dataclass(frozen=True)
class Claim:
    """A claim of a paper.

    where: in the paper; shows: what would show it; command: that measures it, "" for none; scale: of the evidence here;
    missing: for a test at full scale; evidence: comparisons, by their form (see the module).
    """

    paper: str
    claim: str
    where: str
    shows: str
    command: str
    scale: str
    missing: str
    evidence: tuple[Mapping[str, Any], ...] = ()


def read_claims() -> list[Claim]:
    """Return the claims, in the order of the papers."""
    content = json.loads((Path(__file__).parent / "claims.json").read_text(encoding="utf-8"))
    return [Claim(**claim | {"evidence": tuple(claim.get("evidence", ()))}) for claim in content]


def findings(claim: Claim, rows: Sequence[Result]) -> list[Finding]:
    """Return what there is of a claim's evidence in rows."""
    found = (FORMS[item["form"]](item, rows) for item in claim.evidence)
    return [finding for finding in found if finding is not None]


def verdict(found: Sequence[Finding]) -> str:
    """Return what several comparisons say together.

    >>> verdict([Finding("yes", ""), Finding("not shown", "")]), verdict([Finding("yes", ""), Finding("no", "")])
    ('not shown', 'mixed')
    >>> verdict([Finding("no", ""), Finding("not shown", "")]), verdict([])
    ('no', 'not tested')
    """
    said = {finding.verdict for finding in found}
    if not said:
        return UNTESTED
    if {YES, NO} <= said:
        return MIXED
    return NO if NO in said else YES if said == {YES} else OPEN


def _find(rows: Sequence[Result], item: Mapping[str, Any], model: str, against: str = "") -> Result | None:
    where = item.get("where", {})
    key = (model, item["task"], item["metric"], against)
    return next(
        (row for row in rows if (row.model, row.task, row.metric, row.against) == key and dict(row.where) == where),
        None,
    )


def _titled(item: Mapping[str, Any], rows: Sequence[Result]) -> str:
    return item.get("title") or f"{title_of(item['task'], rows)}, {metric_name(item['metric'])}"


def _counted(row: Result) -> str:
    return f", n = {row.n:,}" if row.n else ""


def _difference(item: Mapping[str, Any], rows: Sequence[Result]) -> Finding | None:
    row = _find(rows, item, item["model"], item["against"])
    if row is None:
        return None
    sign = -1 if item.get("expected") == "below" else 1
    low, high = sorted((sign * row.ci_low, sign * row.ci_high))
    text = f"{_titled(item, rows)}: {row.model} minus {row.against} {number(row.value, row.metric)} ({interval(row)})"
    return Finding(YES if low > 0 else NO if high < 0 else OPEN, text + _counted(row))


def _models(item: Mapping[str, Any], rows: Sequence[Result]) -> Finding | None:
    first, second = (_find(rows, item, item[name]) for name in ("model", "other"))
    if first is None or second is None:
        return None
    above, below = (first, second) if item.get("expected", "above") == "above" else (second, first)
    said = YES if above.ci_low > below.ci_high else NO if above.ci_high < below.ci_low else OPEN
    each = [f"{row.model} {number(row.value, row.metric)} ({interval(row)}{_counted(row)})" for row in (first, second)]
    return Finding(said, f"{_titled(item, rows)}: {each[0]}, {each[1]}")


def _ratio(item: Mapping[str, Any], rows: Sequence[Result]) -> Finding | None:
    more, fewer = (
        _find(rows, item | {"where": item.get(place, item.get("where", {}))}, item[name])
        for name, place in (("model", "where"), ("other", "where_other"))
    )
    if more is None or fewer is None:
        return None
    times = more.value / fewer.value
    said = YES if round(times, item.get("digits", 1)) >= item["times"] else NO
    return Finding(said, f"{_titled(item, rows)}: {more.model} {times:.2f} times {fewer.model}'s")


def _below(item: Mapping[str, Any], rows: Sequence[Result]) -> Finding | None:
    row = _find(rows, item, item["model"])
    if row is None:
        return None
    right = row.value >= item["at_least"] if "at_least" in item else row.value < item["below"]
    text = f"{_titled(item, rows)}: {row.model} {number(row.value, row.metric)}"
    return Finding(YES if right else NO, text + _counted(row))


def _published(item: Mapping[str, Any], rows: Sequence[Result]) -> Finding:
    """Compare two models of CLIP-Mamba's Table 1. margin: points within which they are on par; half: whether each is to
    be better on half of the data sets; neither: the first is to be better on average."""
    values = {row.model: row.values for row in TABLE1.rows}
    gains = [a - b for a, b in zip(values[item["model"]], values[item["other"]], strict=True)]
    mean, half = fmean(gains), T_975[len(gains) - 1] * stdev(gains) / len(gains) ** 0.5
    low, high = mean - half, mean + half
    better = sum(gain > 0 for gain in gains)
    margin = item.get("margin")
    if item.get("half"):
        said = YES if 2 * better == len(gains) else NO
    elif margin:
        said = YES if -margin < low and high < margin else NO if low > margin or high < -margin else OPEN
    else:
        said = YES if low > 0 else NO if high < 0 else OPEN
    within = f"; on par means within {margin} points" if margin else ""
    return Finding(
        said,
        f"The paper's own Table 1: {item['model']} minus {item['other']} {mean:+.1f} points over {len(gains)} data "
        f"sets ({low:+.1f} to {high:+.1f}), better on {better}{within}",
    )


def _said(item: Mapping[str, Any], rows: Sequence[Result]) -> Finding | None:
    row = _find(rows, item, item["model"], item["against"])
    if row is None:
        return None
    numbers = str(row.extra["said"]).removeprefix(row.extra["verdict"]).strip(" ()")
    return Finding(
        row.extra["verdict"], f"{_titled(item, rows)}: {row.model} minus {row.against} {numbers}{_counted(row)}"
    )


FORMS: dict[str, Callable[[Mapping[str, Any], Sequence[Result]], Finding | None]] = {
    "difference": _difference,
    "models": _models,
    "ratio": _ratio,
    "below": _below,
    "published": _published,
    "said": _said,
}


def claims_page(rows: Sequence[Result], files: Sequence[str] = ()) -> str:
    """Return the page, as Markdown. files: names of the rows files, for the sentence that says where it comes from."""
    claims = read_claims()
    parts = [HEAD.format(files=", ".join(f"`{name}`" for name in files) or "no rows")]
    for paper in dict.fromkeys(claim.paper for claim in claims):
        mine = [claim for claim in claims if claim.paper == paper]
        lines = ["| " + " | ".join(COLUMNS) + " |", "|" + " --- |" * len(COLUMNS)]
        lines += ["| " + " | ".join(map(_escaped, _cells(claim, rows))) + " |" for claim in mine]
        commands = list(dict.fromkeys(claim.command for claim in mine if claim.command))
        parts.append(f"## {paper}\n\n" + "\n".join(lines) + "\n\n```sh\n" + "\n".join(commands) + "\n```\n")
    return "\n".join(parts)


HEAD = """# What is known of the papers' claims

Every claim of the three papers, what would show it, and what has been found here. *yes* and *no* need a 95 % interval
that leaves no other answer, or an exact number; *not shown* means that the interval leaves both open; *mixed* that some
of it is shown and some refuted; *not tested* that there are no rows of it. None of it is at the papers' scale unless it
says so: a *yes* on small models is evidence of the direction, and a *no* does not refute a claim about large ones.

Written by `ssmclip report --claims` from {files}; the commands below each table measure the rows.
"""


def _cells(claim: Claim, rows: Sequence[Result]) -> list[str]:
    found = findings(claim, rows)
    scale = f" Scale: {claim.scale}." if found and claim.scale else ""
    numbers = ". ".join(f"{finding.text} ({finding.verdict})" for finding in found)
    return [
        claim.claim,
        claim.where,
        claim.shows,
        verdict(found),
        f"{numbers}.{scale}" if found else "–",
        claim.missing,
    ]


def _escaped(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def write_claims(path: str | Path, rows_files: Sequence[str | Path]) -> str:
    """Write the page of the rows files, and return it. Raises FileNotFoundError, and ValueError for what is no row."""
    paths = [Path(file) for file in rows_files]
    if missing := [file for file in paths if not file.is_file()]:
        raise FileNotFoundError(f"rows file not found: {missing[0]}")
    rows, _ = latest([row for file in paths for row in read_rows(file)[1]])
    page = claims_page(rows, [file.name for file in paths])
    with whole(path) as part:
        part.write_text(page, encoding="utf-8")
    return page
