"""Vessels and airways of the phantom: trees that grow from the lung roots and are drawn slice by slice.

A tree is grown greedily: target points in the lung, nearest to the root first, are joined to the node that
costs least, cost being the new length plus a share of the way from that node back to the root. The share trades
wire length against path length (Cuntz et al., PLoS Comput Biol 6(8), 2010, e1000877, there called balancing
factor). Radii follow Murray's law: a parent's radius to the power of ``MURRAY`` is the sum over its children.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from covidseg.data.phantom.anatomy import Array, Chest, Frame, smooth_noise

MURRAY = 2.7  # exponent of Murray's law
BALANCE = 0.35  # share of the way back to the root in the cost of a joint
PIECE = 13.0  # mm; longer edges are bent and can be joined midway


class Tree(NamedTuple):
    """Tapered tubes between nodes; positions are (z, row, column) in mm from the centre of voxel (0, 0, 0)."""

    nodes: Array   # (N, 3)
    parent: Array  # (N,) index of each node's parent; the root is its own
    radius: Array  # (N,) mm


def grow_tree(rng: np.random.Generator, root: Array, targets: Array, tip: float) -> Tree:
    """Grows a tree from ``root`` ``(3,)`` to all ``targets`` ``(N, 3)``; the last branches have radius ``tip`` (mm)."""
    order = np.argsort(np.linalg.norm(targets - root, axis=1), kind="stable")
    limit = 1 + 14 * len(targets)
    nodes, parent, path = np.empty((limit, 3)), np.zeros(limit, dtype=int), np.zeros(limit)
    nodes[0], count = root, 1
    leaves = []
    for target in targets[order]:
        gap = np.linalg.norm(nodes[:count] - target, axis=1)
        joint = int(np.argmin(gap + BALANCE * path[:count]))
        pieces = min(14, 1 + int(gap[joint] // PIECE))
        start = nodes[joint].copy()
        for piece in range(1, pieces + 1):
            point = start + (target - start) * piece / pieces
            if piece < pieces:
                point = point + rng.normal(0, 1.1, 3)
            nodes[count], parent[count] = point, joint
            path[count] = path[joint] + np.linalg.norm(point - nodes[joint])
            joint, count = count, count + 1
        leaves.append(joint)
    load = np.zeros(count)
    load[leaves] = 1
    for node in range(count - 1, 0, -1):  # children always come after their parent
        load[parent[node]] += load[node]
    return Tree(nodes[:count], parent[:count], tip * np.maximum(load, 1) ** (1 / MURRAY))


def draw_tubes(field: Array, starts: Array, ends: Array, radii: Array, spacing: tuple[float, float, float],
               slab: float) -> None:
    """Raises ``field`` ``(S, H, W)`` to the share of each voxel, 0..1, that the tubes fill.

    Args:
        field: changed in place.
        starts: ``(N, 3)`` where each tube begins, mm, (z, row, column).
        ends: ``(N, 3)`` where it ends.
        radii: ``(N,)`` mm.
        spacing: voxel size, mm.
        slab: slice thickness in mm; thinner than the distance between slices in the phantom.
    """
    depth, pixel = spacing[0], spacing[1]
    reach = slab / 2 + 0.7 * radii  # along z: half the slab, and most of the tube's own thickness
    first = np.maximum(np.ceil((np.minimum(starts, ends)[:, 0] - reach) / depth), 0).astype(int)
    last = np.minimum(np.floor((np.maximum(starts, ends)[:, 0] + reach) / depth), field.shape[0] - 1).astype(int)
    # A tube thinner than a pixel or a slab fills only part of a voxel.
    strength = np.minimum(1, np.minimum((2 * radii / pixel) ** 1.1, 0.4 + 2 * radii / slab))
    lines = np.arange(max(field.shape[1:]), dtype=np.float32) * pixel
    axis = ends - starts
    for i in np.flatnonzero(first <= last):
        for k in range(first[i], last[i] + 1):
            # The piece of the tube inside the slab, seen from above, is a bar in the slice plane.
            rise = axis[i, 0] if abs(axis[i, 0]) > 1e-3 else 1e-3
            cut = sorted((k * depth + side * reach[i] - starts[i, 0]) / rise for side in (-1, 1))
            near, far = max(cut[0], 0.0), min(cut[1], 1.0)
            (y0, x0), (dy, dx) = starts[i, 1:] + near * axis[i, 1:], (far - near) * axis[i, 1:]
            edge = radii[i] + pixel
            r0, r1 = (max(int(v / pixel), 0) for v in (min(y0, y0 + dy) - edge, max(y0, y0 + dy) + edge + pixel))
            c0, c1 = (max(int(v / pixel), 0) for v in (min(x0, x0 + dx) - edge, max(x0, x0 + dx) + edge + pixel))
            view = field[k, r0:r1 + 1, c0:c1 + 1]
            y, x = lines[r0:r1 + 1, None] - y0, lines[None, c0:c1 + 1] - x0
            along = np.clip((y * dy + x * dx) / max(dy * dy + dx * dx, 1e-6), 0, 1)
            gap = np.hypot(y - along * dy, x - along * dx)
            np.maximum(view, np.clip(0.5 + (radii[i] - gap) / pixel, 0, 1) * strength[i], out=view)


class Branches(NamedTuple):
    """All tubes of one patient, each ``(S, H, W)`` float32, the share 0..1 of a voxel."""

    vessels: Array  # arteries and veins of the lungs
    wall: Array     # of trachea and bronchi
    lumen: Array    # air inside the bronchi within the lungs
    trunk: Array    # air inside trachea and main bronchi, which do not count as lung
    crowded: tuple[int, ...]  # slices in which vessels are crowded together


def grow_branches(rng: np.random.Generator, f: Frame, chest: Chest, targets: int, *, crowded: bool) -> Branches:
    """Grows vessels and airways of both lungs, each vessel tree with ``targets`` end branches.

    The look-alike ``crowded`` has half as many more at the base and back, as after a shallow breath.
    """
    slab = rng.uniform(2.0, 5.0)
    vessels, wall, lumen, trunk = (np.zeros(f.shape, dtype=np.float32) for _ in range(4))
    offset = np.array([0.0, rng.choice((-0.8, 0.8)), 0.6])
    carina = _to_grid(f, chest.carina)
    above = _to_grid(f, (0.0, -0.02 * f.half_depth, f.height * 1.05))
    crowd: set[int] = set()
    for side, lung_root in zip((-1, 1), chest.hila, strict=True):
        hilum = _to_grid(f, lung_root)
        places = np.argwhere((chest.lung < -3) & (f.x * side > 0))
        chosen = places[rng.integers(0, len(places), targets)]
        basal = places[(places[:, 0] <= np.quantile(places[:, 0], 0.35)) & (f.y[tuple(places.T)] > 0)]
        if crowded and len(basal):
            chosen = np.concatenate([chosen, basal[rng.integers(0, len(basal), targets // 2)]])
            crowd.update(np.unique(basal[:, 0]).tolist())
        ends = (chosen + rng.uniform(-0.5, 0.5, chosen.shape)) * np.array(f.spacing)
        tree = grow_tree(rng, hilum, ends, tip=rng.uniform(0.55, 0.7))
        draw_tubes(vessels, tree.nodes[tree.parent[1:]], tree.nodes[1:], tree.radius[1:], f.spacing, slab)
        thick = 1 + np.flatnonzero(tree.radius[1:] > 1.9)  # larger branches have bronchi beside them
        radius = tree.radius[thick]
        shift = offset * (1.85 * radius + 0.9)[:, None]
        starts, bronchi = tree.nodes[tree.parent[thick]] + shift, tree.nodes[thick] + shift
        draw_tubes(wall, starts, bronchi, 0.85 * radius + 0.9, f.spacing, slab)
        draw_tubes(lumen, starts, bronchi, 0.85 * radius, f.spacing, slab)
        _main_airway(wall, trunk, f, carina, hilum, 6.0)
    _main_airway(wall, trunk, f, carina, above, 8.5)
    return Branches(vessels, wall * (1 - np.maximum(lumen, trunk)), lumen, trunk, tuple(sorted(crowd)))


def _to_grid(f: Frame, point: tuple[float, float, float]) -> Array:
    """Body coordinates (x, y, z) to the nearest voxel's place (z, row, column), mm from voxel (0, 0, 0)."""
    k = int(np.clip(round(point[2] / f.spacing[0] - 0.5), 0, f.shape[0] - 1))
    place = np.unravel_index(np.argmin((f.x[k] - point[0]) ** 2 + (f.y[k] - point[1]) ** 2), f.shape[1:])
    return np.array([point[2] - f.spacing[0] / 2, place[0] * f.spacing[1], place[1] * f.spacing[2]])


def _main_airway(wall: Array, lumen: Array, f: Frame, start: Array, end: Array, radius: float) -> None:
    """Trachea or main bronchus between two points: a tube of air with a thin wall."""
    for field, thick in ((wall, radius + 1.5), (lumen, radius)):
        draw_tubes(field, start[None], end[None], np.array([thick]), f.spacing, 1.0)


def draw_fissures(rng: np.random.Generator, f: Frame, chest: Chest) -> Array:
    """Share 0..1 of the thin planes between the lobes: oblique on both sides, horizontal on the right."""
    bend = 6 * smooth_noise(rng, f.shape, f.spacing, 35)
    oblique = f.z - f.height * 0.42 - 0.95 * f.y + 0.1 * np.abs(f.x) + bend
    horizontal = np.where((f.x < 0) & (oblique > 0), f.z - f.height * 0.5 - 0.25 * f.y + bend, 99.0)
    thin = np.maximum(np.exp(-(oblique / 1.5) ** 2), 0.7 * np.exp(-(horizontal / 3.0) ** 2))
    return (thin * (chest.lung < -1)).astype(np.float32)
