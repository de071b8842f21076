"""CLIP-VMamba-S on YFCC15M: the paper's recipe, as its training script has it.

    accelerate launch --multi_gpu --num_processes 16 --num_machines 2 -m ssmclip train recipes/yfcc15m.py \\
        --set source='DIR/{00000..01468}.tar' --out runs/yfcc15m

Pairs: the 14.7 M captioned images of the OpenAI subset of YFCC100M, as webdataset shards (.jpg, .txt). Days on 16 GPUs;
nobody has run it with this package. The paper gives a zero-shot average of 35.3 % over 26 data sets for this model.

As in the original, crops are resized bilinearly, colours jittered in an order drawn for each image, A_log(s) decayed
(decay_rule), and gradients not clipped. One of a pair's two captions is drawn each time it is seen.
"""

from ssmclip.config import (
    AugmentConfig,
    CheckpointConfig,
    DataConfig,
    EmaConfig,
    LoggingConfig,
    LossConfig,
    ModelConfig,
    OptimiserConfig,
    ScheduleConfig,
    TrainConfig,
    ValidationConfig,
)

PAIRS = 14_689_580
BATCH = 4096
STEPS_PER_EPOCH = PAIRS // BATCH  # 3,586


def yfcc15m() -> TrainConfig:
    return TrainConfig(
        steps=25 * STEPS_PER_EPOCH,
        batch_size=BATCH,  # 2 machines x 8 GPUs x 256
        precision="fp16",
        model=ModelConfig(name="CLIP-VMamba-S", drop_path_rate=0.3, grad_checkpointing=True),
        data=DataConfig(
            source="data/yfcc15m/{00000..01468}.tar",
            image_sizes=((0.0, 224),),
            augment=AugmentConfig(
                scale=(0.5, 1.0),
                flip=False,
                color_jitter=(0.4, 0.4, 0.2, 0.1),
                color_jitter_prob=0.8,
                gray_scale_prob=0.2,
                gaussian_blur_prob=0.1,
                solarize_prob=0.2,
                interpolation="bilinear",
                color_order="random",
            ),
            workers=8,
            shuffle_buffer=10_000,
        ),
        optimiser=OptimiserConfig(
            lr=5e-4, betas=(0.9, 0.98), eps=1e-8, weight_decay=0.5, decay_rule="original", clip_norm=None
        ),
        schedule=ScheduleConfig(warmup_steps=STEPS_PER_EPOCH, start_lr=1e-6, end_lr=1e-5),
        loss=LossConfig(kind="clip", max_logit_scale=100.0),
        ema=EmaConfig(decay=0.996, schedule="cosine"),
        validation=ValidationConfig(every=0),
        checkpoint=CheckpointConfig(every=STEPS_PER_EPOCH, keep=3),
        logging=LoggingConfig(every=50),
    )
