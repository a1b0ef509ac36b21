from pyg_attnpool.visualize.pictures import (
    draw_meshes,
    plot_mesh,
    plot_reconstructions,
    render,
    turntable,
    view_box,
    write_animation,
    write_picture,
)
from pyg_attnpool.visualize.report import find_models, write_report
from pyg_attnpool.visualize.viewer import read_viewer, write_viewer

__all__ = [
    "draw_meshes",
    "find_models",
    "plot_mesh",
    "plot_reconstructions",
    "read_viewer",
    "render",
    "turntable",
    "view_box",
    "write_animation",
    "write_picture",
    "write_report",
    "write_viewer",
]
