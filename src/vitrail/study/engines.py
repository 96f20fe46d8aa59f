"""Engines that start workers on a study: Ray, on one machine or a cluster.

An engine computes nothing of its own: each of its workers is a `run_study(.., worker=True)` on the same folder, so the
bytes are those of one process, whichever worker ends when. Without an engine the same workers can be started by hand,
by SLURM or by Kubernetes: `vitrail study ... --worker`.
"""

import os
from collections.abc import Mapping
from typing import Any

import torch

from vitrail.errors import MissingLibrary, StudyError, UsageError, VitrailError
from vitrail.models.open import Vit, open_vit
from vitrail.models.sources import split_python_name
from vitrail.study.locking import LEASE_S

__all__ = ["ENGINES", "work_on_ray"]

ENGINES = ("local", "ray")
"""The first is the default."""

N_RETRIES = 100
"""How often Ray starts one worker anew before it gives up; each time it goes on with the parts that are missing."""


def work_on_ray(vit: Vit, images: object, n_workers: int, arguments: Mapping[str, Any]) -> None:
    """Lets Ray actors work on a study until no part is missing.

    Connects to the cluster that `RAY_ADDRESS` names, or to one that runs on this machine, or starts one here. An actor
    that is killed is started again and goes on.

    Args:
        vit: The model; each actor opens it by its name. On a GPU each actor has one for itself.
        images: As for `run_study`; every machine of the cluster must be able to read them.
        n_workers: How many actors.
        arguments: The other arguments of `run_study`.

    Raises:
        UsageError: Fewer workers than one, or a model that cannot be opened by its name.
        MissingLibrary: Ray is not installed.
        StudyError: Ray cannot be started or reached, or the workers were ended again and again.
        VitrailError: What a worker refuses.
    """
    if n_workers < 1:
        raise UsageError(f"{n_workers} workers were asked for; give 1 or more.")
    opening = _arguments_of_open_vit(vit)
    try:
        import ray
    except ModuleNotFoundError as error:
        raise MissingLibrary(
            "Ray is not installed here: pip install 'vitrail[ray]', or start workers yourself with --worker.",
            name="ray",
        ) from error
    is_own = not ray.is_initialized()
    if is_own:
        _start(ray, n_workers)
    on_gpu = torch.device(vit.device).type == "cuda"
    try:
        actor = ray.remote(num_cpus=1, num_gpus=int(on_gpu), max_restarts=N_RETRIES, max_task_retries=N_RETRIES)(
            _Worker
        )
        workers = [actor.remote(opening, torch.get_num_threads()) for _ in range(n_workers)]
        running = [worker.run.remote(images, dict(arguments)) for worker in workers]
        done, running = ray.wait(running)
        ray.get(done)
        # A worker returns when nothing is missing. Those at work come to their end now; those for which the cluster had
        # no room never would.
        ray.get(ray.wait(running, num_returns=len(running), timeout=LEASE_S)[0] if running else [])
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, VitrailError):
            raise error.cause from error
        raise
    except ray.exceptions.RayActorError as error:
        raise StudyError(
            f"Ray's workers were ended again and again: {str(error).splitlines()[0]} What was written is safe; run the "
            "same command again."
        ) from error
    finally:
        if is_own:
            ray.shutdown()


def _start(ray: Any, n_workers: int) -> None:
    """Connects to a cluster that runs, or starts one in which all workers have room, with fewer processors too."""
    quiet = {"configure_logging": False, "log_to_driver": False, "include_dashboard": False}
    try:
        try:
            ray.init(address="auto", **quiet)
        except ConnectionError:  # none runs
            if os.environ.get("RAY_ADDRESS"):
                raise
            ray.init(num_cpus=max(n_workers, os.cpu_count() or 1), **quiet)
    except Exception as error:  # Ray raises errors of no class of its own here
        raise StudyError(
            f"Ray does not start, or its cluster does not answer ({str(error).strip().splitlines()[0]}). Try again when"
            " the machine has less to do, or start workers yourself with --worker."
        ) from error


class _Worker:
    """An actor: the model, opened once, and what it works on."""

    def __init__(self, opening: Mapping[str, Any], n_threads: int) -> None:
        torch.set_num_threads(n_threads)  # Ray gives each actor one; the order of sums depends on their number
        self._vit = open_vit(**opening)

    def run(self, images: object, arguments: Mapping[str, Any]) -> None:
        from vitrail.study.run import run_study

        run_study(self._vit, images, worker=True, **arguments)


def _arguments_of_open_vit(vit: Vit) -> dict[str, Any]:
    opened = vit.opened_with
    if opened is None or split_python_name(opened["model"]) is not None:
        raise UsageError(
            f"{vit.name} cannot be opened by its name on other machines, as an engine's workers must. Start workers "
            "yourself, each with run_study(.., worker=True) or `vitrail study ... --worker`."
        )
    return {
        **opened,
        "device": vit.device,
        "preprocessing": vit.preprocessing,
        "class_names": vit.class_names,
        "target": vit.task.target,
    }
