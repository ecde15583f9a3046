"""What a job may take of the machine that a run is on, or of a cluster's node."""

import os
from collections.abc import Callable
from typing import Any, NamedTuple

from pipeline.encoder.model import gpus
from pipeline.stage.settings import Settings

GPU_JOB_THREADS = 4  # cores of an encode that shares a GPU: Python's lock lets it feed few more
NODE_THREADS = 8  # cores of a job on a node, unless the profile's set-threads says otherwise
AGGREGATE_THREADS = 8  # at most: what one writes, about as many can read
PYTHON_MB = 1024  # a stage without its data


class Share(NamedTuple):
    """The cores of an encode job, and the `device` that it is to use."""

    threads: int
    device: str


def share(workflow: Any, settings: Settings, shards: int) -> Share:
    """What each encode job gets; of a local run it sets how many run at a time, too.

    One for each GPU, or more, where there are more than four cores for each; one on a processor:
    `--resources gpu=N` says otherwise. Together they take all cores. On a cluster
    `auto` is cuda: on a node whose driver fails the job has to fail, since vectors of another
    precision would be refused hours later.
    """
    if workflow.remote_exec or workflow.resource_settings.nodes is not None:
        return Share(NODE_THREADS, "cuda" if settings.device == "auto" else settings.device)
    cores = workflow.resource_settings.cores or os.cpu_count() or 1
    if "gpu" not in workflow.global_resources:
        devices = gpus(settings.device)
        workflow.register_resource("gpu", max(1, devices, cores // GPU_JOB_THREADS * bool(devices)))
    side_by_side = max(1, min(workflow.global_resources["gpu"].value, shards))
    return Share(max(1, cores // side_by_side), settings.device)


def memory_request(limit_mb: int) -> Callable[[object, int], int]:
    """What to ask a cluster for where DuckDB may take `limit_mb`; more with each attempt."""

    def request(wildcards: object, attempt: int) -> int:
        return (2 * limit_mb + PYTHON_MB) * attempt

    return request
