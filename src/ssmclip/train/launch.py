"""What `accelerate launch`, `accelerate config` and torchrun ask for by environment variables, and what comes of it.

Accelerate reads many of its settings from the environment. A run's numbers depend on its own settings alone, so

- variables that a setting of ours decides have no effect, and a message says which setting to change (`OURS`);
- ways of training that this loop does not do are refused (`REFUSED`);
- how many processes there are, on which devices, and FSDP, are the launcher's to decide, as is ACCELERATE_USE_CPU.

More variables of DeepSpeed, Megatron-LM and 8-bit layers matter only together with one that is named here. The others
(debugging, CPU affinity, logging) change no number.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from accelerate import Accelerator
from accelerate.utils import GradientAccumulationPlugin, TorchDynamoPlugin

from ssmclip.config import TrainConfig


@dataclass(frozen=True)
class Decided:
    """A variable whose matter a setting decides. idle: its value that asks for nothing."""

    variable: str
    idle: str
    setting: str
    ours: Callable[[TrainConfig], str]  # the value that would ask for the same as the config
    advice: str

    def message(self, config: TrainConfig, environment: Mapping[str, str]) -> str:
        """Return what is ignored and what to do, or "" where the variable and the setting agree."""
        asked = environment.get(self.variable, self.idle)
        if asked.lower() in (self.idle, self.ours(config)):
            return ""
        return f"{self.variable}={asked} has no effect: {self.setting} decides. {self.advice}"


OURS = (
    Decided(
        variable="ACCELERATE_MIXED_PRECISION",
        idle="no",
        setting="precision",
        ours=lambda config: config.precision,
        advice="For bf16 or fp16 use --set precision=bf16 or precision=fp16",
    ),
    Decided(
        variable="ACCELERATE_DYNAMO_BACKEND",
        idle="no",
        setting="model.compile",
        ours=lambda config: "inductor" if config.model.compile else "no",
        advice="To compile the model use --set model.compile=true",
    ),
    Decided(
        variable="ACCELERATE_GRADIENT_ACCUMULATION_STEPS",
        idle="1",
        setting="loss.micro_batch",
        ours=lambda config: "1",
        advice="A contrastive batch cannot be summed up from parts; to save memory use --set loss.micro_batch=N",
    ),
)

REFUSED = {
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "tensor, context or pipeline parallelism",
    "ACCELERATE_FP8_BACKEND": "8-bit layers",  # which Accelerate puts into the model whatever the precision is
}
_OFF = ("", "no", "none", "false", "0", "off")


def ignored(config: TrainConfig, environment: Mapping[str, str]) -> list[str]:
    """Return a message for each variable that asks for something else than the config does.

    Raises ValueError for a way of training that is not supported.
    """
    for variable, name in REFUSED.items():
        if environment.get(variable, "").lower() not in _OFF:
            raise ValueError(
                "training must be data-parallel or sharded by FSDP, in float32, bf16 or fp16 "
                f"(got {variable}={environment[variable]}, which asks for {name}): launch without it"
            )
    return [message for variable in OURS if (message := variable.message(config, environment))]


def decided() -> dict[str, object]:
    """Return the arguments of an Accelerator that keep it from reading the variables of `OURS`, precision's apart."""
    return {
        "dynamo_plugin": TorchDynamoPlugin(backend="no"),
        "gradient_accumulation_plugin": GradientAccumulationPlugin(num_steps=1),
    }


def check_devices(accelerator: Accelerator, config: TrainConfig, environment: Mapping[str, str]) -> None:
    """Raise ValueError where the devices or processes there are would make another run of it than was asked for."""
    device = accelerator.device
    if config.precision == "fp16" and device.type == "cpu":
        raise ValueError('precision="fp16" needs a GPU (got the CPU); here "no" (float32) or "bf16" would do')
    if config.device == "cpu" and device.type != "cpu":
        variable = "ACCELERATE_TORCH_DEVICE"
        cause = f"{variable}={environment[variable]}" if variable in environment else "the process already uses it"
        raise ValueError(f'the device must be the CPU, as device="cpu" (got {device}: {cause})')
    launched = int(environment.get("WORLD_SIZE", 1)) if "LOCAL_RANK" in environment else accelerator.num_processes
    if launched != accelerator.num_processes:
        raise ValueError(
            f"{launched} processes were launched, but each would train alone: they have no GPUs to share. "
            'Launch one, or set device="cpu"'
        )
