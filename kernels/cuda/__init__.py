"""CUDA C++ sources, compiled by NVRTC at run time. Data files only."""
