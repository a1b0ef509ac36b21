from pyg_attnpool.mesh.closest import barycentric_mapping
from pyg_attnpool.mesh.hierarchy import MeshHierarchy
from pyg_attnpool.mesh.io import check_mesh, read_features, read_mesh, read_scan, write_mesh
from pyg_attnpool.mesh.qem import decimate
from pyg_attnpool.mesh.repair import RepairedMesh, repair
from pyg_attnpool.mesh.spiral import spiral_sequences

__all__ = [
    "MeshHierarchy",
    "RepairedMesh",
    "barycentric_mapping",
    "check_mesh",
    "decimate",
    "read_features",
    "read_mesh",
    "read_scan",
    "repair",
    "spiral_sequences",
    "write_mesh",
]
