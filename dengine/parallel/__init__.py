"""Spread models over ranks: DDP, FSDP2, and the gradient of the mean over all ranks."""
