"""What the command line and the benchmark stand on: processes, one a rank, and what is printed."""
