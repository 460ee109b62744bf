"""Tasks and golden trajectories, on the cluster of the job.

    ray job submit --working-dir . -- python jobs/expert.py --config jobs/configs/demo.yaml

The same as `step-ray expert CONFIG ray.address=auto`; overrides `a.b=c` and flags are passed on.
"""

from step_ray.cli import run_as_job

if __name__ == "__main__":
    run_as_job("expert")
