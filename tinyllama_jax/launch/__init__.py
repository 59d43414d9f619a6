"""From an experiment to a job that runs: SLURM, GKE, TPU queued resources, SkyPilot.  No module here imports JAX."""
