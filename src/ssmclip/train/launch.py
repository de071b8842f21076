"""Decide which environment variables of `accelerate launch`, `accelerate config` and torchrun affect a run.

Accelerate reads many of its settings from the environment. A run's numbers depend on its settings alone, so

- variables that correspond to a setting of ours have no effect, and a message names the setting to change (`OURS`);
- modes of training that this loop does not support are refused (`REFUSED`);
- the launcher decides the number of processes, their devices, FSDP and ACCELERATE_USE_CPU.

Other variables of DeepSpeed, Megatron-LM and 8-bit layers matter only together with one that is named here. The rest
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
    """An environment variable that a setting overrides. idle: its value that requests nothing."""

    variable: str
    idle: str
    setting: str
    ours: Callable[[TrainConfig], str]  # the value that would ask for the same as the config
    advice: str

    def message(self, config: TrainConfig, environment: Mapping[str, str]) -> str:
        """Return a message about the ignored variable and what to do, or "" if the variable and the setting agree."""
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
    """Return a message for each variable that contradicts the config.

    Raises ValueError for a mode of training that is not supported.
    """
    for variable, name in REFUSED.items():
        if environment.get(variable, "").lower() not in _OFF:
            raise ValueError(
                "training must be data-parallel or sharded by FSDP, in float32, bf16 or fp16 "
                f"(got {variable}={environment[variable]}, which asks for {name}): launch without it"
            )
    return [message for variable in OURS if (message := variable.message(config, environment))]


def decided() -> dict[str, object]:
    """Return the arguments that keep an Accelerator from reading the variables of `OURS`, except precision."""
    return {
        "dynamo_plugin": TorchDynamoPlugin(backend="no"),
        "gradient_accumulation_plugin": GradientAccumulationPlugin(num_steps=1),
    }


def check_devices(accelerator: Accelerator, config: TrainConfig, environment: Mapping[str, str]) -> None:
    """Raise ValueError if the available devices or processes cannot do the run that the config describes."""
    device = accelerator.device
    if config.precision == "fp16" and device.type == "cpu":
        raise ValueError('precision="fp16" needs a GPU (got the CPU); use "no" (float32) or "bf16" here')
    if config.device == "cpu" and device.type != "cpu":
        variable = "ACCELERATE_TORCH_DEVICE"
        cause = f"{variable}={environment[variable]}" if variable in environment else "the process already uses it"
        raise ValueError(f'the device must be the CPU, as device="cpu" (got {device}: {cause})')
    launched = int(environment.get("WORLD_SIZE", 1)) if "LOCAL_RANK" in environment else accelerator.num_processes
    if launched != accelerator.num_processes:
        raise ValueError(
            f"{launched} processes were launched without GPUs, so each would train alone. "
            'Launch one, or set device="cpu"'
        )
