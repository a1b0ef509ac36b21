from pyg_attnpool.datasets.align import Alignment, align, looks_unaligned
from pyg_attnpool.datasets.anny.bodies import AnnyBodies
from pyg_attnpool.datasets.anny.detail import Detail
from pyg_attnpool.datasets.anny.faces import AnnyFaces
from pyg_attnpool.datasets.anny.hands import AnnyHands
from pyg_attnpool.datasets.coma import CoMA
from pyg_attnpool.datasets.dynamic_faust import DynamicFAUST
from pyg_attnpool.datasets.mesh_dataset import MeshDataset
from pyg_attnpool.datasets.recorded import record_dataset, recorded_dataset
from pyg_attnpool.datasets.registered_meshes import RegisteredMeshes
from pyg_attnpool.datasets.repair import repair_files
from pyg_attnpool.datasets.splits import Split
from pyg_attnpool.datasets.syn_hand import SynHand

__all__ = [
    "Alignment",
    "AnnyBodies",
    "AnnyFaces",
    "AnnyHands",
    "CoMA",
    "Detail",
    "DynamicFAUST",
    "MeshDataset",
    "RegisteredMeshes",
    "Split",
    "SynHand",
    "align",
    "looks_unaligned",
    "record_dataset",
    "recorded_dataset",
    "repair_files",
]
