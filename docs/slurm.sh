#!/bin/bash
# A SLURM job over several nodes, with the arguments of train.py:
#   sbatch docs/slurm.sh stage=ppo actor=opt66b deploy=multi_node
#SBATCH --nodes=8
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=48:00:00
#SBATCH --requeue
#SBATCH --signal=TERM@600
# Ten minutes before the time limit, or when the job is preempted, SIGTERM makes train.py save a
# checkpoint and end with exit code 130. The job is then queued again and resumes from there.
# One task per node: train.py starts a worker for each GPU of its node. This script runs on the first
# node, where the workers meet.
export MEET="$(hostname):29500"
# a job that was queued again continues: fresh=true counts for its first start only
if [ "${SLURM_RESTART_COUNT:-0}" -gt 0 ]; then
  for arg in "$@"; do
    shift
    if [ "$arg" != fresh=true ]; then set -- "$@" "$arg"; fi
  done
fi
srun --kill-on-bad-exit=1 bash -c \
  'exec python train.py "$@" deploy.nodes=$SLURM_NNODES deploy.node_rank=$SLURM_NODEID deploy.master=$MEET' train "$@"
code=$?
if [ $code = 130 ]; then scontrol requeue "$SLURM_JOB_ID"; fi
exit $code
