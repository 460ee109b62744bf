"""Rollouts of the base agent under the teacher, on the cluster of the job.

    ray job submit --working-dir . -- python jobs/collect.py --config jobs/configs/demo.yaml

The same as `step-ray collect CONFIG ray.address=auto`; overrides `a.b=c` and flags are passed on.
"""

from step_ray.cli import run_as_job

if __name__ == "__main__":
    run_as_job("collect")
