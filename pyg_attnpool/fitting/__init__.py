r"""Fits a morphable model to observations: some vertices, landmarks, a point cloud or a scan.

All of them are maximum a posteriori estimates: the squared distances over the variance of the
noise, plus the squared Mahalanobis distance of the latent code from the codes of the training
meshes. Gauss-Newton steps minimise the sum.
"""

from pyg_attnpool.fitting.fit import edit, fit_to
from pyg_attnpool.fitting.solver import Fit

__all__ = ["Fit", "edit", "fit_to"]
