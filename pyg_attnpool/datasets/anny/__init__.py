from pyg_attnpool.datasets.anny.bodies import AnnyBodies
from pyg_attnpool.datasets.anny.detail import Detail
from pyg_attnpool.datasets.anny.faces import AnnyFaces
from pyg_attnpool.datasets.anny.hands import AnnyHands

__all__ = ["AnnyBodies", "AnnyFaces", "AnnyHands", "Detail"]
