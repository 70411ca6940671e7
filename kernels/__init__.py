"""Triton kernels, one file each; `reference` is the definition of every operation."""

if __name__ == "kernels":
    # `import kernels` from the repository's folder would make a second copy of everything in here. It may not fail,
    # though: transformers looks for another package of this name, and must find that it is not there.
    __path__ = []
    __version__ = "0"

    def __getattr__(name: str) -> object:
        raise ImportError(f"import squareq_fx.kernels instead of kernels (for {name})")
