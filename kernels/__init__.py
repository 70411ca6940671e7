"""Triton kernels, one file each; `reference` is the definition of every operation."""

if __name__ == "kernels":
    raise ImportError(
        "import squareq_fx.kernels instead: `import kernels` from the repository's folder would make "
        "a second copy of it"
    )
