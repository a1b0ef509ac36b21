r"""Morphable models of other papers beside those of this package, at equal latent size and equal
steps."""
