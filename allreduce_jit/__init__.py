"""The all-reduce for the GPUs of one host. See README.md; `init` is the front door."""
