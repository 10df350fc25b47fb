"""What every training stage uses: optimizer step, losses, schedule, checkpoints, metrics.

The loops themselves are in rlhf/stages/.
"""
