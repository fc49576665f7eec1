"""Runs on SLURM and in parallel on one machine: submission, states, what runs in a job, a SLURM to try it on."""
