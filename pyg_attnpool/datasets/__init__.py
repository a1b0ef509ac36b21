from pyg_attnpool.datasets.anny_faces import AnnyFaces
from pyg_attnpool.datasets.mesh_dataset import MeshDataset, Split
from pyg_attnpool.datasets.registered_meshes import RegisteredMeshes

__all__ = ["AnnyFaces", "MeshDataset", "RegisteredMeshes", "Split"]
