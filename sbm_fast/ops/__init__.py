"""The ops, one file each: signature, checks, eager reference, registration.

They are `torch.ops.sbm_fast.*`, defined in C++ (csrc/bindings_*.cpp) when the compiled part is
there. All write into tensors they are given; nothing is allocated.
"""
