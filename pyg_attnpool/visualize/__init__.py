from pyg_attnpool.visualize.pictures import plot_mesh, plot_reconstructions

__all__ = ["plot_mesh", "plot_reconstructions"]
