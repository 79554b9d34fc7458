"""Triton kernels for every op of fastgpt: one file per op, the kernels first, the functions that launch them after.

Each op's file can be run by itself: ``python -m fastgpt.triton_kernels.softmax`` checks its kernels against the
reference and prints what they move and compute, in Triton's interpreter where there is no GPU.

``fastgpt.triton_kernels.library`` registers the dispatcher ops ``fastgpt_triton::...``; it loads Triton, and a kernel
file, when the first of its ops runs.
"""

if __name__ != "fastgpt.triton_kernels":
    # The bare name belongs to a package of the Triton project, which others probe for.
    raise ImportError(f"this package is fastgpt.triton_kernels and cannot be imported as {__name__}")
