"""Cluster: of each class, the sample nearest to each centroid of k-means, those of larger clusters first.

As many clusters as there are samples to keep: k-means++ for where they begin, drawn by the memory's generator, and FAISS for the rest.
A cluster that came out empty, as where fewer points are distinct than wanted, is made up for by the second nearest sample of the
others, the larger ones first, and so on: there are always exactly as many samples as asked for. Of samples that are equally near the
first stays. It all runs on the host.
"""

from __future__ import annotations

import faiss
import numpy as np
import torch
from torch import Tensor

from streamcl.contracts import SelectionPolicy


class Cluster(SelectionPolicy):
    needs = ("features",)

    def rank(self, features: Tensor, scores: Tensor | None, count: int, generator: torch.Generator) -> Tensor:
        if count >= len(features):
            return torch.arange(len(features))
        # FAISS works in float32, from norms and inner products: about their mean the points lose no digits to a common offset.
        points = features.detach().double()
        centred = (points - points.mean(dim=0)).float().cpu()
        values = centred.numpy()
        seed = int(torch.randint(2**31, (), generator=generator))
        means = faiss.Kmeans(values.shape[1], count, niter=20, seed=seed, min_points_per_centroid=1)
        means.train(values, init_centroids=centred[_spread(centred, count, generator)].numpy())
        distances, clusters = (found[:, 0] for found in means.index.search(values, 1))
        sizes = np.bincount(clusters, minlength=count)
        by_cluster = np.lexsort((np.arange(len(values)), distances, clusters))
        starts = np.cumsum(sizes) - sizes
        nearness = np.empty(len(values), dtype=np.int64)  # 0 for the nearest to its centroid, 1 for the next
        nearness[by_cluster] = np.arange(len(values)) - starts[clusters[by_cluster]]
        return torch.from_numpy(np.lexsort((clusters, -sizes[clusters], nearness))[:count])


def _spread(points: Tensor, count: int, generator: torch.Generator) -> list[int]:
    """The points where k-means++ begins: each drawn by the square of its distance to the nearest one before."""
    draws = torch.rand(count, generator=generator, dtype=torch.float64).tolist()
    squares = points.square().sum(dim=1)
    chosen = [int(draws[0] * len(points))]
    nearest = torch.full((len(points),), torch.inf)
    for draw in draws[1:]:
        last = chosen[-1]
        nearest = torch.minimum(nearest, squares + squares[last] - 2 * (points @ points[last])).clamp_(min=0)
        nearest[last] = 0
        summed = nearest.double().cumsum(0)
        chosen.append(min(int(torch.searchsorted(summed, draw * float(summed[-1]), right=True)), len(points) - 1))
    return chosen
