"""Triton kernels, one op a file, under the names of csrc/. Installed as `sbm_fast.kernels`."""
