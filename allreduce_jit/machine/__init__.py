"""What there is: GPUs, links, compilers, processes."""
