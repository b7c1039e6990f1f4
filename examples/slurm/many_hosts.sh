#!/usr/bin/env bash
# Four hosts with eight GPUs each, one process for each GPU. JAX asks Slurm which processes belong together.
# Adapt: the numbers of hosts and GPUs, the partition, and the folder, which all hosts must have.
#SBATCH --job-name=many-hosts
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --time=01:00:00

srun python examples/many_hosts.py "$PWD/many_hosts"
