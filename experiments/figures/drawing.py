"""Draws bodies: from shapes in the world to polygons in a picture."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from envs.physics import Shapes

BODY, EDGE, SHADOW = "#64748b", "white", "#e2e8f0"


def camera(elevation: float, azimuth: float) -> np.ndarray:
    """Returns the axes of a picture, in the world: right, up, and away from the eye, [3, 3]."""
    tilt, turn = np.radians([elevation, azimuth])
    right = np.array([np.cos(turn), np.sin(turn), 0.0])
    level, up = np.array([-np.sin(turn), np.cos(turn), 0.0]), np.array([0.0, 0.0, 1.0])
    return np.stack(
        [
            right,
            np.cos(tilt) * up + np.sin(tilt) * level,
            np.cos(tilt) * level - np.sin(tilt) * up,
        ]
    )


def outline(ends: np.ndarray, radius: np.ndarray) -> np.ndarray:
    """Returns how capsules look, as polygons [G, 34, 2], for ends [G, 2, 2] in the picture."""
    way = ends[:, 1] - ends[:, 0]
    angle = np.arctan2(way[:, 1], way[:, 0])[:, None] + np.linspace(-np.pi / 2, np.pi / 2, 17)
    cap = radius[:, None, None] * np.stack([np.cos(angle), np.sin(angle)], axis=-1)
    return np.concatenate([ends[:, 1:] + cap, ends[:, :1] - cap], axis=1)


def hull(points: np.ndarray) -> np.ndarray:
    """Returns the corners [M, 2] of the convex hull of points [N, 2], counterclockwise."""

    def half(points: np.ndarray) -> list[np.ndarray]:
        found: list[np.ndarray] = []
        for point in points:
            while len(found) > 1 and _turn(found[-2], found[-1], point) <= 0:
                found.pop()
            found.append(point)
        return found[:-1]  # the other half begins with the last

    order = points[np.lexsort(points.T)]
    return np.array(half(order) + half(order[::-1]))


def _turn(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> float:
    """Positive where the way from a by b to c turns left."""
    (x, y), (u, v) = b - a, c - b
    return x * v - y * u


def draw_body(
    axis: Any,
    eye: np.ndarray,
    shapes: Shapes,
    place: np.ndarray,
    colors: Sequence[str] = (),
) -> None:
    """Draws a body and its shadow at a place [2] of the picture, the farthest parts first.

    Args:
        axis: of the picture.
        eye: as of `camera`.
        shapes: leaves of one body.
        place: of its middle on the floor.
        colors: of its parts, capsules before boxes; empty: all alike.
    """
    from matplotlib.collections import PolyCollection

    ends, radius, corners = map(np.asarray, shapes)
    points = np.concatenate([ends.reshape(-1, 3), corners.reshape(-1, 3)])
    low, high = points[:, :2].min(axis=0), points[:, :2].max(axis=0)
    middle = np.append((low + high) / 2, 0.0)
    ends, corners = ends - middle, corners - middle

    ground = [*outline(ends[..., :2], radius), *map(hull, corners[..., :2])]
    shadow = [polygon @ eye[:2, :2].T + place for polygon in ground]
    axis.add_collection(PolyCollection(shadow, facecolors=SHADOW, edgecolors=SHADOW))

    ends, corners = ends @ eye.T, corners @ eye.T
    parts = [*outline(ends[..., :2], radius), *map(hull, corners[..., :2])]
    away = np.concatenate([ends[..., 2].mean(axis=1), corners[..., 2].mean(axis=1)])
    order = np.argsort(-away, kind="stable")
    body, faces = [parts[i] + place for i in order], [colors[i] for i in order] if colors else BODY
    axis.add_collection(PolyCollection(body, facecolors=faces, edgecolors=EDGE, linewidths=0.6))


def seen_from_above(axis: Any, title: str, unit: str = "") -> None:
    """Sets an axis up as a plane, with names where it stands at the edge of its row."""
    axis.set_title(title, fontsize=10)
    axis.set_xlabel(f"x{unit}", fontsize=8)
    axis.set_ylabel(f"y{unit}", fontsize=8)
    axis.label_outer()
    axis.tick_params(labelsize=8)
    axis.set_aspect("equal")
    axis.spines[["top", "right"]].set_visible(False)
