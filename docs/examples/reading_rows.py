"""Read what commands wrote. Every measured number is one row; a rows file is JSON lines. Nothing here needs torch.

A row has a model, a task, a metric and a value; a 95 % interval and the number of observations where there are some;
`where`, what was varied ({"image": 1024}, {"step": 200}, {"level": "0.3"}); and `against`, the other model of a
difference.
"""

import sys
import tempfile
from pathlib import Path

import ssmclip
from ssmclip.report import write_report

rows_file = Path(__file__).parents[2] / "results" / "quickstart.jsonl"
run, rows = ssmclip.read_rows(rows_file)
print(f"measured with PyTorch {run['versions']['torch']} at commit {run['commit']}, seed {run['seed']}")

# Accuracy of two models on one task.
accuracy = {row.model: row for row in rows if (row.task, row.metric) == ("digits", "top1")}
for model, row in accuracy.items():
    print(f"{model:18} {row.value:6.1%}  (95 % interval {row.ci_low:.1%} to {row.ci_high:.1%}, n = {row.n})")
assert accuracy["CLIP-VMamba-Nano"].value == 358 / 360
assert accuracy["CLIP-ViT-Nano"].value == 342 / 360

# A curve: filter on `where`. Memory of an image encoder by the side of the image.
_, rows = ssmclip.read_rows(rows_file.parent / "efficiency.jsonl")
curve = {
    row.where["image"]: row.value
    for row in rows
    if row.model == "CLIP-VMamba-B" and row.metric == "inference_memory_mb" and "image" in row.where
}
assert sorted(curve) == [224, 448, 672, 896, 1024]
print(f"VMamba-B needs {curve[1024] / curve[224]:.1f} times the memory for {(1024 / 224) ** 2:.0f} times the pixels")

# Rows of your own are written the same way, and a report draws them with the others.
mine = ssmclip.Result("mine", "digits", "top1", 0.97, ci_low=0.95, ci_high=0.99, n=360)
with tempfile.TemporaryDirectory() as folder:
    own_file = Path(folder, "mine.jsonl")
    ssmclip.write_rows(own_file, [mine])
    assert ssmclip.read_rows(own_file)[1] == [mine]
    page = write_report([rows_file, own_file], folder).read_text(encoding="utf-8")
assert "97.0" in page
assert "torch" not in sys.modules
