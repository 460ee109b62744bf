"""Build the training examples of one model (--arm base|<arm>), on the cluster of the job.

    ray job submit --working-dir . -- python jobs/dataset.py --config jobs/configs/demo.yaml

The same as `step-ray dataset CONFIG ray.address=auto`; overrides `a.b=c` and flags are passed on.
"""

from step_ray.cli import run_as_job

if __name__ == "__main__":
    run_as_job("dataset")
