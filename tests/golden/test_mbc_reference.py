"""The preset `paper-2024` gives the numbers of the recipe written down with numpy and scikit-learn.

The reference stacks all flattened factors in one matrix, as the paper's recipe says (2405.11157, model-based
clustering): sparsify at the median magnitude, randomised TruncatedSVD, unit rows, cosines, k-means on their rows.
"""

import numpy as np
import pytest
import torch
from sklearn.cluster import KMeans
from sklearn.decomposition import TruncatedSVD
from sklearn.metrics.pairwise import cosine_similarity

from lorary.adapter import Adapter, LoraFactors
from lorary.cluster.embed import embedding_of_gram, flattened_gram
from lorary.cluster.mbc import cluster_adapters
from lorary.keys import keyed_generator

SHAPES = {f"layers.{layer}.{leaf}": (48, 64) for layer in range(6) for leaf in ("q_proj", "v_proj")}


def made_adapter(name: str, group: int) -> Adapter:
    modules = {}
    for path, (d_in, d_out) in SHAPES.items():
        draw, centre, own = (keyed_generator(key, path) for key in ("draw", f"centre {group}", f"own {name}"))
        lora_a = torch.randn(4, d_in, generator=draw) + 0.3 * torch.randn(4, d_in, generator=own)
        lora_b = torch.randn(d_out, 4, generator=centre) + 1.5 * torch.randn(d_out, 4, generator=own)
        modules[path] = LoraFactors(lora_a, lora_b, 4.0)
    return Adapter(name, modules, {})


def reference(adapters: list[Adapter], sparsity: float, components: int, k: int) -> tuple[np.ndarray, list[int]]:
    rows = np.stack([np.concatenate([t.numpy().ravel() for _, f in a for t in (f.lora_a, f.lora_b)]) for a in adapters])
    for row in rows:
        row[np.abs(row) <= np.quantile(np.abs(row), sparsity)] = 0.0
    svd = TruncatedSVD(components, algorithm="randomized", n_iter=5, n_oversamples=10, random_state=42)
    points = svd.fit_transform(rows)
    similarity = cosine_similarity(points / np.linalg.norm(points, axis=1, keepdims=True))
    labels = KMeans(k, init="k-means++", n_init=10, random_state=42).fit_predict(similarity)
    return similarity, [int(label) for label in labels]


# More adapters than components and oversamples, fewer than both together, fewer than the components.
@pytest.mark.parametrize(("number", "k"), [(140, 9), (70, 6), (25, 4)])
def test_cosines_and_clusters_are_those_of_the_recipe(number: int, k: int) -> None:
    adapters = {f"n{i:03d}": made_adapter(f"n{i:03d}", i % 8) for i in range(number)}
    similarity, labels = reference(list(adapters.values()), 0.5, 64, k)
    found = cluster_adapters(list(adapters), adapters.__getitem__, k=k, method="paper-2024")
    np.testing.assert_allclose(found.similarity.numpy(), similarity, rtol=0, atol=2e-5)
    pairs = set(zip(labels, found.labels, strict=True))
    assert len(pairs) == k  # the same clusters: numbers are matched one to one


@pytest.mark.parametrize(("sparsity", "components"), [(0.8, 16), (0.0, 8)])
def test_the_embedding_follows_its_settings(sparsity: float, components: int) -> None:
    adapters = [made_adapter(f"n{i:03d}", i % 8) for i in range(60)]
    similarity, _ = reference(adapters, sparsity, components, 2)
    names, gram = flattened_gram(adapters, sparsity)
    embedding = embedding_of_gram(gram, components, seed=42)
    assert names == tuple(adapter.name for adapter in adapters)
    assert embedding.shape == (60, components)
    np.testing.assert_allclose((embedding @ embedding.mT).numpy(), similarity, rtol=0, atol=2e-5)
