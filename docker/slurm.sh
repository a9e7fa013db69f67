#!/usr/bin/env bash
# One training run on Slurm: Ray starts on every node of the allocation, the run on the first, and both end together.
#   ray get-auth-token --generate     # once: the token lies in the home folder, which all nodes share
#   sbatch --nodes=2 docker/slurm.sh experiment=qwen3_math resume=auto data.path=/data/math.parquet
# Submitted again, the same command goes on from the last checkpoint. runs_dir must be storage that all nodes share.
#SBATCH --job-name=opd-ray
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --output=%x-%j.log
set -euo pipefail

export RAY_AUTH_MODE=token
head_node=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
head_address=$(srun --nodes=1 --ntasks=1 --nodelist="$head_node" hostname --ip-address | cut -d' ' -f1)
# A port of its own for every job: two may share a node's name in time.
port=$((20000 + SLURM_JOB_ID % 10000))

srun --kill-on-bad-exit=1 ray symmetric-run \
    --address "$head_address:$port" \
    --min-nodes "$SLURM_JOB_NUM_NODES" \
    --num-gpus 8 \
    -- \
    python -m opd_ray.train "$@"
