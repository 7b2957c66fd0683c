"""Kernels in Triton beside the torch paths of the operators, which define them.

`ops/dispatch.py` chooses, and a module here is imported where it was chosen only, so that a CPU needs no Triton. The
matrix products stay with cuBLAS; the kernels are what comes before and after them. They are tested in Triton's
interpreter, and compiled for sm_90; none of them has run on a GPU.

House rules of the kernels, so that interpreter and GPU agree:

* A load is followed by a conversion to the wide dtype at once: the interpreter keeps bfloat16 as bare bits.
* The wide dtype is that of the output, float64 or float32, and float64 in the scan; a number from Python comes as
  float64 and is narrowed.
* Where threads read what others have written there is a barrier between. What is updated in place has blocks of at
  least as many elements as the program has threads, so that no element has two owners.
* Whole blocks are loaded without a mask, for a mask keeps loads from being 16 bytes wide.
"""
