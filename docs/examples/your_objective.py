"""Train with a loss of your own.

An objective is a class: the loss of what a CLIP returns for a batch, and what else differs from the others. Written in
a recipe, or in a module that a recipe imports, it is chosen with `loss.kind=margin`, and everything that training does
works with it: cached features (`loss.micro_batch`), several processes, checkpoints, `ssmclip analyze hessian`.
"""

import tempfile
from pathlib import Path

from ssmclip import load, read_rows
from ssmclip.config import (
    DataConfig,
    LoggingConfig,
    LossConfig,
    ModelConfig,
    OptimiserConfig,
    ScheduleConfig,
    TrainConfig,
)
from ssmclip.train import train
from ssmclip.train.objective import Objective, objective, objective_of


@objective("margin")
class Margin(Objective):
    """Ask for a caption to be nearer to its own image than to the next one of the batch, by half a unit."""

    contrastive = True  # a pair that is twice in a batch would be its own negative

    def forward(self, image_features, text_features, **_):
        """Return the loss, a scalar. The features are normalised: (batch, width)."""
        own = (image_features * text_features).sum(1)
        others = (image_features.roll(1, 0) * text_features).sum(1)
        return (0.5 + others - own).clamp(min=0).mean()

    def numbers(self, model):
        """Return what is logged beside the loss."""
        return {"text_projection": model.text_projection.detach().norm()}


def margin() -> TrainConfig:
    small = {"embed_dim": 16, "vision_cfg": {"timm_model_name": "test_vmamba"}}
    return TrainConfig(
        steps=60,
        batch_size=16,
        device="cpu",
        model=ModelConfig(changes={**small, "text_cfg": {"width": 16, "heads": 2, "layers": 1}}),
        data=DataConfig(source="synthetic:quickstart", image_sizes=((0.0, 32),), distinct=True),
        optimiser=OptimiserConfig(lr=3e-3),
        schedule=ScheduleConfig(warmup_steps=5),
        loss=LossConfig(kind="margin", micro_batch=8),
        logging=LoggingConfig(every=1, tensorboard=False, progress=False),
    )


with tempfile.TemporaryDirectory() as folder:
    run = train(margin(), Path(folder) / "run")
    rows = [row for row in read_rows(run / "rows.jsonl")[1] if row.task == "train"]
    losses = [row.value for row in rows if row.metric == "loss"]
    # The run's folder says what the model was trained for: analysis takes the same loss.
    assert type(objective_of(load(run).model, run)) is Margin

print(f"loss {sum(losses[:10]) / 10:.3f} -> {sum(losses[-10:]) / 10:.3f}")
assert sum(losses[-10:]) < 0.8 * sum(losses[:10])
assert "text_projection" in {row.metric for row in rows}
