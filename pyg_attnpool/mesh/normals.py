import numpy as np
from numpy import ndarray


def vertex_normals(vertices: ndarray, faces: ndarray) -> ndarray:
    r"""Unit normals :obj:`[N, 3]` of vertices: those of the faces around them, weighted by area. A
    vertex without faces has none, and gets zeros.

    Args:
        vertices (numpy.ndarray): Vertices :obj:`[N, 3]`.
        faces (numpy.ndarray): Faces :obj:`[F, 3]`.

    Example:
        >>> corners = np.array([[0.0, 0, 0], [1, 0, 0], [0, 1, 0]])
        >>> vertex_normals(corners, np.array([[0, 1, 2]]))[0].tolist()
        [0.0, 0.0, 1.0]
    """
    a, b, c = (vertices[faces[:, k]] for k in range(3))
    normal = np.repeat(np.cross(b - a, c - a), 3, axis=0)
    total = np.stack(
        [np.bincount(faces.ravel(), normal[:, i], minlength=len(vertices)) for i in range(3)],
        axis=1,
    )
    return total / np.maximum(np.linalg.norm(total, axis=1, keepdims=True), 1e-300)
