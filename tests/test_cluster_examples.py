"""The examples of docs/cluster.md: a job is started again after exit status 75 and after no other."""

import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest
import yaml

from ssmclip.__main__ import build_parser
from ssmclip.cli.train import AGAIN
from ssmclip.config import apply_overrides, load_recipe

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "cluster.md").read_text(encoding="utf-8")


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)


SCRIPT, MANIFEST = blocks("bash")[0], list(yaml.safe_load_all(blocks("yaml")[0]))
FAKES = {
    "scontrol": 'if [ "$1" = show ]; then echo node1; echo node2; else echo "scontrol $*" >> calls; fi',
    "srun": 'SLURM_PROCID=3 SLURM_LOCALID=1 "$@"',
    "ssmclip": 'echo "$RANK $LOCAL_RANK $WORLD_SIZE $MASTER_ADDR:$MASTER_PORT $*" >> calls; exit $STATUS',
}


@pytest.mark.parametrize("status", [0, 1, AGAIN, 130])
def test_the_slurm_script_requeues_a_stopped_run_alone(tmp_path, status):
    for name, body in FAKES.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    (tmp_path / "script").write_text(SCRIPT)
    slurm = {"SLURM_JOB_NODELIST": "node[1-2]", "SLURM_NTASKS": "16", "SLURM_JOB_ID": "42", "STATUS": str(status)}
    path = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run(["bash", "script"], cwd=tmp_path, env=os.environ | slurm | path, check=False)
    assert done.returncode == status
    trained, *requeued = (tmp_path / "calls").read_text().splitlines()
    assert requeued == (["scontrol requeue 42"] if status == AGAIN else [])
    launch, command = trained.split(" train ", 1)
    assert launch == "3 1 16 node1:29500"
    is_understood(shlex.split(command))


def is_understood(command):
    """Check a training command that can be repeated, from after `train`."""
    args = build_parser().parse_args(["train", *command])
    assert args.resume_or_start
    apply_overrides(load_recipe(ROOT / args.recipe), args.set)


def test_slurm_warns_the_training_processes_and_not_the_script_alone():
    assert "#SBATCH --signal=USR1@120\n" in SCRIPT
    assert "#SBATCH --requeue\n" in SCRIPT
    subprocess.run(["bash", "-n"], input=SCRIPT, text=True, check=True)


def test_the_kubernetes_job_replaces_stopped_pods_without_counting_them():
    service, job = MANIFEST
    assert (service["kind"], job["kind"], job["apiVersion"]) == ("Service", "Job", "batch/v1")
    spec, pod = job["spec"], job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    codes, disrupted = spec["podFailurePolicy"]["rules"]
    on_codes = {"containerName": container["name"], "operator": "In", "values": [AGAIN]}
    assert codes == {"action": "Ignore", "onExitCodes": on_codes}
    assert disrupted == {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget"}]}
    assert pod["restartPolicy"] == "Never"  # the only one with a podFailurePolicy
    program, command, *given = container["command"] + container["args"]
    assert (program, command) == ("ssmclip", "train")  # no shell, which would not pass SIGTERM on
    is_understood(given)


def test_the_kubernetes_processes_find_each_other():
    service, job = MANIFEST
    pod = job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    env = {entry["name"]: entry.get("value") for entry in container["env"]}
    assert set(env) == {"RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
    assert int(env["WORLD_SIZE"]) == job["spec"]["completions"] == job["spec"]["parallelism"]
    assert env["MASTER_ADDR"] == f"{job['metadata']['name']}-0.{service['metadata']['name']}"
    assert pod["subdomain"] == service["metadata"]["name"]
    assert service["spec"]["selector"] == {"job-name": job["metadata"]["name"]}
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}


def test_the_table_of_exit_statuses_is_the_commands():
    codes = [int(code) for code in re.findall(r"^\| (\d+) \|", PAGE, re.MULTILINE)]
    assert codes == [0, AGAIN, 130, 1]
