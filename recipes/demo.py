"""The model that `ssmclip demo` opens with: VMamba and Mamba of 0.74 million parameters in all, on embedded data.

    ssmclip train recipes/demo.py
    make demo-model

The second trains it and puts it into the package. Nine minutes on one core of a busy machine. It knows the words of the
quickstart's captions and no others; it names 99.7 % of the test digits, and 98.9 % of the scenes whose colour and shape
it has not seen together.
"""

from ssmclip.config import (
    AugmentConfig,
    CheckpointConfig,
    DataConfig,
    LoggingConfig,
    ModelConfig,
    OptimiserConfig,
    ScheduleConfig,
    TrainConfig,
)
from ssmclip.demo.packaged import TOKENIZER

VISION = 'vmamba.depths=[1, 1, 2, 1];dims=[24, 48, 96, 144];ssm_ratio=1.0;conv_norm="batch";conv_act=true'


def demo() -> TrainConfig:
    return TrainConfig(
        steps=1500,
        batch_size=64,
        model=ModelConfig(
            name="CLIMP-Nano",
            changes={
                "embed_dim": 128,
                "vision_cfg": {"timm_model_name": VISION, "image_size": 48},
                "text_cfg": {
                    "context_length": 32,
                    "hf_tokenizer_name": str(TOKENIZER),
                    "mamba": {"vocab_size": 96, "hidden_size": 64, "num_hidden_layers": 2},
                },
            },
        ),
        data=DataConfig(
            source="synthetic:quickstart", image_sizes=((0.0, 48),), augment=AugmentConfig(scale=(0.7, 1.0))
        ),
        optimiser=OptimiserConfig(lr=1e-3, weight_decay=0.1),
        schedule=ScheduleConfig(warmup_steps=60),
        checkpoint=CheckpointConfig(every=1500),
        logging=LoggingConfig(every=50, tensorboard=False),
    )
