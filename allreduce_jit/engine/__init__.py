"""What runs calls: kernels of ours, or torch.distributed."""
