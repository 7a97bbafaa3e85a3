"""Cluster: of each class, the sample nearest to each centroid of k-means, those of larger clusters first.

As many clusters as there are samples to keep (FAISS, seeded by the memory's generator). A cluster that came out empty, as where fewer
points are distinct than wanted, is made up for by the second nearest sample of the others, the larger ones first, and so on: there
are always exactly as many samples as asked for. Of samples that are equally near the first stays. k-means runs on the host.
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
        seed = int(torch.randint(2**31, (), generator=generator))
        if count >= len(features):
            return torch.arange(len(features))
        # FAISS works in float32, from norms and inner products: about their mean the points lose no digits to a common offset.
        points = features.detach().double()
        values = (points - points.mean(dim=0)).float().cpu().numpy()
        means = faiss.Kmeans(values.shape[1], count, niter=20, seed=seed, min_points_per_centroid=1)
        means.train(values)
        distances, clusters = (found[:, 0] for found in means.index.search(values, 1))
        sizes = np.bincount(clusters, minlength=count)
        by_cluster = np.lexsort((np.arange(len(values)), distances, clusters))
        starts = np.cumsum(sizes) - sizes
        nearness = np.empty(len(values), dtype=np.int64)  # 0 for the nearest to its centroid, 1 for the next
        nearness[by_cluster] = np.arange(len(values)) - starts[clusters[by_cluster]]
        return torch.from_numpy(np.lexsort((clusters, -sizes[clusters], nearness))[:count])
